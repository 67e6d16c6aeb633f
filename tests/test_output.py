"""The output folder is refused before anything is written, or taken whole."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fasttune import config
from fasttune.errors import OutputError
from fasttune.training import output


def settings(folder: Path | None, overwrite: bool = False) -> config.Config:
    tree = {"model": {"name": "builtin:tiny"}, "data": {"train": "builtin:arithmetic"}, "overwrite": overwrite}
    return config.parse({**tree, "output_dir": str(folder) if folder else None})


def test_the_default_is_named_by_run_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = output.choose(settings(None))
    assert folder.parent == Path("runs") and folder.name.startswith("run-20")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    for name in ("run.json", *output.EVAL_FILES):
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds a run.*overwrite=true"):
        output.choose(settings(tmp_path))
    output.create(output.choose(settings(tmp_path, overwrite=True))).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.LOCK, "notes.txt"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(OutputError, match="is a file"):
        output.choose(settings(tmp_path / "x"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="not writable"):
        output.choose(settings(tmp_path / "x"))


def test_too_little_disk_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    output.check_space(tmp_path / "new" / "run", 0.5)
    with pytest.raises(OutputError, match=r"^output_dir: .* 1\.00 GiB free, 16\.10 GiB are needed"):
        output.check_space(tmp_path / "new" / "run", 16)
    with pytest.raises(OutputError, match="^--out: the disk of "):
        output.check_space(tmp_path, 1, "--out")
