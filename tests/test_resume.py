"""Which checkpoint a run is resumed from, which run is refused, and that what is damaged is skipped and said."""

import hashlib
import json
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_run import STEPS, break_off_after, half_written, learned, losses, run, settings, whole_and_copy

from fasttune.core import checkpoint, resume, run_folder
from fasttune.errors import ModelError, OutputError

pytestmark = pytest.mark.usefixtures("unsloth")

Split = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def whole(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted; beside it, as `copy`, as it was after step 5."""
    return whole_and_copy(tmp_path_factory.mktemp("whole") / "run", 5)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A run that was killed after step 5, with checkpoints of steps 2 and 4."""
    return Path(shutil.copytree(whole.with_name("copy"), tmp_path / "run"))


@pytest.fixture(scope="module", params=["pissa", "olora"])
def split(request: pytest.FixtureRequest, unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """As `whole`, of a run (settings.RESIDUAL) with split base weights; its copy is of step 3."""
    changes = {"lora": {"init": request.param}}
    return whole_and_copy(tmp_path_factory.mktemp(request.param) / "run", 3, changes), changes


def test_a_run_is_resumed_more_than_once(copy: Path, whole: Path) -> None:
    """Its time is that of all its processes."""
    second = run(copy, resume=True, after=break_off_after(7))
    assert (second.status, second.steps) == ("failed", 7) and "--resume" in (second.resume_command or "")
    third = run(copy, resume=True)
    assert (third.status, third.resumed_from_step) == ("completed", 6) and third.wall_s > second.wall_s / 2
    assert (losses(copy), learned(copy)) == (losses(whole), learned(whole))


def test_a_split_run_resumes_where_the_svd_comes_out_otherwise(
    tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another card or by another driver: what it began with is kept, and splits the base weights again."""
    import torch

    whole, changes = split
    folder = Path(shutil.copytree(whole.with_name("copy"), tmp_path / "run"))
    assert (folder / "checkpoints" / checkpoint.START).is_file()
    svd, qr = torch.linalg.svd, torch.linalg.qr

    def otherwise(*arguments: Any, **keywords: Any) -> Any:
        u, s, v = svd(*arguments, **keywords)
        return -u, s * (1 + 1e-6), -v

    monkeypatch.setattr(torch.linalg, "svd", otherwise)
    monkeypatch.setattr(torch.linalg, "qr", lambda *arguments: [-each for each in qr(*arguments)])
    assert run(folder, changes, resume=True).resumed_from_step == 2
    assert learned(folder) == learned(whole) and learned(folder)
    assert not (folder / "checkpoints" / checkpoint.START).exists()


def test_without_its_start_or_with_another_a_split_run_is_refused(tmp_path: Path, split: Split) -> None:
    import safetensors.torch

    whole, changes = split
    folder = Path(shutil.copytree(whole.with_name("copy"), tmp_path / "run"))
    start = folder / "checkpoints" / checkpoint.START
    tensors = safetensors.torch.load_file(start)
    safetensors.torch.save_file({name: tensor * (1 + 1e-6) for name, tensor in tensors.items()}, start)
    with pytest.raises(OutputError, match="start of the adapter was [0-9a-f]{8}, is"):
        run(folder, changes, resume=True)
    start.write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"start\.safetensors does not hold"):
        run(folder, changes, resume=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: flip(path / "weights.safetensors"), "weights.safetensors was changed after it was written"),
        (lambda path: flip(path / "state.json"), "state.json was changed after it was written"),
        (lambda path: os.truncate(path / "optimizer.safetensors", 100), "optimizer.safetensors has 100 bytes, not "),
        (lambda path: (path / "random.safetensors").unlink(), "random.safetensors is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("{}"), "state.json is not in manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"../x": {}}'), "manifest.json names a file outside"),
    ],
)
def test_a_checkpoint_that_does_not_hold_is_skipped(copy: Path, damage: Any, told: str) -> None:
    damage(copy / "checkpoints" / "step-4")
    found, skipped = resume.newest(copy)
    assert found is not None and found.state["step"] == 2
    assert len(skipped) == 1 and f"step-4: {told}" in skipped[0]


def test_a_pipe_in_place_of_a_file_is_skipped(copy: Path) -> None:
    for name in ("random.safetensors", "manifest.json"):
        path = copy / "checkpoints" / "step-4" / name
        path.unlink()
        os.mkfifo(path)
        assert resume.newest(copy)[1] == [f"step-4: {name} is a link or a pipe, not a file of the checkpoint"]


def forge(path: Path, name: str, content: bytes) -> None:
    """Another content, and a manifest that says so."""
    (path / name).write_bytes(content)
    files = json.loads((path / "manifest.json").read_text())
    files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(files))


def test_what_does_not_fit_the_run_is_skipped(copy: Path, whole: Path) -> None:
    """Whole by its manifest; copied into the parameters all the same, a row would fill every matrix."""
    import safetensors.torch

    path = copy / "checkpoints" / "step-4"
    weights = safetensors.torch.load_file(path / "weights.safetensors")
    name = min(weights)
    forge(path, "weights.safetensors", safetensors.torch.save(weights | {name: weights[name][:1].clone()}))
    result = run(copy, resume=True)
    assert result.status == "completed" and result.resumed_from_step == 2
    assert any(f"skipped step-4: weights.safetensors: {name} is float32 1×" in text for text in result.told)
    assert learned(copy) == learned(whole)
    assert resume.newest(copy)[1] == [], "the one that did not hold was written again, or is gone"


def test_moments_of_other_shapes_end_the_run_in_one_line(copy: Path) -> None:
    import safetensors.torch

    path = copy / "checkpoints" / "step-4"
    moments = safetensors.torch.load_file(path / "optimizer.safetensors")
    forge(path, "optimizer.safetensors", safetensors.torch.save({k: v.flatten()[:1] for k, v in moments.items()}))
    result = run(copy, resume=True)
    assert result.status == "failed" and not (copy / "adapter").exists()
    assert "step-4 cannot be resumed from (ValueError: " in result.error and "remove it" in result.error


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("wall_s"), "state.json: wall_s: "),
        (lambda state: state["random"].pop("numpy"), "state.json: random.numpy: "),
        (lambda state: state.update(optimizer=[]), "state.json: optimizer: "),
        (lambda state: state.update(held_out={"best": {"step": 1}}), "state.json: held_out.best.loss: "),
        (lambda state: state.update(step=2), "state.json is that of step 2"),
    ],
)
def test_a_state_with_missing_fields_is_skipped(copy: Path, change: Any, told: str) -> None:

    path = copy / "checkpoints" / "step-4"
    values = json.loads((path / "state.json").read_text())
    change(values)
    forge(path, "state.json", json.dumps(values).encode())
    assert (resume.misfit(resume.read(path), None) or "").startswith(told)


def test_a_checkpoint_killed_while_it_is_removed_is_none(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, **_: Any) -> None:
        (path / "weights.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        checkpoint.prune(copy, 1)
    assert [step for step, _ in checkpoint.steps(copy)] == [4] and half_written(copy)
    checkpoint.sweep(copy)
    assert not half_written(copy)


def test_steps_whose_lines_are_damaged_are_said(copy: Path, whole: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    lines[1], lines[2] = lines[1][:40], lines[2].replace('"tokens": ', '"tokens": null, "was": ', 1)
    (copy / "metrics.jsonl").write_text("\n".join(lines))
    result = run(copy, resume=True)
    assert (result.status, result.steps, learned(copy)) == ("completed", STEPS, learned(whole))
    assert losses(copy) == [loss for i, loss in enumerate(losses(whole)) if i not in (1, 2)]
    (warning,) = result.warnings
    assert warning.startswith("metrics.jsonl: the lines of 2 of the 4 steps before the checkpoint cannot be read")


def test_nothing_is_looked_at_before_the_folder_is_held(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that resume: the second one must not see a state which the first one is about to change."""
    from fasttune.core import train

    def prepare(*_: Any) -> None:
        raise AssertionError("prepared a run that another process is finishing")

    monkeypatch.setattr(train, "prepare", prepare)
    with run_folder.hold(copy), pytest.raises(OutputError, match="is in use by process"):
        run(copy, resume=True)
    (copy / "run.json").write_text('{"status": "completed"}')
    with pytest.raises(OutputError, match="is completed, nothing is left to do"):
        run(copy, resume=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"learning_rate": 5e-3}}, "train.learning_rate was 0.01, is 0.005"),
        ({"train": {"max_steps": 20}}, "steps of the whole run was 8, is 20"),
        ({"data": {"max_rows": 23}}, "rows of data set 1 was 24 rows × 1"),
        ({"lora": {"rank": 8}}, "lora.rank was 4, is 8"),
    ],
)
def test_another_run_is_refused_by_name(copy: Path, changes: dict[str, Any], told: str) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(OutputError) as caught:
        run(copy, changes, resume=True)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_base_model_that_changed_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fasttune.core import model as models

    load = models.load

    def changed(*arguments: Any) -> Any:
        model, tokenizer = load(*arguments)
        with torch.no_grad():
            model.get_input_embeddings().weight[0, 0] += 1e-3
        return model, tokenizer

    monkeypatch.setattr(models, "load", changed)
    with pytest.raises(OutputError, match="weights of the base model was .*, is "):
        run(copy, resume=True)


def test_another_micro_batch_may_resume_a_run_which_keeps_no_second_copy_of_its_weights(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune.core import resume

    find, held = resume.find, []
    seen: list[tuple[set[str], int]] = []

    def watched(*arguments: Any) -> Any:
        found = find(*arguments)
        held.extend([found, *map(weakref.ref, found.tensors["weights"].values())])
        return found

    def after(step: int) -> None:
        seen.append((set(held[0].tensors), sum(ref() is not None for ref in held[1:])))

    monkeypatch.setattr(resume, "find", watched)
    result = run(copy, {"train": {"micro_batch_rows": 2}}, resume=True, after=after)
    assert (result.status, result.resumed_from_step) == ("completed", 4)
    assert len(held) > 1 and seen == [({"random"}, 0)] * (STEPS - 4)
    before = learned(copy)
    with pytest.raises(OutputError, match="is completed, nothing is left to do"):
        run(copy, resume=True)
    assert learned(copy) == before


def test_when_none_holds_the_run_does_not_begin_anew_by_itself(copy: Path) -> None:
    for _, path in checkpoint.steps(copy):
        flip(path / "weights.safetensors")
    with pytest.raises(OutputError, match=r"no checkpoint of .* holds \(step-4: .*; step-2: .*overwrite=true"):
        run(copy, resume=True)


def test_resuming_what_has_no_checkpoint_begins_with_step_1(tmp_path: Path) -> None:
    result = run(tmp_path / "run", {"train": {"max_steps": 1}}, resume=True)
    assert (result.status, result.resumed_from_step) == ("completed", None)
    assert any("no checkpoint yet: beginning with step 1" in text for text in result.told)


def test_the_folder_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named, unnamed = settings(tmp_path / "mine"), settings(tmp_path / "mine").model_copy(update={"output_dir": None})
    assert resume.to_resume(named, "") == tmp_path / "mine"
    with pytest.raises(OutputError, match="no runs/tiny-DATE has a checkpoint"):
        resume.to_resume(unnamed, "")
    for name in ("tiny-20260101-000000", "tiny-20260102-000000", "tiny-20260103-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("20260101-000000", "20260102-000000", "20260102-000000-2", "b-20270101-000000", "b-9"):
        (tmp_path / "runs" / f"tiny-{name}" / "checkpoints").mkdir(parents=True)
    assert resume.to_resume(unnamed, "") == Path("runs/tiny-20260102-000000-2"), "tiny-b is another name"
    assert resume.to_resume(unnamed, "runs/tiny-20260101-000000") == Path("runs/tiny-20260101-000000")
    (tmp_path / "runs" / "tiny-21260101-000000" / "checkpoints").mkdir(parents=True)
    with pytest.raises(OutputError, match="tiny-21260101-000000 is dated in the future"):
        resume.to_resume(unnamed, "")
    assert resume.to_resume(unnamed, "runs/tiny-20260101-000000") == Path("runs/tiny-20260101-000000")
    with pytest.raises(OutputError, match="leave output_dir="):
        resume.to_resume(named, "runs/tiny-20260101-000000")
    with pytest.raises(OutputError, match="no such folder"):
        resume.to_resume(unnamed, "runs/other")


def test_max_hours_saves_and_says_how_to_resume(tmp_path: Path, whole: Path) -> None:
    result = run(tmp_path / "run", {"checkpoint": {"every": "never", "max_hours": 1e-9}})
    assert (result.status, result.steps, result.error) == ("interrupted", 1, "stopped by checkpoint.max_hours")
    assert result.resume_command == f"fasttune train {tmp_path}/run/config.yaml --resume {tmp_path}/run"
    assert run(tmp_path / "run", resume=True).status == "completed"
    assert learned(tmp_path / "run") == learned(whole)
