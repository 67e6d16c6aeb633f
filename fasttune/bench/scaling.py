"""`fasttune bench CONFIG --gpus 1,2`: the same job by `fasttune train --gpus N`, for each N; how it scales.

Every measurement is the real command in fresh processes; its numbers are those of metrics.jsonl and run.json.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from fasttune import child_process, gpus
from fasttune.errors import FasttuneError, last_line


def arms(asked: str, on_gpus: bool) -> dict[str, int]:
    """{"1 GPU": 1, …} of "1,2"; the first is what the others are compared to. Raises FasttuneError."""
    counts = [gpus.count(text.strip()) for text in asked.split(",")]
    if len(counts) < 2 or sorted(set(counts)) != counts:
        raise FasttuneError(f"--gpus {asked}: two numbers or more, the smallest first, as in --gpus 1,2")
    one, many = ("GPU", "GPUs") if on_gpus else ("process", "processes")
    return {f"{count} {one if count == 1 else many}": count for count in counts}


def measure(processes: int, shared: Path) -> dict[str, Any]:
    """One repeat, as the worker of an arm gives it: fields of Repeat, or {"failure": …}. shared: holds job.yaml."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        asked = ["train", str(shared / "job.yaml"), f"output_dir={run}", "checkpoint.every=never"]
        command = child_process.command("fasttune.cli", *asked, *(["--gpus", str(processes)] if processes > 1 else []))
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_process.environment())
        if done.returncode:
            return {"failure": last_line(done.stderr, f"ended with code {done.returncode}")[:300]}
        told = json.loads((run / "run.json").read_text(encoding="utf-8"))
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = ("tokens", "computed_tokens", "loss_tokens", "padding_tokens", "seconds")
    return {name: [step[name] for step in steps] for name in counts} | {
        "losses": [step["loss"] for step in steps],
        "rows_digest": "",  # the rows of a step follow from its seed and number; their tokens are compared
        "peak_memory_gib": max(told["ranks"]["peak_memory_gib"]) if told["ranks"] else told["peak_memory_gib"],
        "seconds_to_first_step": told["seconds_to_first_step"],
        "flops_per_token": None,
        "backend": told["backend"],
        "straggler": told["ranks"] and told["ranks"]["straggler"],
    }
