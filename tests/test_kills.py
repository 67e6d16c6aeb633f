"""Ended anywhere, by SIGKILL or by signals: nothing is lost, and nothing is trained twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_run import break_off_after, half_written, learned, losses, run

from fasttune.core import checkpoint, resume

pytestmark = pytest.mark.usefixtures("unsloth")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in fasttune catches it."""


@pytest.fixture(autouse=True)
def short_answers(unsloth: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttune.core import evaluation

    monkeypatch.setattr(evaluation, "MOST_NEW_TOKENS", 8)


AT_THE_END: dict[str, Any] = {"train": {"max_steps": 2}, "samples": 1, "data": {"eval": "builtin:arithmetic"}}


@pytest.mark.parametrize(("moment", "every"), [("save", "1 steps"), ("answer", "never"), ("card", "1 steps")])
def test_killed_after_the_last_step_nothing_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, every: str
) -> None:
    from fasttune.core import evaluation, model
    from fasttune.tools import card

    folder, changes, answer = tmp_path / "run", AT_THE_END | {"checkpoint": {"every": every}}, evaluation.answer

    def killed(*arguments: Any) -> Any:
        if moment == "answer" and not folder.exists():
            return answer(*arguments)  # those before training
        raise Killed

    where: dict[str, tuple[Any, str]] = {"save": (model, "save"), "answer": (evaluation, "answer")}
    where |= {"card": (card, "of_run")}
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


VICTIM = """
import gc, json, os, sys, time
os.environ["OMP_NUM_THREADS"] = "1"  # no thread pool: this process forks
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # unsloth greets
sys.path.insert(0, sys.argv[2])
from tiny_run import run, TREE
from pathlib import Path
import fasttune.core.train, fasttune.core.model, fasttune.core.trainer, fasttune.core.resume
from fasttune.core import checkpoint
def slowly(call):
    def called(*arguments):
        time.sleep(0.003)
        return call(*arguments)
    return called
# A disk that takes its time: on a fast one all is written before the killer has looked again.
checkpoint._save_tensors, checkpoint._to_disk = slowly(checkpoint._save_tensors), slowly(checkpoint._to_disk)
folder = Path(sys.argv[1])
gc.freeze()
for line in sys.stdin:
    name, resume, steps = line.split()
    child = os.fork()
    if child == 0:
        TREE["checkpoint"] = {"every": "never" if name == "whole" else "1 steps", "keep": 2}
        TREE["train"] = TREE["train"] | {"max_steps": int(steps)}
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "most"), [(0, 12), *(pytest.param(seed, 50, marks=pytest.mark.nightly) for seed in (1, 2, 3))]
)
def test_kills_lose_nothing(tmp_path: Path, seed: int, most: int) -> None:
    """SIGKILL at seeded random moments of a run that saves after every step; every other one while it is saving."""
    command = [sys.executable, "-c", VICTIM, str(tmp_path), str(Path(__file__).parent)]
    folder, kills, torn, whole, rng = tmp_path / "run", 0, 0, 0, random.Random(seed)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
    ) as nursery:
        assert nursery.stdin and nursery.stdout

        def attempt(name: str, resume: bool, kill_after: tuple[Callable[[], bool], float] | None) -> int:
            nursery.stdin.write(f"{name} {'yes' if resume else 'no'} {5 * most}\n")
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
            running = (lambda before=before: written(folder) not in (before, None), rng.uniform(0, 0.6))
            ended = attempt("run", kills > 0, saving if kills % 2 else running)
            if ended != signal.SIGKILL:
                break
            kills += 1
            torn += len(half_written(folder))
            for _, path in checkpoint.steps(folder):
                assert resume.broken(path) is None, "a torn checkpoint has the name of a whole one"
                whole += 1
        assert attempt("run", True, None) == 0
        nursery.stdin.close()
    told = f"{kills} kills, {torn} of them while a checkpoint was being written, {whole} whole ones were left"
    assert kills == most and torn >= most / 10 and whole >= most / 2, told
    assert losses(folder) == losses(tmp_path / "whole")
    assert learned(folder) == learned(tmp_path / "whole")
    assert not half_written(folder), "what the killed ones left is swept away"
