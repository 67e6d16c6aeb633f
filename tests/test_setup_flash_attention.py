"""The set-up's flash-attn: what is done about a broken one, and where its wheel is looked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from fasttune.hardware import Gpu, Hardware

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"torch": "2.11.0+cu130", "cuda": "13.0", "abi": True, "python": "cp312"}


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import flash_attention

    return flash_attention


@pytest.mark.parametrize("mode", ["auto", "build"])
def test_a_flash_attn_that_does_not_run_is_removed_before_another_is_looked_for(
    flash_attention: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """uv would take it for the one that is wanted, or a wheel that it built once for another torch."""
    there, asked = {"flash-attn"}, []

    class Shell:
        def try_uv(self, verb: str, *arguments: str, **_: str) -> bool:
            asked.append((verb, *arguments))
            there.discard("flash-attn") if verb == "uninstall" else None
            return "flash-attn" in there or arguments == ("--no-deps", "ninja")

    answers = {flash_attention.PROVE: "", flash_attention.DESCRIBE: json.dumps(FACTS)}
    monkeypatch.setattr(flash_attention, "run", lambda shell, code: answers.get(code, "2.8.3" if there else ""))
    monkeypatch.setattr(flash_attention, "reachable", lambda url: False)
    monkeypatch.setattr(flash_attention.shutil, "which", lambda name, path=None: name)
    machine = Hardware("linux", "x86_64", "2.35", "3.12", "", 2, 24.0, 64.0, (Gpu("NVIDIA H200", (9, 0), 140.0),))
    said = flash_attention.install(mode, machine, Shell())
    assert said.startswith("2.8.3 did not run and was removed; ") and said.endswith(flash_attention.FALLBACK)
    assert asked[0] == ("uninstall", "flash-attn")
    assert [verb for verb, *_ in asked[1:]] == ["install"] * len(asked[1:]) and len(asked) > 1
    assert ("--no-cache" in asked[-1]) == (mode == "build")


def test_the_flash_attn_wheel_is_named_as_the_project_names_it(flash_attention: Any) -> None:
    urls = flash_attention.wheel_urls(FACTS)
    assert urls[-1] == (
        "https://github.com/Dao-AILab/flash-attention/releases/download/v2.8.3/"
        "flash_attn-2.8.3%2Bcu13torch2.11cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"
    )
