"""A full disk, a removed folder, bad steps and too little memory cost as little as they can."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import STEPS, break_off_after, learned, losses, run

from fasttune.core import checkpoint, resume, run_folder
from fasttune.errors import OutputError

pytestmark = pytest.mark.usefixtures("unsloth")


@pytest.mark.parametrize("last", [5, STEPS])
def test_an_output_folder_that_is_removed_is_made_again(tmp_path: Path, last: int) -> None:
    def after(step: int) -> None:
        if step == last:
            shutil.rmtree(tmp_path / "run")

    result = run(tmp_path / "run", after=after)
    assert result.status == "completed" and result.steps == len(losses(tmp_path / "run")) == STEPS
    assert any("was removed while the run wrote into it" in text for text in result.warnings)
    assert learned(tmp_path / "run") and (tmp_path / "run" / "run.json").is_file()


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
    assert warning.startswith("step 4: no checkpoint could be written (")
    assert warning.endswith("; step-2 is the last good checkpoint")
    assert [step for step, _ in checkpoint.steps(tmp_path / "run")] == [6, 2]
    assert all(resume.broken(path) is None for _, path in checkpoint.steps(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "nothing half-written is left"


def test_a_disk_that_is_full_for_a_while_loses_no_line(tmp_path: Path) -> None:
    """Not even the log of the libraries can be written then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def after(step: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600 if 3 <= step < 6 else soft, hard))

    try:
        result = run(tmp_path / "run", after=after)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == "completed"
    assert [text for text in result.warnings if "metrics.jsonl could not be written" in text] == result.warnings[:1]
    assert len(losses(tmp_path / "run")) == STEPS and learned(tmp_path / "run")


def test_a_disk_that_is_full_at_the_end_is_a_failed_run_that_can_go_on(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def after(step: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000 if step == STEPS else soft, hard))

    try:
        result = run(tmp_path / "run", after=after)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == "failed" and (result.error or "").startswith("adapter/ could not be written: ")
    assert result.error.endswith("; step-6 is the last good checkpoint")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resume_command"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert run(tmp_path / "run", resume=True).status == "completed"


def test_a_report_that_cannot_be_written_is_a_failed_run_that_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune import report

    def full(*arguments: Any) -> None:
        raise OutputError("report.html: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_html", full)
        result = run(tmp_path / "run")
    assert result.status == "failed" and learned(tmp_path / "run") and "--resume" in (result.resume_command or "")
    assert (result.error or "").endswith("No space left on device; step-8 is the last good checkpoint")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["error"] == result.error
    assert run(tmp_path / "run", resume=True, after=break_off_after(STEPS)).status == "completed", "nothing is trained"


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with run_folder.hold(tmp_path / "run"), pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
        run_folder.hold(tmp_path / "run")
    run_folder.hold(tmp_path / "run").close()  # free again


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fasttune.core import trainer as trainers

    weights: dict[int, dict[str, Any]] = {}
    step_of = trainers.MeasuredTrainer.training_step

    def poisoned(self: Any, model: Any, inputs: Any, learned: Any = None) -> Any:
        loss = step_of(self, model, inputs, learned)
        weights[self.state.global_step] = {name: p.detach().clone() for name, p in checkpoint.trained(model).items()}
        if self.state.global_step == 3:
            next(iter(checkpoint.trained(model).values())).grad[0, 0] = float("inf")
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
    result = run(tmp_path / "run", {"train": {"max_grad_norm": 1e30, "max_bad_steps": 2}}, diverges=True)
    assert result.status == "failed" and result.steps < STEPS
    assert "3 steps in a row could not be applied" in (result.error or "") and "of builtin:arithmetic" in result.error
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_diverged_run_is_failed_and_saves_nothing(tmp_path: Path, steps: int) -> None:
    """The loss of the last step is still that of good weights where there is one step only."""
    changes = {"train": {"max_grad_norm": 1e30, "max_steps": steps}, "checkpoint": {"every": "1 steps"}}
    result = run(tmp_path / "run", changes, diverges=True)
    assert result.status == "failed" and (result.error or "").startswith("the weights have diverged: ")
    assert result.error.endswith("; there is no checkpoint") and result.resume_command is None
    assert not (tmp_path / "run" / "adapter").exists() and not checkpoint.steps(tmp_path / "run")


def test_a_diverged_run_names_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fasttune.core import trainer as trainers

    step_of = trainers.MeasuredTrainer.training_step

    def poisoned(self: Any, model: Any, inputs: Any, learned: Any = None) -> Any:
        if self.state.global_step == 4:
            with torch.no_grad():
                next(iter(checkpoint.trained(model).values())).fill_(1e30)
        return step_of(self, model, inputs, learned)

    monkeypatch.setattr(trainers.MeasuredTrainer, "training_step", poisoned)
    result = run(tmp_path / "run", {"train": {"max_bad_steps": 100}})
    assert result.status == "failed" and (result.error or "").endswith("; step-4 is the last good checkpoint")
    assert [step for step, _ in checkpoint.steps(tmp_path / "run")] == [4, 2], "diverged ones push no good one out"
    assert any("step 6: no checkpoint, for its weights have diverged; step-4" in text for text in result.warnings)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A machine on which a micro-batch of more than so many rows does not fit."""
    import torch

    from fasttune.core import trainer as trainers, what_ran

    micro_step = trainers.MeasuredTrainer._micro_step

    def fits(rows: int) -> None:
        def limited(self: Any, model: Any, batch: Any, learned: Any) -> Any:
            loss = micro_step(self, model, batch, learned)  # half of the gradients are there when memory runs out
            if what_ran.rows_of(batch) > rows:
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
        "out of memory with the fewest rows at once; try, in this order: train.gradient_checkpointing=full; "
        "model.max_length below 256; a lower lora.rank; a smaller model"
    )


def test_what_fails_after_training_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttune.core import evaluation

    answer, file = evaluation.answer, tmp_path / "run" / "run.json"
    written: list[float] = []

    def failing(*arguments: Any) -> list[str]:
        if file.exists():
            written.append(json.loads(file.read_text())["wall_s"])
            time.sleep(0.2)  # the clock of a run goes on
            raise RuntimeError("CUDA out of memory\nand a lot more")
        return answer(*arguments)

    monkeypatch.setattr(evaluation, "MOST_NEW_TOKENS", 8)
    monkeypatch.setattr(evaluation, "answer", failing)
    changes = {"data": {"eval": "builtin:arithmetic"}, "samples": 1, "usd_per_hour": 3.6}
    result = run(tmp_path / "run", changes | {"train": {"max_steps": 2}})
    assert (result.status, result.samples) == ("completed", [])
    assert result.wall_s >= written[0] + 0.2, "the last answers are part of the run"
    assert result.cost_usd == pytest.approx(0.001 * result.wall_s)
    assert json.loads(file.read_text())["wall_s"] == result.wall_s
    assert result.warnings == ["the held-out problems were not answered after training: CUDA out of memory"]
    assert learned(tmp_path / "run") and (tmp_path / "run" / "report.html").is_file()


def test_a_second_signal_saves_nothing_that_is_half_done(tmp_path: Path) -> None:
    def after(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    result = run(tmp_path / "run", after=after)
    assert (result.status, result.error) == ("interrupted", "stopped at once by a second signal")
    assert not (tmp_path / "run" / "adapter").exists() and "--resume" in (result.resume_command or "")


def test_the_state_of_8_bit_optimizers_is_kept_flat() -> None:
    """bitsandbytes 0.50.2 nests it: https://github.com/bitsandbytes-foundation/bitsandbytes, optim/optimizer.py"""
    import torch

    nested = {"step": 3, "__bnb_optimizer_quant_state__": {"state1": torch.ones(2), "qmap1": torch.zeros(2)}}
    flat = checkpoint.flat(nested)
    assert set(flat) == {"step", "state1", "qmap1"} and torch.is_tensor(flat["state1"])
