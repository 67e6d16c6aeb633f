"""Nothing is written or copied through a link, no pipe is waited for, files are as readable as the umask says, and no
process of ours takes a file of the current folder for a module.
"""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fasttune
from fasttune import child_process, cli, config, report, system
from fasttune.bench.run import Measurements
from fasttune.core import checkpoint, model_files, pretrained, resume, run_folder
from fasttune.data import sources
from fasttune.errors import ConfigError, DataError, ModelError, OutputError
from fasttune.tools import trained_model


def test_a_write_replaces_a_link_and_leaves_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run.json").symlink_to("mine")
    planted = [f".run.json.{os.getpid()}.tmp", ".run.json.tmp", ".run.json"]
    for name in planted:
        (tmp_path / name).symlink_to("mine")
    temporary: list[str] = []
    replace = os.replace
    monkeypatch.setattr(system.os, "replace", lambda a, b: (temporary.append(str(a)), replace(a, b)))
    report.write_text(tmp_path / "run.json", "run")
    report.write_text(tmp_path / "run.json", "again")
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "run.json").read_text() == "again"
    assert not (tmp_path / "run.json").is_symlink() and len(set(temporary)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "run.json", *planted}


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("mode", ["a", "w", "a+"])
def test_no_line_is_written_through_a_link_or_into_a_pipe(tmp_path: Path, kind: str, mode: str) -> None:
    (tmp_path / "mine").write_text("mine")
    place = tmp_path / "library.log"
    place.symlink_to("mine") if kind == "link" else os.mkfifo(place)
    with pytest.raises(OSError, match=f"is a {kind}"):
        system.open_text(place, mode)
    assert (tmp_path / "mine").read_text() == "mine"


def settings(folder: Path) -> config.Config:
    tree = {"model": {"name": "builtin:tiny"}, "data": {"train": "builtin:arithmetic"}, "overwrite": True}
    return config.parse({**tree, "output_dir": str(folder)})


@pytest.mark.parametrize("name", run_folder.WRITTEN)
def test_a_link_in_the_output_folder_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "others")
    for old in (None, tmp_path / "run"):
        with pytest.raises(OutputError, match=f"{name} is a link, and nothing is written through one"):
            run_folder.choose(settings(tmp_path / "run"), old)
    assert not any((tmp_path / "others").iterdir())


def test_no_checkpoint_goes_through_a_link_that_comes_later(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / checkpoint.FOLDER).symlink_to(tmp_path / "others")
    with pytest.raises(OSError, match="is a link"):
        checkpoint.save(tmp_path / "run", 1, {}, {})
    assert not any((tmp_path / "others").iterdir())


@pytest.fixture
def tiny_folder(unsloth: None, tmp_path: Path) -> Path:
    """A copy of builtin:tiny, to be spoiled."""
    return Path(shutil.copytree(pretrained.builtin("builtin:tiny"), tmp_path / "tiny"))


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "generation_config.json", "chat_template.jinja", "model.safetensors", "additional_chat_templates/x"],
)
def test_merge_copies_nothing_that_a_link_of_the_base_leads_to(
    tiny_folder: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    secret, link = tmp_path / "secret", tiny_folder / name
    link.parent.mkdir(exist_ok=True)
    shutil.move(link, secret) if link.exists() else secret.write_text("secret")
    link.symlink_to(secret)
    adapter = Path(shutil.copytree(finished_run / "adapter", tmp_path / "adapter"))
    said = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tiny_folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    assert cli.main(["merge", str(adapter), "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{link} is a link out of its folder" in line and not (tmp_path / "out").exists()


def test_links_inside_a_folder_and_of_the_hubs_cache_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in tiny_folder.iterdir():
        (snapshot / path.name).symlink_to(Path(shutil.copy(path, tmp_path / "models--a--b")))
    (snapshot / "LICENSE").symlink_to("config.json")
    model_files.check_folder(snapshot, weights_too=True)
    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "model.safetensors").symlink_to(snapshot / "model.safetensors")
    model_files.check_folder(tiny_folder)  # weights on another disk: they are read, not copied
    with pytest.raises(ModelError, match=r"model\.safetensors is a link out of its folder"):
        model_files.check_folder(tiny_folder, weights_too=True)


def test_a_linked_adapter_of_a_run_gets_no_card_and_is_not_merged(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fasttune.tools import card

    run, others = Path(shutil.copytree(finished_run, tmp_path / "run")), tmp_path / "others"
    (run / "adapter").rename(others)
    (run / "adapter").symlink_to(others)
    (others / "README.md").write_text("mine")
    card.of_run(run, None)
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "adapter is a link" in capsys.readouterr().err
    assert (others / "README.md").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_pipe_for_an_input_is_refused_and_not_waited_for(
    tiny_folder: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="is a pipe"):
        config.load(pipe)
    with pytest.raises(DataError, match="is a pipe or a device, not a file"):
        sources.check_source(str(pipe))
    with pytest.raises(OutputError, match="is a pipe or a device"):
        os.mkfifo(tmp_path / "measurements.jsonl")
        Measurements(tmp_path, {}, "2026-01-01")
    for folder, name in ((tiny_folder, "tokenizer.json"), (tiny_folder, "model-00002.safetensors")):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(ModelError, match=f"{name} is a pipe or a device, not a file"):
            model_files.check_folder(folder)
        (folder / name).unlink()
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for name in ("metrics.jsonl", "run.json", "eval.json"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    assert resume.read_metrics(run, 3, print) == []
    assert trained_model.open_run(str(run)).result is None
    from fasttune.tools import card

    assert "eval.json cannot be read" in card.text(card.of(trained_model.open_run(str(run))), None)
    for folder in (run / "adapter", Path(shutil.copytree(finished_run / "adapter", tmp_path / "alone"))):
        os.mkfifo(folder / "adapter_model.bin")
        with pytest.raises(ModelError, match="is a pipe or a device"):
            trained_model.open_run(str(folder))
    assert cli.main(["generate", "builtin:tiny", "--file", str(pipe)]) == 2
    assert "is a pipe or a device" in capsys.readouterr().err


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
    command, clean = child_process.command("seen", "--an option"), child_process.environment()
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


@pytest.mark.parametrize("collecting", [True, False])
def test_nothing_is_collected_for_a_while(collecting: bool) -> None:
    """And afterwards as before, also where an import has failed."""
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ImportError), system.no_collections():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
