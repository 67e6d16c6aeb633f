"""The table of docs/compatibility.md: which attention runs for what is installed. backends.py looks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fasttune import stack

pytestmark = pytest.mark.nightly  # it changes with the pins only
XFORMERS = {  # as much of it as Unsloth imports
    "__init__.py": "__version__ = '0.0.35'\n",
    "_cpp_lib.py": "def _register_extensions(): ...\n",
    "ops/__init__.py": "",
    "ops/fmha/__init__.py": "from . import attn_bias\ndef memory_efficient_attention(): ...\n",
    "ops/fmha/attn_bias.py": "class BlockDiagonalMask:\n    def to(self, device): return self\n"
    "    @classmethod\n    def from_seqlens(cls, lengths): return cls()\n"
    "class BlockDiagonalCausalMask(BlockDiagonalMask): ...\n"
    "class LowerTriangularMask(BlockDiagonalMask): ...\n",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("backends")
    for name, text in XFORMERS.items():
        (folder / "xformers" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "xformers" / name).write_text(text)
    own = {"PYTHONPATH": str(folder), "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth")}
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("backends.py")]
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pack_of_ours_runs_one_kernel_and_copies_no_keys(table: dict[str, Any]) -> None:
    """Although xformers is installed: Unsloth would take it, with keys and values copied for each of 32 heads."""
    assert table["xformers is hidden"]
    for torch in ("2.11", "2.12"):
        assert table[f"fasttune, torch {torch}"] == {
            "pack": ["torch, variable length", 8],
            "rectangle": ["torch SDPA", 8],
        }
    assert table["Unsloth, xformers, torch 2.11"] == {"pack": ["xformers", 32], "rectangle": ["xformers", 32]}


def test_what_unsloth_takes_by_itself(table: dict[str, Any]) -> None:
    assert table["Unsloth, torch 2.11"] == {"pack": ["torch SDPA, 3 calls", 8], "rectangle": ["torch SDPA", 8]}
    pack, rectangle = ["torch, variable length", 8], ["xformers", 32]
    assert table["Unsloth, xformers, torch 2.12"] == {"pack": pack, "rectangle": rectangle}


def test_flash_attn_is_taken_before_all_others(table: dict[str, Any]) -> None:
    """Before FlashAttention 3, too: that one is reached through torch's kernel."""
    kernels = {"pack": ["flash-attn, variable length", 8], "rectangle": ["flash-attn", 8]}
    assert table["fasttune, flash-attn"] == kernels


def test_flash_attention_3_is_taken_for_wide_models_and_only_with_a_backward(table: dict[str, Any]) -> None:
    wide, narrow, forward_only = table["FlashAttention 3"]
    assert (wide, narrow, forward_only) == ("FA3", None, None)


@pytest.mark.parametrize(("name", "row"), [("cpu", "2.12"), ("cu130", "2.11"), ("cu12", "2.11")])
def test_the_row_of_each_stack(table: dict[str, Any], name: str, row: str) -> None:
    pins = stack.read_pins(name)
    assert not {"xformers", "flash-attn", "flash-attn-3", "flash-attn-4"} & set(pins)
    newer = tuple(int(part) for part in pins["torch"].partition("+")[0].split(".")[:2]) >= (2, 12)
    assert newer == (row == "2.12") and table[f"fasttune, torch {row}"]["pack"] == ["torch, variable length", 8]
