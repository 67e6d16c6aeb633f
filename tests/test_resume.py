"""Nothing lost: a run that was ended anywhere goes on to the very bits of one that was not."""

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_run import STEPS, break_off_after, learned, losses, run, settings

from fasttune.core import checkpoint, resume, run_folder
from fasttune.errors import ModelError, OutputError

pytestmark = pytest.mark.usefixtures("unsloth")

BF16 = {"dtype": "bfloat16"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "padded, two at once": {"train": {"packing": False, "micro_batch_rows": 2}},
    "dropout": {"lora": {"dropout": 0.1}},
    "pissa": {"lora": {"init": "pissa"}},
    "full": {"train": {"method": "full", "learning_rate": 1e-3}},
    "full, fp32 weights": {"model": BF16, "train": {"method": "full", "learning_rate": 1e-3}},
    "full, rounded by chance": {
        "model": BF16,
        "train": {"method": "full", "learning_rate": 1e-3, "optimizer": "adamw_8bit"},
    },
    "weighted data sets": {"data": {"train": {"builtin:arithmetic": 0.7}}},
}


@pytest.fixture(scope="module")
def whole(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run of a kind that nothing interrupted: made once."""

    @functools.cache
    def of(kind: str = "lora") -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        result = run(folder, KINDS[kind] | {"checkpoint": {"every": "never"}})
        assert result.status == "completed" and result.resumed_from_step is None
        assert not (folder / "checkpoints").exists()
        return folder

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_bit_identical(tmp_path: Path, whole: Any, kind: str) -> None:
    """Broken off in the second epoch, a step after a checkpoint."""
    folder = tmp_path / "run"
    first = run(folder, KINDS[kind], after=break_off_after(5))
    assert (first.status, first.steps) == ("failed", 5) and "--resume" in (first.resume_command or "")
    second = run(folder, KINDS[kind], resume=True)
    assert (second.status, second.steps, second.resumed_from_step, second.resume_command) == (
        "completed",
        STEPS,
        4,
        None,
    )
    assert f"resuming from {folder}/checkpoints/step-4, step 4" in second.told
    assert losses(folder) == losses(whole(kind))
    assert learned(folder) == learned(whole(kind)) and learned(folder)
    assert [step for step, _ in checkpoint.steps(folder)] == [6, 4]


def test_a_run_is_resumed_more_than_once(copy: Path, whole: Any) -> None:
    """Its time is that of all its processes."""
    second = run(copy, resume=True, after=break_off_after(7))
    third = run(copy, resume=True)
    assert (third.status, third.resumed_from_step) == ("completed", 6) and third.wall_s > second.wall_s / 2
    assert (losses(copy), learned(copy)) == (losses(whole()), learned(whole()))


def test_a_pissa_run_resumes_where_the_svd_comes_out_otherwise(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another card or by another driver: what it began with is kept, and splits the base weights again."""
    import torch

    unbroken = whole("pissa")
    run(tmp_path / "run", KINDS["pissa"], after=break_off_after(3))
    assert (tmp_path / "run" / "checkpoints" / checkpoint.START).is_file()
    svd = torch.linalg.svd

    def otherwise(*arguments: Any, **keywords: Any) -> Any:
        u, s, v = svd(*arguments, **keywords)
        return -u, s * (1 + 1e-6), -v

    monkeypatch.setattr(torch.linalg, "svd", otherwise)
    assert run(tmp_path / "run", KINDS["pissa"], resume=True).resumed_from_step == 2
    assert learned(tmp_path / "run") == learned(unbroken) and learned(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / checkpoint.START).exists()


def test_without_its_start_or_with_another_a_pissa_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    run(tmp_path / "run", KINDS["pissa"], after=break_off_after(3))
    start = tmp_path / "run" / "checkpoints" / checkpoint.START
    tensors = safetensors.torch.load_file(start)
    safetensors.torch.save_file({name: tensor * (1 + 1e-6) for name, tensor in tensors.items()}, start)
    with pytest.raises(OutputError, match="start of the adapter was [0-9a-f]{8}, is"):
        run(tmp_path / "run", KINDS["pissa"], resume=True)
    start.write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"pissa\.safetensors does not hold"):
        run(tmp_path / "run", KINDS["pissa"], resume=True)


def test_without_the_random_states_dropout_would_differ(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail."""
    from fasttune.core import restore

    run(tmp_path / "run", KINDS["dropout"], after=break_off_after(5))
    monkeypatch.setattr(restore, "restore_random", lambda checkpoint: None)
    run(tmp_path / "run", KINDS["dropout"], resume=True)
    assert losses(tmp_path / "run")[:4] == losses(whole("dropout"))[:4]
    assert losses(tmp_path / "run") != losses(whole("dropout"))


@pytest.fixture(scope="module")
def broken_off(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after step 5, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    run(folder, after=break_off_after(5))
    return folder


@pytest.fixture
def copy(broken_off: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", broken_off, tmp_path / "run"], check=True)
    return tmp_path / "run"


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


def test_what_does_not_fit_the_run_is_skipped(copy: Path) -> None:
    """Whole by its manifest; copied into the parameters all the same, a row would fill every matrix."""
    import safetensors.torch

    path = copy / "checkpoints" / "step-4"
    weights = safetensors.torch.load_file(path / "weights.safetensors")
    name = min(weights)
    forge(path, "weights.safetensors", safetensors.torch.save(weights | {name: weights[name][:1].clone()}))
    result = run(copy, resume=True)
    assert result.status == "completed" and result.resumed_from_step == 2
    assert any(f"skipped step-4: weights.safetensors: {name} is float32 1×" in text for text in result.told)


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


def test_steps_whose_lines_are_damaged_are_said(copy: Path, whole: Any) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    lines[1], lines[2] = lines[1][:40], lines[2].replace('"tokens": ', '"tokens": null, "was": ', 1)
    (copy / "metrics.jsonl").write_text("\n".join(lines))
    result = run(copy, resume=True)
    assert (result.status, result.steps, learned(copy)) == ("completed", STEPS, learned(whole()))
    assert losses(copy) == [loss for i, loss in enumerate(losses(whole())) if i not in (1, 2)]
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


class Killed(BaseException):
    """Stands for SIGKILL: nothing in fasttune catches it."""


AT_THE_END: dict[str, Any] = {"train": {"max_steps": 2}, "samples": 1, "data": {"eval": "builtin:arithmetic"}}


@pytest.mark.parametrize(
    ("moment", "every"), [("save", "1 steps"), ("answer", "never"), ("report", "1 steps"), ("card", "never")]
)
def test_killed_after_the_last_step_nothing_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, every: str
) -> None:
    from fasttune import report
    from fasttune.core import evaluation, model
    from fasttune.tools import card

    folder, changes, answer = tmp_path / "run", AT_THE_END | {"checkpoint": {"every": every}}, evaluation.answer

    def killed(*arguments: Any) -> Any:
        if moment == "answer" and not folder.exists():
            return answer(*arguments)  # those before training
        raise Killed

    where: dict[str, tuple[Any, str]] = {"save": (model, "save"), "answer": (evaluation, "answer")}
    where |= {"report": (report, "write_html"), "card": (card, "of_run")}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*where[moment], killed)
        run(folder, changes)
    told, before = json.loads((folder / "run.json").read_text()), learned(folder).get("adapter_model.safetensors")
    assert told["status"] == "running" and "--resume" in told["resume_command"]
    assert (before is None) == (moment == "save")
    result = run(folder, changes, resume=True, after=break_off_after(2))  # no step is done again
    assert (result.status, result.resumed_from_step, len(result.samples)) == ("completed", 2, 1)
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
    assert (folder / "report.html").is_file() and (folder / "adapter" / "README.md").is_file()
    assert learned(folder)["adapter_model.safetensors"] == (before or learned(folder)["adapter_model.safetensors"])
    assert [step for step, _ in checkpoint.steps(folder)] == ([1] if every != "never" else [])
    assert not list(folder.glob(".adapter-*"))


@pytest.mark.parametrize("signals", [1, 2])
def test_signals_after_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int) -> None:
    """The first one leaves the answers out and the run is complete; a second one ends it at once, to be finished."""
    from fasttune import report
    from fasttune.core import model

    def signalled(call: Any) -> Any:
        def called(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return call(*arguments)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(model, "save", signalled(model.save))
        if signals == 2:
            patch.setattr(report, "write_html", signalled(report.write_html))
        result = run(tmp_path / "run", AT_THE_END)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert learned(tmp_path / "run") and told["status"] == result.status
    if signals == 1:
        assert (result.status, result.samples) == ("completed", [])
        assert result.warnings == ["the held-out problems were not answered after training: a signal ended it"]
        return
    assert (result.status, result.error) == ("interrupted", "stopped at once by a second signal")
    assert "--resume" in told["resume_command"]
    again = run(tmp_path / "run", AT_THE_END, resume=True, after=break_off_after(2))
    assert (again.status, again.resumed_from_step, len(again.samples)) == ("completed", 2, 1)


def test_a_run_resumes_from_the_one_before_it(copy: Path, whole: Any) -> None:
    flip(copy / "checkpoints" / "step-4" / "weights.safetensors")
    result = run(copy, resume=True)
    assert result.resumed_from_step == 2 and any("skipped step-4: weights" in text for text in result.told)
    assert learned(copy) == learned(whole())
    assert resume.newest(copy)[1] == [], "the one that did not hold was written again, or is gone"


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


def test_how_a_step_is_computed_may_change(copy: Path) -> None:
    result = run(copy, {"train": {"micro_batch_rows": 2}}, resume=True)
    assert (result.status, result.resumed_from_step) == ("completed", 4)


def test_a_resumed_run_keeps_no_second_copy_of_its_weights(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    find, held = resume.find, []
    seen: list[tuple[set[str], int]] = []

    def watched(*arguments: Any) -> Any:
        found = find(*arguments)
        held.extend([found, *map(weakref.ref, found.tensors["weights"].values())])
        return found

    def after(step: int) -> None:
        seen.append((set(held[0].tensors), sum(ref() is not None for ref in held[1:])))

    monkeypatch.setattr(resume, "find", watched)
    run(copy, resume=True, after=after)
    assert len(held) > 1 and seen == [({"random"}, 0)] * (STEPS - 4)


def test_when_none_holds_the_run_does_not_begin_anew_by_itself(copy: Path) -> None:
    for _, path in checkpoint.steps(copy):
        flip(path / "weights.safetensors")
    with pytest.raises(OutputError, match=r"no checkpoint of .* holds \(step-4: .*; step-2: .*overwrite=true"):
        run(copy, resume=True)


def test_resuming_what_has_no_checkpoint_begins_with_step_1(tmp_path: Path) -> None:
    result = run(tmp_path / "run", {"train": {"max_steps": 1}}, resume=True)
    assert (result.status, result.resumed_from_step) == ("completed", None)
    assert any("no checkpoint yet: beginning with step 1" in text for text in result.told)


def test_a_completed_run_is_left_as_it_is(copy: Path) -> None:
    assert run(copy, resume=True).status == "completed"
    before = learned(copy)
    with pytest.raises(OutputError, match="is completed, nothing is left to do"):
        run(copy, resume=True)
    assert learned(copy) == before


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


def test_max_hours_saves_and_says_how_to_resume(tmp_path: Path, whole: Any) -> None:
    result = run(tmp_path / "run", {"checkpoint": {"every": "never", "max_hours": 1e-9}})
    assert (result.status, result.steps, result.error) == ("interrupted", 1, "stopped by checkpoint.max_hours")
    assert result.resume_command == f"fasttune train {tmp_path}/run/config.yaml --resume {tmp_path}/run"
    assert run(tmp_path / "run", resume=True).status == "completed"
    assert learned(tmp_path / "run") == learned(whole())


VICTIM = """
import json, os, sys
os.environ["OMP_NUM_THREADS"] = "1"  # no thread pool: this process forks
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # unsloth greets
sys.path.insert(0, sys.argv[2])
from tiny_run import run, TREE
from pathlib import Path
import fasttune.core.train, fasttune.core.model, fasttune.core.trainer, fasttune.core.resume
folder = Path(sys.argv[1])
for line in sys.stdin:
    name, resume = line.split()
    child = os.fork()
    if child == 0:
        TREE["checkpoint"] = {"every": "1 steps", "keep": 2}
        TREE["train"] = TREE["train"] | {"max_steps": 200}
        os._exit(0 if run(folder / name, resume=resume == "yes").status == "completed" else 1)
    print(child, file=answers, flush=True)
    print(os.waitpid(child, 0)[1], file=answers, flush=True)
"""


def written(run: Path) -> int | None:
    """When the run's first or a later step was written down last."""
    try:
        return (run / "metrics.jsonl").stat().st_mtime_ns
    except OSError:
        return None


def half_written(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "most"), [(0, 12), *(pytest.param(seed, 50, marks=pytest.mark.nightly) for seed in (1, 2, 3))]
)
def test_kills_lose_nothing(tmp_path: Path, seed: int, most: int) -> None:
    """SIGKILL at seeded random moments of a run that saves after every step; every other one while it is saving."""
    command = [sys.executable, "-c", VICTIM, str(tmp_path), str(Path(__file__).parent)]
    folder, kills, torn, rng = tmp_path / "run", 0, 0, random.Random(seed)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
    ) as nursery:
        assert nursery.stdin and nursery.stdout

        def attempt(name: str, resume: bool, kill_after: tuple[Callable[[], bool], float] | None) -> int:
            nursery.stdin.write(f"{name} {'yes' if resume else 'no'}\n")
            child = int(nursery.stdout.readline())
            if kill_after is not None:
                begun, seconds = kill_after
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline and not begun():
                    time.sleep(0.0005)
                time.sleep(seconds)
                with suppress(ProcessLookupError):  # it was at its end
                    os.kill(child, signal.SIGKILL)
            return int(nursery.stdout.readline())

        assert attempt("whole", False, None) == 0
        while kills < most:
            before = written(folder)
            saving = (lambda: bool(half_written(folder)), rng.uniform(0, 0.01))
            running = (lambda before=before: written(folder) not in (before, None), rng.uniform(0, 0.4))
            ended = attempt("run", kills > 0, saving if kills % 2 else running)
            if ended != signal.SIGKILL:
                break
            kills += 1
            torn += len(half_written(folder))
            for _, path in checkpoint.steps(folder):
                assert resume.broken(path) is None, "a torn checkpoint has the name of a whole one"
        assert attempt("run", True, None) == 0
        nursery.stdin.close()
    assert kills == most and torn >= most / 10, f"{kills} kills, {torn} of them while a checkpoint was being written"
    assert losses(folder) == losses(tmp_path / "whole")
    assert learned(folder) == learned(tmp_path / "whole")
    assert not half_written(folder), "what the killed ones left is swept away"
