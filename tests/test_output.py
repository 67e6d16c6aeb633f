"""The output folder is refused before anything is written, or taken whole."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fasttune import config
from fasttune.core import run_folder
from fasttune.errors import OutputError


def settings(folder: Path | None, overwrite: bool = False) -> config.Config:
    tree = {"model": {"name": "builtin:tiny"}, "data": {"train": "builtin:arithmetic"}, "overwrite": overwrite}
    return config.parse({**tree, "output_dir": str(folder) if folder else None})


def test_the_default_is_named_by_run_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run_folder.choose(settings(None))
    assert folder.parent == Path("runs") and folder.name.startswith("run-20")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("asked", ["report_to: wandb", "report_to:\n  - trackio\n  - wandb\n  seed: 1"])
def test_a_folder_that_holds_a_run_is_refused_unless_told_otherwise(tmp_path: Path, asked: str) -> None:
    for name in ("run.json", *run_folder.EVAL_FILES):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.yaml").write_text(f"{run_folder.MARK}\ntrain:\n  {asked}\n")
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    theirs = ["checkpoints/mine.txt", "notes.txt", "tensorboard/events"]
    for name in [*theirs, "wandb/run-1", "adapter/adapter_model.safetensors"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="already holds a run.*overwrite=true"):
        run_folder.choose(settings(tmp_path))
    over = settings(tmp_path, overwrite=True)
    run_folder.create(over, run_folder.choose(over))[1].close()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([run_folder.LOCK, "config.yaml", *theirs])


@pytest.mark.parametrize("name", ["report.html", "run.json", "adapter/x", "checkpoints/step-1/x", "config.yaml"])
@pytest.mark.parametrize("how", ["new", "overwrite", "resume"])
def test_what_no_run_of_ours_wrote_is_never_written_over(tmp_path: Path, name: str, how: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("of another trainer")
    with pytest.raises(OutputError, match=f"holds {name.split('/')[0]}, which no run of fasttune wrote"):
        run_folder.choose(settings(tmp_path, how == "overwrite"), tmp_path if how == "resume" else None)
    with pytest.raises(OutputError, match="which no run of fasttune wrote"):
        run_folder.create(settings(tmp_path, how == "overwrite"), tmp_path)
    assert (tmp_path / name).read_text() == "of another trainer"


def test_a_run_that_came_and_went_while_this_one_was_prepared_is_not_replaced(tmp_path: Path) -> None:
    folder = run_folder.choose(settings(tmp_path / "run"))
    folder.mkdir()
    (folder / "config.yaml").write_text(run_folder.MARK)
    with pytest.raises(OutputError, match="already holds a run"):
        run_folder.create(settings(folder), folder)
    run_folder.hold(folder).close()  # and it is held by nobody


def test_two_runs_of_one_second_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = run_folder.choose(settings(None))
    first, second = run_folder.create(settings(None), named), run_folder.create(settings(None), named)
    assert [first[0], second[0]] == [named, named.with_name(f"{named.name}-2")]
    for _, lock in (first, second):
        lock.close()


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    for name in (".adapter-x1/made/a", ".model-x2/b", ".run.json.7.tmp", ".metrics.jsonl", "checkpoints/.step-2-x/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".mine").touch()
    run_folder.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".mine", "checkpoints"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(OutputError, match="is a file"):
        run_folder.choose(settings(tmp_path / "x"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="not writable"):
        run_folder.choose(settings(tmp_path / "x"))


def test_too_little_disk_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    run_folder.check_space(tmp_path / "new" / "run", 0.5)
    with pytest.raises(OutputError, match=r"^output_dir: .* 1\.00 GiB free, 16\.10 GiB are needed"):
        run_folder.check_space(tmp_path / "new" / "run", 16)
    with pytest.raises(OutputError, match="^--out: the disk of "):
        run_folder.check_space(tmp_path, 1, "--out")
