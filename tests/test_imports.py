"""The house: three layers, one door to unsloth, nothing heavy where answers must be quick."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path("fasttune")
BASE = 0  # the modules beside cli.py
LEVEL = {"data": 1, "cpu": 1, "core": 2, "bench": 3, "tools": 3, "verify": 3, "cli": 4, "api": 4}
LIGHT = "errors config gpus stack cli api tools.evaluate hardware terminal verify.main core.train core.prepare".split()
LIGHT += ["report", "tools.compare", "tools.inspect_data", "tools.generate", "tools.merge"]
HEAVY = {"torch", "transformers", "unsloth", "trl", "peft", "datasets", "matplotlib", "jinja2", "lm_eval"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"}


def named(node: ast.AST) -> set[str]:
    """Dotted names that a statement imports, `from a import b` as a.b."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """All that a file imports; `everywhere`: inside of functions too."""
    tree = ast.parse(path.read_text())
    return {name for node in (ast.walk(tree) if everywhere else tree.body) for name in named(node)}


def ours(path: Path, everywhere: bool = True) -> set[str]:
    """The modules of ours that a file imports, without `fasttune.`."""
    names = {name.removeprefix("fasttune.") for name in imports(path, everywhere) if name.startswith("fasttune.")}
    return {name if name in FILES else name.rpartition(".")[0] for name in names} & set(FILES)


def level(name: str) -> int:
    return LEVEL.get(name.split(".")[0], BASE)


def test_imports_point_downwards() -> None:
    """cli and api → bench, tools, verify, none of which imports another → core → data, cpu → base."""
    upwards = []
    for name, path in FILES.items():
        for other in ours(path):
            apart = other.split(".")[0] != name.split(".")[0]
            if level(other) > level(name) or (level(other) == level(name) != BASE and apart):
                upwards.append(f"{name} imports {other}")
    assert upwards == []


def test_no_import_goes_in_a_circle() -> None:
    TopologicalSorter({name: ours(path, everywhere=False) - {name} for name, path in FILES.items()}).prepare()


def test_model_is_the_only_door_to_unsloth() -> None:
    for name, path in FILES.items():
        if name != "core.model":
            assert not any(imported.split(".")[0] == "unsloth" for imported in imports(path)), path


def test_unsloth_comes_before_what_it_patches() -> None:
    """A file that imports what is patched at its top has imported core.model, or what imports it, above it."""
    doors = {"fasttune.core.model", "unsloth.FastLanguageModel"}
    for _ in range(3):
        doors |= {f"fasttune.{name}" for name, path in FILES.items() if imports(path, everywhere=False) & doors}
    for name, path in FILES.items():
        seen: set[str] = set()
        for node in ast.parse(path.read_text()).body:
            heavy = {found.split(".")[0] for found in named(node)} & {"transformers", "trl", "peft", "lm_eval"}
            assert not heavy or seen & doors, f"{name} imports {heavy} before unsloth"
            seen |= named(node)


def test_nothing_heavy_is_imported() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("fasttune." + name)
    assert not {HEAVY} & set(sys.modules), (name, {HEAVY} & set(sys.modules))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_huge_pages_are_asked_for_before_torch_is_imported() -> None:
    """torch reads the switch once."""
    code = """
import importlib.abc, os, sys
class Looks(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("THP_MEM_ALLOC_ENABLE"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Looks())
import fasttune.core.model
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
