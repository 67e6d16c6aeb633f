"""The wheel holds all that the package needs, and what is installed from it works away from any checkout."""

import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from fasttune import __version__, config

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("fasttune", "configs", "stacks", "pyproject.toml", "README.md", "LICENSE")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves files beside its sources. Nothing is downloaded."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (made,) = out.glob("fasttune-*.whl")
    return made


def pip(python: str, command: str, *arguments: str) -> None:
    asked = [sys.executable, "-m", "pip", "--python", python, command, "--quiet", "--no-deps", "--no-index", *arguments]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_holds_every_file_of_the_package_and_the_configs(wheel: Path) -> None:
    data = f"fasttune-{__version__}.data/data/share/fasttune/"
    held = {name.removeprefix(data) for name in zipfile.ZipFile(wheel).namelist()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("fasttune", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted - held == set()
    assert {name for name in held - wanted if ".dist-info/" not in name and not name.startswith("stacks/")} == set()
    assert {"fasttune/py.typed", "fasttune/chips.json", "configs/fasttune.schema.json"} <= held


def test_it_says_where_the_project_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as held:
        said = message_from_bytes(held.read(f"fasttune-{__version__}.dist-info/METADATA"))
    assert dict(url.split(", ") for url in said.get_all("Project-URL", [])) == PROJECT["urls"]


def test_the_address_of_the_project_is_that_of_pyproject_everywhere() -> None:
    address = PROJECT["urls"]["Repository"]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    named = {path.name: set(re.findall(r"https?://[\w.-]+/[\w.-]+/fasttune\b", path.read_text())) for path in pages}
    assert {name: found for name, found in named.items() if found - {address}} == {}
    assert named["fasttune_colab.ipynb"] == {address}, "the notebook clones from there"
    assert all(url.startswith(address) for url in PROJECT["urls"].values())


def test_what_is_installed_from_it_writes_a_ready_config(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the libraries of this one."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip(str(python), "install", str(wheel))
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python.with_name("fasttune")), "init", "quickstart"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert config.load(tmp_path / "config.yaml") == config.load(ROOT / "configs" / "quickstart.yaml")
    where = [str(python), "-c", "import fasttune.stack as s; print(s.__file__, s.read_pins('cpu')['torch'])"]
    done = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(packages)) and "+cpu" in done.stdout
