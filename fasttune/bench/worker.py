"""One measurement in a process of its own: python -m fasttune.bench.worker WHAT SHARED_FOLDER STEPS

WHAT is an arm, `share` (write what all arms start from) or `limit` (the matmul rate at the model's own shapes).
The last line of stdout is a JSON document; {"failure": …} says in one line why an arm cannot do the job.

Every arm is timed and counted by the same code, on the tensors that are trained on. torch and transformers are imported
inside of functions, after what the arm itself imports: see arms.py.
"""

import gc
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fasttune import config as configuration
from fasttune.bench import arms
from fasttune.bench.stats import Repeat
from fasttune.config import Config
from fasttune.data import load
from fasttune.data.batching import Batches
from fasttune.data.sharing import paths
from fasttune.data.tokenize import IGNORE
from fasttune.errors import FasttuneError, first_line, kind_and_line

PROCESS_STARTED = time.perf_counter()
SIZES = "at-once.json"  # in the shared folder: tokens and labels
LIMIT_SECONDS, LIMIT_STEPS = 4.0, 6  # fewer steps than these, as in a dry run: as much less time


def main() -> int:
    what, shared, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    config = configuration.load(shared / ("job.yaml" if what == "share" else "config.yaml"), ours=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if what == "share":
                result = share(config, shared, Path(scratch))
            elif what == "limit":
                result = limit(config, shared, LIMIT_SECONDS * min(1.0, steps / LIMIT_STEPS))
            else:
                result = asdict(measure(what, config, steps, shared, Path(scratch)))
        except Exception as error:  # an arm that cannot do the job is a row of the table
            result = {"failure": kind_and_line(error)[:300]}
            if isinstance(error, FasttuneError) and error.exit_code == 2:
                result["user_error"] = first_line(error)[:300]
    print("\n" + json.dumps(result))
    gc.freeze()  # see cli.py
    return 0


def share(config: Config, shared: Path, scratch: Path) -> dict[str, Any]:
    """Write what all arms start from: the adapter, and every step's rows. Returns facts of the job for the report."""
    job = arms.prepare(config, scratch)
    import torch

    if config.train.method == "lora":
        adapter = {n: p.detach().cpu() for n, p in job.model.named_parameters() if p.requires_grad}
        torch.save(adapter, shared / arms.ADAPTER)
    data = job.data
    rows = map(data.encoded, range(job.total_steps))
    plain = [[(ids.tolist(), supervised.tolist()) for ids, supervised in step] for step in rows]
    (shared / arms.ROWS).write_text(json.dumps(plain), encoding="utf-8")
    (shared / "config.yaml").write_text(configuration.dump(job.config), encoding="utf-8")
    (shared / SIZES).write_text(json.dumps(at_once(data, job.total_steps)), encoding="utf-8")
    return {
        "tokens_per_epoch": sum(load.tokens_by_source(data, data.steps_per_epoch).values()),
        "steps_per_epoch": data.steps_per_epoch,
        "full_steps_per_epoch": data.rows_per_epoch // data.batch_rows,
    }


def measure(arm: str, config: Config, steps: int, shared: Path, scratch: Path) -> Repeat:
    """One repeat of an arm. `shared` holds what `share` wrote. An arm that runs out of memory starts again with half as
    many rows at once; `fasttune` does so by itself."""
    asked = arms.rows_at_once(config)
    while True:
        at_once = arms.rows_at_once(config)
        try:
            found = measure_once(arm, config, steps, shared, scratch)
            packing = f"{found.backend.packing}, {at_once} at once: {asked} ran out of memory"
            return found if at_once == asked else replace(found, backend=replace(found.backend, packing=packing))
        except RuntimeError as error:
            import torch  # not before: what an arm asks of the memory must be set by then

            if not isinstance(error, torch.OutOfMemoryError) or arm == "fasttune" or at_once == 1:
                raise
        gc.collect()  # outside of `except`, whose traceback holds the model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        fewer = max(n for n in range(1, at_once) if config.train.batch_rows % n == 0)
        config = configuration.changed(config, train={"micro_batch_rows": fewer})


def measure_once(arm: str, config: Config, steps: int, shared: Path, scratch: Path) -> Repeat:
    """Train, with a clock and a counter at the arm's trainer."""
    trainer = arms.build(arm, config, steps, shared, scratch)
    import transformers

    from fasttune.core import what_ran

    class Callback(Clock, transformers.TrainerCallback): ...

    clock = Callback()
    # A data loader gives micro-batches; that of `fasttune` all of a step at once.
    per_step = 1 if arm == "fasttune" else config.train.batch_rows // arms.rows_at_once(config)
    trainer.data_collator = counter = Counter(trainer.data_collator, per_step)
    trainer.add_callback(clock)
    trainer.train()
    done = len(clock.seconds)
    tokens, supervised = counter.per_steps("tokens", done), counter.per_steps("loss_tokens", done)
    computed, rows = counter.per_steps("computed_tokens", done), config.train.batch_rows * done
    flops = what_ran.count_flops(trainer.model)
    of_all = flops.of_step(sum(computed), sum(supervised), sum(tokens) / rows) if flops else None
    return Repeat(
        tokens=tokens,
        computed_tokens=computed,
        loss_tokens=supervised,
        padding_tokens=counter.per_steps("padding_tokens", done),
        seconds=clock.seconds,
        losses=[float(logs["loss"]) for logs in trainer.state.log_history if "loss" in logs],
        rows_digest=counter.digest(done),
        peak_memory_gib=what_ran.peak_memory_gib(),
        peak_before_gib=clock.peak_before_gib,
        seconds_to_first_step=clock.seconds_to_first_step,
        flops_per_token=of_all / sum(tokens) if of_all is not None else None,
        backend=arms.backend(arm, trainer, "end to end" if counter.flat else "padded"),
        weights_digest=clock.weights_digest,
    )


class Clock:
    """Seconds of each step. A step lasts from the end of the one before, so fetching its rows is in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.seconds_to_first_step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        from fasttune.core import what_ran

        began = time.perf_counter()
        self.weights_digest = what_ran.fingerprint(model.parameters())
        self._started = PROCESS_STARTED + time.perf_counter() - began  # a digest is not what a person waits for
        self.peak_before_gib = what_ran.restart_peak()
        what_ran.synchronize()
        self._last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from fasttune.core import what_ran

        what_ran.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.seconds_to_first_step = self.seconds_to_first_step or now - self._started
        self._last = now


class Counter:
    """Wraps a collator: counts what it gives and hashes the rows in it. `per_step` batches make an optimizer step."""

    def __init__(self, collate: Callable[[Any], Any], per_step: int):
        self.collate = collate
        self.batches = getattr(collate, "batches", None)  # where the trainer halves micro-batches out of memory
        self.per_step = per_step
        self.counts: list[dict[str, int]] = []
        self.rows: list[list[bytes]] = []
        self.flat = False  # whether rows lay end to end

    def __call__(self, examples: Any) -> Any:
        from fasttune.core import what_ran

        made = self.collate(examples)
        batches = made if isinstance(made, list) else [made]
        self.flat = all("attention_mask" not in batch for batch in batches)
        self.counts.append(what_ran.count_tokens(batches))
        self.rows.append([row for batch in batches for row in rows_in(batch)])
        return made

    torch_call = __call__  # Unsloth looks for TRL's name

    def per_steps(self, name: str, steps: int) -> list[int]:
        """One of the counts of each of the first `steps` steps (a loader may have fetched further)."""
        at = range(0, steps * self.per_step, self.per_step)
        return [sum(count[name] for count in self.counts[i : i + self.per_step]) for i in at]

    def digest(self, steps: int) -> str:
        """Hash of the rows of each step, whatever their order and layout in it."""
        total = hashlib.sha256()
        for i in range(0, steps * self.per_step, self.per_step):
            for row in sorted(row for rows in self.rows[i : i + self.per_step] for row in rows):
                total.update(len(row).to_bytes(8) + row)
            total.update(b"step")
        return total.hexdigest()


def rows_in(batch: dict[str, Any]) -> list[bytes]:
    """Token ids and labels of every row of a micro-batch, without padding. A row's first label is no target."""
    import torch

    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" not in batch:  # a rectangle
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        pairs = [(row[keep], label[keep]) for row, label, keep in zip(ids, labels, mask, strict=True)]
    elif "row_ends" not in batch:  # flat: positions restart with each row
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        pairs = [(ids[0, a:b], labels[0, a:b]) for a, b in pairwise([*starts, ids.shape[1]])]
    else:  # flat, with beginnings that rows share: a label there is of one of them
        lengths, owners = batch["packed_seq_lengths"].tolist(), batch["segment_owners"].tolist()
        tokens, targets = ids[0].split(lengths), labels[0].split(lengths)
        pairs = [
            (
                torch.cat([tokens[segment] for segment in path]),
                torch.cat([targets[s] if owners[s] == row else torch.full_like(targets[s], IGNORE) for s in path]),
            )
            for row, path in enumerate(paths(batch))
        ]
    return [row.to(torch.int64).numpy().tobytes() + label[1:].to(torch.int64).numpy().tobytes() for row, label in pairs]


def limit(config: Config, shared: Path, seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
    """Matmul rates at the shapes of the model: T tokens at once × every linear layer, lm_head on their labels only.

    tflops: the mean weighted by the FLOPs of each shape, that is, all FLOPs over the time that all of them take.
    """
    import torch
    import transformers

    from fasttune import hardware
    from fasttune.core import pretrained

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            pretrained.read_architecture(config.model), trust_remote_code=config.model.trust_remote_code
        )
    tokens, labels = json.loads((shared / SIZES).read_text(encoding="utf-8"))
    head = model.get_output_embeddings()
    flops: dict[tuple[int, int, int], float] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            shape = (labels if module is head else tokens, module.in_features, module.out_features)
            flops[shape] = flops.get(shape, 0.0) + 2.0 * shape[0] * shape[1] * shape[2]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = hardware.measure_matmul_tflops(device, config.model.dtype, list(flops), seconds)
    return {
        "tflops": sum(flops.values()) / sum(flops[shape] / rates[shape] for shape in flops),
        "shapes": {" x ".join(map(str, shape)): rate for shape, rate in rates.items()},
    }


def at_once(data: Batches, steps: int) -> tuple[int, int]:
    """Tokens and labels of the micro-batch that a token lies in, on average, where every token is computed."""
    data.least_shared = 0
    made = [batch for step in range(steps) for batch in data.micro_batches(step)]
    sizes = [(batch["input_ids"].size, int((batch["labels"] != IGNORE).sum())) for batch in made]
    total = sum(tokens for tokens, _ in sizes)
    tokens, labels = (round(sum(size[0] * size[k] for size in sizes) / total) for k in (0, 1))
    return tokens, max(1, labels)


if __name__ == "__main__":
    sys.exit(main())
