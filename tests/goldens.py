"""What was recorded of earlier code, and must be as it was: losses, bytes, and the keys of what --json prints.

Changed on purpose? Run the test with FASTTUNE_RECORD_GOLDEN=1 and say why in the commit.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-4  # relative, on another kind of machine: fp32 sums in another order
BF16_TOLERANCE = 2e-3  # where what is computed is bf16, which some chips imitate and some have (2.5e-4 between two)
OPEN = {"versions", "shapes", "rows_dropped", "settings"}  # objects whose keys are data, or a config's


def machine_kind() -> str:
    """What fp32 sums of one thread depend on: the chip (family, model, stepping), its vector width, and torch."""
    import torch

    text = Path("/proc/cpuinfo").read_text()
    keys = ("vendor_id", "cpu family", "model", "stepping")
    chip = [found[1] for key in keys if (found := re.search(rf"^{key}\s*: (.+)$", text, re.M))]
    return f"{' '.join(chip)}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def check(file: str, name: str, seen: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Hold `seen` (numbers, lists of them, digests) against what is recorded: all of it to the last bit on the kind of
    machine it was recorded on, elsewhere the numbers within `tolerance` and what is named `exact` to the last bit.
    """
    here, golden = machine_kind(), _recorded(file, name, {"machine": machine_kind(), **seen})
    assert seen.keys() == golden.keys() - {"machine"}
    for key, value in seen.items():
        if here == golden["machine"] or key == "exact":
            assert value == golden[key], f"{name}: {key}"
        elif not isinstance(value, str):
            assert value == pytest.approx(golden[key], rel=tolerance), f"{name}: {key}"


def contract(name: str, document: Any) -> None:
    """Others read these keys: none comes or goes unnoticed. Those of a GPU are not looked at."""
    seen = sorted(set(_keys(document)))
    assert seen == _recorded("contracts.json", name, seen), f"the keys of {name}"


def _keys(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict) and path.rpartition(".")[2] not in OPEN:
        for key, value in node.items():
            yield f"{path}.{key}".lstrip(".")
            yield from _keys(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list) and not path.endswith("gpus"):
        for value in node:
            yield from _keys(value, f"{path}[]")


def _recorded(file: str, name: str, seen: Any) -> Any:
    path = FOLDER / file
    recorded = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get("FASTTUNE_RECORD_GOLDEN"):
        recorded[name] = seen
        path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    return recorded[name]
