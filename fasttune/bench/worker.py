"""One measurement in a process of its own: python -m fasttune.bench.worker WHAT SHARED_FOLDER STEPS

WHAT is an arm, `share` (write what all arms start from) or `limit` (the matmul rate at the model's own shapes).
The last line of stdout is a JSON document; {"failure": …} says in one line why an arm cannot do the job.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasttune import config as configuration
from fasttune.bench import arms
from fasttune.config import Config
from fasttune.data.batching import best_fit
from fasttune.errors import kind_and_line

LIMIT_SECONDS, LIMIT_STEPS = 4.0, 6  # fewer steps than these, as in a dry run: as much less time


def main() -> int:
    what, shared, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    config = configuration.load(shared / ("job.yaml" if what == "share" else "config.yaml"), ours=True)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result = _measure(what, config, steps, shared, Path(scratch))
        except Exception as error:  # an arm that cannot do the job is a row of the table
            result = {"failure": kind_and_line(error)[:300]}
    print("\n" + json.dumps(result))
    return 0


def _measure(what: str, config: Config, steps: int, shared: Path, scratch: Path) -> dict[str, Any]:
    if what == "share":
        return arms.share(config, shared, scratch)
    if what == "limit":
        return limit(config, shared, LIMIT_SECONDS * min(1.0, steps / LIMIT_STEPS))
    return asdict(arms.run(what, config, steps, shared, scratch))


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
    tokens, labels = at_once(config, json.loads((shared / "rows.json").read_text(encoding="utf-8")))
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


def at_once(config: Config, steps: list[list[tuple[list[int], list[bool]]]]) -> tuple[int, int]:
    """Tokens and labels of the micro-batch that a token of the fasttune arm lies in, on average."""
    rows_at_once, packed = arms.micro(config)[0], config.train.packing is not False
    sizes = []
    for rows in steps:
        lengths = [len(ids) for ids, _ in rows]
        groups = [list(range(len(rows)))[at : at + rows_at_once] for at in range(0, len(rows), rows_at_once)]
        if packed:
            groups = best_fit(lengths, rows_at_once * config.model.max_length)
        for group in groups:
            longest = max(lengths[i] for i in group)
            tokens = sum(lengths[i] for i in group) if packed else longest * len(group)
            sizes.append((tokens, sum(sum(rows[i][1]) for i in group)))
    total = sum(tokens for tokens, _ in sizes)
    tokens, labels = (round(sum(size[0] * size[k] for size in sizes) / total) for k in (0, 1))
    return tokens, max(1, labels)


if __name__ == "__main__":
    sys.exit(main())
