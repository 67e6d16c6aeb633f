"""No process of ours takes a file of the current folder for a module, and each finds what its parent finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fasttune
from fasttune import system

SHADOWED = ("argparse", "dataclasses", "json", "multiprocessing", "pydantic", "rich", "torch", "yaml")
SEEN = """
import json, os, sys
import fasttune, multiprocessing, of_a_wheel
if __name__ == "__main__":
    spawned = multiprocessing.get_context("spawn").Process(target=os.getcwd)
    spawned.start()
    spawned.join()
    print(json.dumps([sys.argv, sys.path, dict(os.environ), fasttune.__file__, spawned.exitcode]))
"""
SPAWNS = """
from fasttune import system
if __name__ == "__main__":
    system.leave_current_folder()
    import multiprocessing, os
    spawned = multiprocessing.get_context("spawn").Process(target=os.getcwd)
    spawned.start()
    spawned.join()
    raise SystemExit(spawned.exitcode)
"""


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A folder whose modules leave a mark beside it when they are imported."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    for name in SHADOWED:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise ImportError('stranger')")
    return folder


def test_verify_imports_nothing_of_the_current_folder(stranger: Path) -> None:
    command = [sys.executable, "-m", "fasttune.verify", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=stranger, check=False)
    assert "checks" in json.loads(done.stdout.splitlines()[-1]), done.stderr
    assert not (stranger.parent / "ran").exists()


def test_a_child_finds_what_its_parent_finds_and_nothing_else(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "seen.py").write_text(SEEN)
    (wheels / "of_a_wheel.py").touch()
    monkeypatch.syspath_prepend(wheels)
    monkeypatch.syspath_prepend(stranger)
    monkeypatch.chdir(stranger)
    monkeypatch.setenv("PYTHONPATH", str(stranger))
    monkeypatch.setenv("PYTHONSTARTUP", "x.py")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    command, clean = system.child_command("seen", "--an option"), system.child_environment()
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    arguments, path, environment, package, spawned = json.loads(done.stdout)
    assert arguments == [str(wheels / "seen.py"), "--an option"]
    assert str(wheels) in path and not {"", ".", str(stranger)} & set(path)
    assert {*os.environ} - {*environment} == {"PYTHONPATH", "PYTHONSTARTUP"}
    assert environment["PYTHONUNBUFFERED"] == "1" and spawned == 0
    assert package == fasttune.__file__ and not (tmp_path / "ran").exists()


def test_the_package_is_found_where_it_alone_is_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(system.HOME)
    monkeypatch.setattr(sys, "path", ["", "/nowhere"])
    assert system.child_path() == ["/nowhere", system.HOME]


def test_what_a_library_starts_leaves_the_current_folder_too(stranger: Path, tmp_path: Path) -> None:
    (tmp_path / "spawns.py").write_text(SPAWNS)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bent = clean | {"PYTHONPATH": f"{stranger}{os.pathsep}{system.HOME}"}
    command = [sys.executable, str(tmp_path / "spawns.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=stranger, env=clean, check=False)
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr
    assert subprocess.run(command, cwd=tmp_path, env=bent, capture_output=True, check=False).returncode == 1


def test_every_process_of_ours_is_started_so() -> None:
    for path in Path("fasttune").rglob("*.py"):
        assert '"-m",' not in path.read_text() or path.name in ("version_rules.py", "stack.py"), path  # those name pip
