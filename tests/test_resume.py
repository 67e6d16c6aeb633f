"""Nothing lost: a run that was ended anywhere goes on to the very bits of one that was not."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fasttune import checkpoint, config, output
from fasttune.errors import OutputError

pytestmark = pytest.mark.usefixtures("unsloth")

STEPS = 8
TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "builtin:tiny", "max_length": 256},
    "data": {"train": "builtin:arithmetic", "max_rows": 24},  # 3 steps an epoch
    "lora": {"rank": 4, "alpha": 8},
    "train": {"batch_rows": 8, "max_steps": STEPS, "learning_rate": 1e-2},
    "checkpoint": {"every": "2 steps"},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "padded, two at once": {"train": {"packing": False, "micro_batch_rows": 2}},
    "dropout": {"lora": {"dropout": 0.1}},
    "pissa": {"lora": {"init": "pissa"}},
    "full": {"train": {"method": "full", "learning_rate": 1e-3}},
    "weighted data sets": {"data": {"train": {"builtin:arithmetic": 0.7}}},
}


class Reporter:
    """Remembers what it is told, and does something after a step."""

    def __init__(self, after: Callable[[int], None] = lambda step: None) -> None:
        self.told: list[str] = []
        self.after = after

    def note(self, text: str) -> None:
        self.told.append(text)

    warn = note

    def step(self, step: Any) -> None:
        self.after(step.step)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keywords: None


def settings(folder: Path, changes: dict[str, Any] | None = None) -> config.Config:
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TREE.items()}
    for section, values in (changes or {}).items():
        tree[section] = tree[section] | values
    if tree["train"].get("method") == "full":
        del tree["lora"]
    return config.parse(tree | {"output_dir": str(folder)})


def run(folder: Path, changes: dict[str, Any] | None = None, resume: bool = False, **reporter: Any) -> Any:
    from fasttune import train

    told = Reporter(**reporter)
    result = train.run(settings(folder, changes), told, folder if resume else None)
    result.told = told.told
    return result


def break_off_after(step: int) -> Callable[[int], None]:
    def end(now: int) -> None:
        if now == step:
            raise RuntimeError("the machine is gone")

    return end


def learned(folder: Path) -> dict[str, bytes]:
    """The bytes of what the run saved."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_bit_identical(tmp_path: Path, kind: str) -> None:
    """Broken off in the second epoch, two steps after a checkpoint; then once more in the third."""
    whole = run(tmp_path / "whole", KINDS[kind] | {"checkpoint": {"every": "never"}})
    assert whole.status == "completed" and whole.resumed_from_step is None
    assert not (tmp_path / "whole" / "checkpoints").exists()
    folder = tmp_path / "run"
    first = run(folder, KINDS[kind], after=break_off_after(5))
    assert (first.status, first.steps) == ("failed", 5) and "--resume" in (first.resume_command or "")
    second = run(folder, KINDS[kind], resume=True, after=break_off_after(7))
    assert second.resumed_from_step == 4 and f"going on from {folder}/checkpoints/step-4, step 4" in second.told
    third = run(folder, KINDS[kind], resume=True)
    assert (third.status, third.steps, third.resumed_from_step, third.resume_command) == ("completed", STEPS, 6, None)
    assert third.wall_s > second.wall_s / 2
    assert losses(folder) == losses(tmp_path / "whole")
    assert learned(folder) == learned(tmp_path / "whole") and learned(folder)
    assert [step for step, _ in checkpoint.steps(folder)] == [6, 4]


def test_without_the_random_states_dropout_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail."""
    from fasttune import resume

    run(tmp_path / "whole", KINDS["dropout"])
    run(tmp_path / "run", KINDS["dropout"], after=break_off_after(5))
    monkeypatch.setattr(resume, "restore_random", lambda checkpoint: None)
    run(tmp_path / "run", KINDS["dropout"], resume=True)
    assert losses(tmp_path / "run")[:4] == losses(tmp_path / "whole")[:4]
    assert losses(tmp_path / "run") != losses(tmp_path / "whole")


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
def test_a_checkpoint_that_does_not_hold_is_passed_over(copy: Path, damage: Any, told: str) -> None:
    damage(copy / "checkpoints" / "step-4")
    found, passed_over = checkpoint.newest(copy)
    assert found is not None and found.state["step"] == 2
    assert len(passed_over) == 1 and f"step-4: {told}" in passed_over[0]


def test_a_run_goes_on_from_the_one_before_it(copy: Path, tmp_path: Path) -> None:
    run(tmp_path / "whole")
    flip(copy / "checkpoints" / "step-4" / "weights.safetensors")
    result = run(copy, resume=True)
    assert result.resumed_from_step == 2 and any("passed over step-4: weights" in text for text in result.told)
    assert learned(copy) == learned(tmp_path / "whole")
    assert checkpoint.newest(copy)[1] == [], "the one that did not hold was written again, or is gone"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train": {"learning_rate": 5e-3}}, "train.learning_rate was 0.01, is 0.005"),
        ({"train": {"batch_rows": 4}}, "train.batch_rows was 8, is 4"),
        ({"train": {"max_steps": 20}}, "steps of the whole run was 8, is 20"),
        ({"data": {"max_rows": 23}}, "rows of data set 1 was 24 rows × 1"),
        ({"lora": {"rank": 8}}, "lora.rank was 4, is 8"),
        ({"model": {"max_length": 128}}, "model.max_length was 256, is 128"),
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

    from fasttune import model as models

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


def test_an_output_folder_that_is_removed_is_made_again(tmp_path: Path) -> None:
    def after(step: int) -> None:
        if step == 5:
            shutil.rmtree(tmp_path / "run")

    result = run(tmp_path / "run", after=after)
    assert result.status == "completed" and result.steps == len(losses(tmp_path / "run")) == STEPS
    assert any("was removed while the run wrote into it" in text for text in result.warnings)
    assert learned(tmp_path / "run") and (tmp_path / "run" / "run.json").is_file()


def test_the_folder_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named, unnamed = settings(tmp_path / "mine"), settings(tmp_path / "mine").model_copy(update={"output_dir": None})
    assert output.to_resume(named, "") == tmp_path / "mine"
    with pytest.raises(OutputError, match="no runs/tiny-\\* has a checkpoint"):
        output.to_resume(unnamed, "")
    for name in ("tiny-20260101-000000", "tiny-20260102-000000", "tiny-20260103-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for name in ("tiny-20260101-000000", "tiny-20260102-000000"):
        (tmp_path / "runs" / name / "checkpoints").mkdir()
    assert output.to_resume(unnamed, "") == Path("runs/tiny-20260102-000000")
    assert output.to_resume(unnamed, "runs/tiny-20260101-000000") == Path("runs/tiny-20260101-000000")
    with pytest.raises(OutputError, match="leave output_dir="):
        output.to_resume(named, "runs/tiny-20260101-000000")
    with pytest.raises(OutputError, match="no such folder"):
        output.to_resume(unnamed, "runs/other")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: reached in the weights, and gone again later."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def after(step: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if step == 4 else soft, hard))

    try:
        result = run(tmp_path / "run", after=after)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == "completed"
    (warning,) = result.warnings
    assert warning.startswith("step 4: no checkpoint could be written (") and "step-2 is the last good one" in warning
    assert [step for step, _ in checkpoint.steps(tmp_path / "run")] == [6, 2]
    assert all(checkpoint.broken(path) is None for _, path in checkpoint.steps(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "nothing half-written is left"


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with output.create(tmp_path / "run"), pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
        output.create(tmp_path / "run")
    output.create(tmp_path / "run").close()  # free again


def test_max_hours_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    result = run(tmp_path / "run", {"checkpoint": {"every": "never", "max_hours": 1e-9}})
    assert (result.status, result.steps, result.error) == ("interrupted", 1, "stopped by checkpoint.max_hours")
    assert result.resume_command == f"fasttune train {tmp_path}/run/config.yaml --resume {tmp_path}/run"
    assert run(tmp_path / "run", resume=True).status == "completed"
    assert learned(tmp_path / "run") == learned(tmp_path / "whole")


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fasttune import state, trainer as trainers

    weights: dict[int, dict[str, Any]] = {}
    step_of = trainers.MeasuredTrainer.training_step

    def poisoned(self: Any, model: Any, inputs: Any, learned: Any = None) -> Any:
        loss = step_of(self, model, inputs, learned)
        weights[self.state.global_step] = {name: p.detach().clone() for name, p in state.trained(model).items()}
        if self.state.global_step == 3:
            next(iter(state.trained(model).values())).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(trainers.MeasuredTrainer, "training_step", poisoned)
    result = run(tmp_path / "run")
    assert result.status == "completed"
    (warning,) = result.warnings
    assert "step 4 was not applied: a gradient that is not finite; it had rows " in warning
    assert warning.endswith(" of builtin:arithmetic")
    for name, before in weights[3].items():
        assert torch.equal(weights[4][name], before), name
        assert not torch.equal(weights[3][name], weights[2][name]), name


def test_too_many_of_them_end_the_run(tmp_path: Path) -> None:
    changes = {"train": {"learning_rate": 1e30, "max_grad_norm": 1e30, "max_bad_steps": 2}}
    result = run(tmp_path / "run", changes)
    assert result.status == "failed" and result.steps < STEPS
    assert "3 steps in a row could not be applied" in (result.error or "") and "of builtin:arithmetic" in result.error
    assert not (tmp_path / "run" / "adapter").exists()


KILLS = 50
VICTIM = """
import json, os, sys
os.environ["OMP_NUM_THREADS"] = "1"  # no thread pool: this process forks
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # unsloth greets
sys.path.insert(0, sys.argv[2])
from test_resume import run, TREE
from pathlib import Path
import fasttune.train, fasttune.model, fasttune.trainer, fasttune.resume
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
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2, 3))])
def test_fifty_kills_lose_nothing(tmp_path: Path, seed: int) -> None:
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
        while kills < KILLS:
            before = written(folder)
            saving = (lambda: bool(half_written(folder)), rng.uniform(0, 0.01))
            running = (lambda before=before: written(folder) not in (before, None), rng.uniform(0, 0.4))
            ended = attempt("run", kills > 0, saving if kills % 2 else running)
            if ended != signal.SIGKILL:
                break
            kills += 1
            torn += len(half_written(folder))
            for _, path in checkpoint.steps(folder):
                assert checkpoint.broken(path) is None, "a torn checkpoint has the name of a whole one"
        assert attempt("run", True, None) == 0
        nursery.stdin.close()
    assert kills == KILLS and torn >= 5, f"{kills} kills, {torn} of them while a checkpoint was being written"
    assert losses(folder) == losses(tmp_path / "whole")
    assert learned(folder) == learned(tmp_path / "whole")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine on which a micro-batch of more than so many rows does not fit."""
    import torch

    from fasttune import live, trainer as trainers

    micro_step = trainers.MeasuredTrainer._micro_step

    def fits(rows: int) -> None:
        def limited(self: Any, model: Any, batch: Any, learned: Any) -> Any:
            loss = micro_step(self, model, batch, learned)  # half of the gradients are there when memory runs out
            if live.rows_of(batch) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss

        monkeypatch.setattr(trainers.MeasuredTrainer, "_micro_step", limited)

    return fits


@pytest.mark.parametrize("packing", [True, False])
def test_out_of_memory_halves_what_is_computed_at_once(tmp_path: Path, little_memory: Any, packing: bool) -> None:
    changes = {"train": {"packing": packing}}
    run(tmp_path / "whole", changes)
    little_memory(7)
    result = run(tmp_path / "run", changes)
    assert result.status == "completed"
    (warning,) = result.warnings
    assert warning.startswith("out of memory at step 1: from here on ") and "the batch stays 8 rows" in warning
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_what_cannot_be_halved_names_the_settings_in_order(tmp_path: Path, little_memory: Any) -> None:
    little_memory(0)
    result = run(tmp_path / "run")
    assert result.status == "failed" and result.steps == 0
    assert (result.error or "").startswith(
        "out of memory with the fewest rows at once; try, in this order: train.gradient_checkpointing=unsloth; "
        "model.max_length below 256; model.quantization=nf4; a lower lora.rank"
    )
