"""Trains through Unsloth's code for CUDA, run after run in one process, and writes down what was seen of each.

python rehearse.py RUNS.json OUT.json: RUNS is {name: {"config": …, "fused": …}}, OUT {name: what `rehearse` returns}.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cuda_on_cpu
import flash
import torch


class Told:
    """A reporter that keeps the settings a person is shown."""

    def start(self, name: str, machine: str, settings: list[Any], *rest: Any) -> None:
        self.settings = [f"{each.name}: {each.value} ({each.reason})" for each in settings]

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keywords: None


class Watch(cuda_on_cpu.Card):
    """Notes the order in which a step's tensors are made, counted, moved to the card and used."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.names: dict[int, str] = {}
        self.alive: list[Any] = []  # so that no id comes twice

    def made(self, batches: list[dict[str, Any]]) -> None:
        self.events.append("made")
        self.alive.append(batches)
        self.names |= {id(tensor): name for batch in batches for name, tensor in batch.items()}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moves = getattr(function, "__name__", "") in ("to", "cuda") and "dtype" not in (
            kwargs or {}
        )  # those are Unsloth's
        if moves and id(args[0]) in self.names:
            self.events.append(f"moved {self.names[id(args[0])]}")
        return super().__torch_function__(function, types, args, kwargs)


@contextmanager
def spies(watch: Watch) -> Iterator[dict[str, list[Any]]]:
    """What reaches Unsloth's attention, its rope and its loss while a model is in training mode."""
    import unsloth.models.llama as llama

    from fasttune.core import trainer as trainers

    seen: dict[str, list[Any]] = {"attention": [], "positions": [], "hidden": []}
    real = {name: getattr(llama, name) for name in ("run_attention", "fast_rope_embedding", "unsloth_fused_ce_loss")}
    count, collate = trainers.count_tokens, trainers.StepCollator.__call__
    training = []

    def run_attention(*, config: Any, context: Any, **tensors: Any) -> Any:
        if context.training:
            lengths = context.seq_info[0] if context.seq_info is not None else None
            found = {"backend": config.backend, "shape": list(tensors["Q"].shape)}
            found |= {"mask": context.attention_mask is not None or context.causal_mask is not None}
            found["lengths"] = None if lengths is None else [str(lengths.dtype), *lengths.tolist()]
            seen["attention"].append(found)
            seen["positions"].append(training[-1])
            watch.events.append("used")
        return real["run_attention"](config=config, context=context, **tensors)

    def fast_rope_embedding(q: Any, k: Any, cos: Any, sin: Any, positions: Any = None) -> Any:
        training.append(None if positions is None else positions.flatten().tolist())
        return real["fast_rope_embedding"](q, k, cos, sin, positions)

    def fused_ce_loss(**asked: Any) -> Any:
        seen["hidden"].append(list(asked["hidden_states"].shape))
        return real["unsloth_fused_ce_loss"](**asked)

    def count_tokens(batches: list[Any]) -> Any:
        watch.events.append("counted")
        return count(batches)

    def made(collator: Any, examples: Any) -> Any:
        batches = collate(collator, examples)
        watch.made(batches)
        return batches

    llama.run_attention, llama.fast_rope_embedding = run_attention, fast_rope_embedding
    llama.unsloth_fused_ce_loss, trainers.count_tokens, trainers.StepCollator.__call__ = (
        fused_ce_loss,
        count_tokens,
        made,
    )
    try:
        yield seen
    finally:
        vars(llama).update(real)
        trainers.count_tokens, trainers.StepCollator.__call__ = count, collate


def look_at(model: Any, seen: dict[str, list[Any]]) -> None:
    """Bytes that the decoder's one layer keeps for backward, by micro-batch, and every whole row of logits."""
    from fasttune.core import model as models

    (layer,) = models.decoder_layers(model)
    known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    seen |= {"kept": [], "logits": []}
    kept: dict[int, Any] = {}
    inside: list[Any] = []

    def keep(tensor: Any) -> Any:
        if (storage := tensor.untyped_storage())._cdata not in known:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    def enter(*_: Any) -> None:
        if model.training:
            kept.clear()
            inside.append(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
            inside[-1].__enter__()

    def leave(_module: Any, arguments: Any, _output: Any) -> None:
        if inside:
            inside.pop().__exit__()
            tokens = arguments[0].shape[:2].numel()
            seen["kept"].append({"tokens": tokens, "bytes": sum(size for size, _ in kept.values())})

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
    head = model.get_output_embeddings()
    head.register_forward_hook(
        lambda _head, _in, out: seen["logits"].append(list(out.shape)) if model.training else None
    )


def rehearse(settings: dict[str, Any], fused: bool) -> dict[str, Any]:
    """Train once, by what `fasttune train` runs."""
    from fasttune import config
    from fasttune.core import train
    from fasttune.cpu import fused_lora

    cuda_on_cpu.fuse_lora = fused
    told, watch, jobs, prepare = Told(), Watch(), [], train.prepare
    with watch, spies(watch) as seen:

        def prepared(*arguments: Any) -> Any:
            jobs.append(prepare(*arguments))
            for found in seen.values():  # those of the proof that packs are exact
                found.clear()
            watch.events.clear()
            look_at(jobs[0].model, seen)
            return jobs[0]

        train.prepare, started = prepared, time.process_time()
        try:
            result = train.run(config.parse(settings), told)
        finally:
            train.prepare = prepare
    folder = Path(settings["output_dir"])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return seen | {
        "status": result.status,
        "error": result.error,
        "warnings": result.warnings,
        "backend": json.loads((folder / "run.json").read_text())["backend"],
        "loss": [step["loss"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
        "settings": told.settings,
        "events": watch.events,
        "cpu_lora_layers": fused_lora.live_layers(jobs[0].model),
        "seconds": time.process_time() - started,
    }


def stand_in_for_flash_attention() -> None:
    """Its calls that core/shared_attention.py makes, which Unsloth is led to as on a GPU."""
    from unsloth.utils import attention_dispatch as dispatch

    from fasttune.core import model as models, shared_attention

    shared_attention.flash_forward, shared_attention.flash_backward = flash.forward, flash.backward
    take = models.take_shared_attention

    def taken(now: Any) -> Any:
        dispatch._torch_varlen_takes = lambda *_: now.pack is not None
        return take(now)

    models.take_shared_attention = taken


def main(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    cuda_on_cpu.start()
    from fasttune.core import autoconfig, packing, train

    # A token takes the interpreter a tenth of a second.
    packing.PROBE_LENGTHS, packing.PROBE_ALIKE, packing.PROBE_LEAST = [5, 6, 3], [(2, 3)], 2
    autoconfig.GPU_LEAST_SHARED, train.MATMUL_SECONDS = 4, 0.01
    stand_in_for_flash_attention()
    return {name: rehearse(run["config"], run["fused"]) for name, run in runs.items()}


if __name__ == "__main__":
    runs, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(main(json.loads(runs.read_text()))), encoding="utf-8")
