"""What the datasheet of a GPU says (chips.json), and machines that have one of them without having it: for a plan.

Only the standard library is imported here. chips.json: `chips` by a pattern of nvidia-smi's name, of which the first
that matches wins: dense bf16 TFLOP/s of the tensor cores (datasheets print the figure with sparsity, half of it is
there), TB/s of the memory, and an example of an on-demand price, the low end among specialised providers on that date.
Prices move and differ 2.5-fold between providers, so a config can override them. `known`: name, compute capability and
MiB as nvidia-smi says them (with ECC on where the card has it), from output on machines with these cards:
https://docs.nvidia.com/deploy/nvidia-smi/
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasttune.hardware import Gpu, Hardware

_tables = json.loads(Path(__file__).with_name("chips.json").read_text(encoding="utf-8"))
CHIPS: list[dict[str, Any]] = _tables["chips"]
KNOWN_GPUS: dict[str, dict[str, Any]] = _tables["known"]
USD_PER_HOUR_DATE: str = _tables["usd_per_hour_date"]


def with_gpu(machine: Hardware, known: str) -> Hardware:
    """This machine, if it had one of KNOWN_GPUS."""
    card = KNOWN_GPUS[known]
    major, minor = card["compute_capability"]
    gpu = Gpu(card["name"], (major, minor), card["memory_mib"] / 1024)
    return replace(machine, gpus=(gpu,), driver=None, silent_gpu=False)


def peak_bf16_tflops(gpu_name: str) -> float | None:
    """Dense bf16 peak of the datasheet in TFLOP/s (989 for H100/H200 SXM), or None for a chip not in the table."""
    return _of(gpu_name, "bf16_tflops")


def memory_tb_per_s(gpu_name: str) -> float | None:
    """Bandwidth of the datasheet, or None where the table has none."""
    return _of(gpu_name, "memory_tb_per_s")


def usd_per_hour(gpu_name: str) -> float | None:
    """An example on-demand price in US dollars an hour (see USD_PER_HOUR_DATE), or None where the table has none."""
    return _of(gpu_name, "usd_per_hour")


def _of(gpu_name: str, fact: str) -> float | None:
    if re.search(r"\bMIG\b|Laptop", gpu_name):  # less than the whole chip
        return None
    return next((chip[fact] for chip in CHIPS if re.search(chip["pattern"], gpu_name)), None)
