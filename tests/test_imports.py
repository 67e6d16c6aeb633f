"""The house rules of imports: downwards only, one door to unsloth, nothing heavy where answers must be quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path("fasttune")
# Lowest first. A module imports only from rows above its own.
LAYERS = [
    {"text"},
    {"children", "hints", "strict_yaml"},
    {"errors"},
    {"gpus", "paths"},
    {"cache", "checkpoint", "hardware", "hub", "memory", "merge_check", "metrics", "publish", "quiet"},
    {"config", "plots", "precision", "shape", "stack"},
    {"builtin", "data", "memory_forecast", "output", "report", "rules"},
    {"decoding", "live", "plan", "pretrained", "rows_attention", "terminal"},
    {"adapter", "model", "roofline"},
    {"forecast"},
    {"finished", "fused_lora", "merge_check", "packed", "samples", "tasks"},
    {"card", "harness", "merge", "prepare", "questions"},
    {"generate", "merge_command", "preview", "state", "tracking", "validation", "view"},
    {"generate_command", "trainer", "view_page"},
    {"summary"},
    {"resume"},
    {"journal"},
    {"bench", "evaluate", "train"},
    {"checks"},
    {"verify"},
    {"cli"},
]
GROUPS = {"after", "cpu", "forecasts", "previews", "training"}  # their files have layers of their own
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LIGHT = (
    "errors config gpus stack cli evaluate hardware terminal verify train training.prepare previews.view_page".split()
)
LIGHT += ["after.generate_command", "after.merge_command"]
HEAVY = {"torch", "transformers", "unsloth", "trl", "peft", "datasets", "matplotlib", "jinja2", "lm_eval"}


def imports(path: Path) -> set[str]:
    """Dotted names a file imports anywhere, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    """The name in LAYERS: of a file in a group its own, in another package that of the package."""
    first, *rest = path.relative_to(PACKAGE).parts
    return (rest[0] if first in GROUPS else first).removesuffix(".py")


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if module_of(path) != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path: Path) -> None:
    own = module_of(path)
    for name in imports(path):
        parts = [part for part in name.split(".") if part not in GROUPS]
        if path.name == "probe.py" and name == "fasttune.cli":
            continue  # a program of its own: it watches the real command from inside
        if parts[0] == "fasttune" and len(parts) > 1 and parts[1] in LEVEL and parts[1] != own:
            assert LEVEL[parts[1]] < LEVEL[own], f"{own} imports {name}"


def test_every_module_has_its_layer() -> None:
    assert {module_of(path) for path in FILES} == set(LEVEL)


def test_model_is_the_only_door_to_unsloth() -> None:
    for path in FILES:
        if module_of(path) != "model":
            assert not any(name.split(".")[0] == "unsloth" for name in imports(path)), path


def test_unsloth_comes_before_what_it_patches() -> None:
    lines = (PACKAGE / "model.py").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("from unsloth import"))
    for name in ("torch", "transformers", "trl", "peft"):
        assert not any(line.startswith((f"import {name}", f"from {name}")) for line in lines[:first])


@pytest.mark.parametrize("module", LIGHT)
def test_nothing_heavy_is_imported(module: str) -> None:
    code = f"import sys, fasttune.{module}; print(*{HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_huge_pages_are_asked_for_before_torch_allocates() -> None:
    """torch reads the switch once: it must stand in the environment before anything imports torch."""
    text = (PACKAGE / "model.py").read_text()
    assert 0 < text.index("memory.ask_for_huge_pages()") < text.index("from unsloth import")
