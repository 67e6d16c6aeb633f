"""Held-out rows: the right loss, a training that does not notice, and the best weights kept."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import STEPS, break_off_after, learned, losses, run, settings

from fasttune import config
from fasttune.core import checkpoint, resume
from fasttune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("unsloth")


@dataclass
class Output:
    logits: Any


HELD_OUT = {"data": {"eval": "builtin:arithmetic"}, "eval": {"every": "2 steps", "rows": 10}}


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    """HELD_OUT, with more in its sections."""
    return {name: HELD_OUT.get(name, {}) | sections.get(name, {}) for name in {**HELD_OUT, **sections}}


def reference(folder: Path) -> tuple[float, float, int]:
    """Loss, token accuracy and learned tokens by plain transformers and peft, a row at a time, all logits."""
    import peft
    import torch

    from fasttune.core import model, pretrained
    from fasttune.data import load, sources, tokenize

    base = model.transformers.AutoModelForCausalLM.from_pretrained(pretrained.builtin("builtin:tiny"))
    tuned = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = model.transformers.AutoTokenizer.from_pretrained(folder / "adapter")
    settings = config.load(folder / "config.yaml")
    form, _ = load.form_of(settings, "builtin:arithmetic")
    encoder = tokenize.Encoder(tokenize.recipe_of(tokenizer, form, {}, "assistant", 256, "truncate"))
    (chunk,) = sources.read("builtin:arithmetic", "test", max_rows=10)
    block = encoder.encode(chunk)
    loss, right, count, at = 0.0, 0, 0, 0
    for length in block.lengths:
        ids, learned = block.ids[at : at + length], block.supervised[at : at + length]
        at += length
        with torch.no_grad():
            logits = tuned(torch.tensor(ids[None], dtype=torch.int64)).logits[0].double()
        for t in range(1, length):
            if learned[t]:
                loss -= float(logits[t - 1].log_softmax(-1)[ids[t]])
                right += int(logits[t - 1].argmax()) == ids[t]
                count += 1
    return loss / count, right / count, count


AT_THE_ENDS = {"data": HELD_OUT["data"], "eval": {"rows": 10}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Folder and result of a run that was measured before its first step and after its last."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder, AT_THE_ENDS)


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_accuracy_are_those_of_plain_transformers(
    tmp_path: Path, whole: tuple[Path, Any], packing: bool
) -> None:
    folder, result = whole if packing else (tmp_path, run(tmp_path, AT_THE_ENDS | {"train": {"packing": False}}))
    loss, accuracy, count = reference(folder)
    assert (result.held_out.rows, result.held_out.loss_tokens) == (10, count)
    assert result.held_out.after.loss == pytest.approx(loss, rel=1e-5)
    assert result.held_out.after.token_accuracy == pytest.approx(accuracy)
    assert result.held_out.before.loss > 1.02 * loss and result.held_out.saved_step == STEPS


def test_training_does_not_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with dropout, which draws random numbers."""
    from fasttune.core import evaluation

    monkeypatch.setattr(evaluation, "MOST_NEW_TOKENS", 8)
    dropout = {"lora": {"dropout": 0.1}, "samples": 1}
    run(tmp_path / "never", changed(eval={"every": "never"}) | dropout)
    run(tmp_path / "often", changed(eval={"problems": 2}) | dropout)
    assert losses(tmp_path / "often") == losses(tmp_path / "never")
    assert learned(tmp_path / "often") == learned(tmp_path / "never")
    lines = [json.loads(line) for line in (tmp_path / "often" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["eval_loss"] is not None] == [2, 4, 6, 8]
    assert all((line["eval_loss"] is None) == (line["eval_token_accuracy"] is None) for line in lines)
    assert [line["step"] for line in lines if line["eval_exact_match"] == 0.0] == [2, 4, 6]
    page = (tmp_path / "often" / "report.html").read_text()
    assert "Held-out loss" in page and "first guess right" in page and "Right answers" in page
    assert "Held-out loss" not in (tmp_path / "never" / "report.html").read_text()


def losses_are(monkeypatch: pytest.MonkeyPatch, curve: dict[int, float]) -> None:
    """Step → held-out loss."""
    from fasttune.core import evaluation

    measure = evaluation.Validator.measure

    def scripted(self: Any, step: int, *progress: Any) -> Any:
        self._sums = lambda batch: (curve[step], 1.0, 1)
        return measure(self, step, *progress)

    monkeypatch.setattr(evaluation.Validator, "measure", scripted)


def test_the_best_checkpoint_is_kept_and_its_weights_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    losses_are(monkeypatch, {0: 9, 2: 3, 4: 4, 6: 5, 8: 6})
    kept = changed(checkpoint={"every": "1 steps", "keep": 1}, eval={"keep_best": True})
    assert run(tmp_path / "run", kept, after=break_off_after(5)).status == "failed"
    assert [step for step, _ in checkpoint.steps(tmp_path / "run")] == [4, 2]
    result = run(tmp_path / "run", kept, resume=True)
    assert (result.held_out.before.step, result.held_out.best.step, result.held_out.saved_step) == (0, 2, 2)
    assert [step for step, _ in checkpoint.steps(tmp_path / "run")] == [7, 2]
    best = resume.read(tmp_path / "run" / "checkpoints" / "step-2").tensors["weights"]
    saved = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all((saved[name.replace(".default", "")] == tensor).all() for name, tensor in best.items())
    last = run(tmp_path / "last", changed(eval={"keep_best": False}))
    assert (last.held_out.best.step, last.held_out.saved_step) == (2, 8)
    assert learned(tmp_path / "last")["adapter_model.safetensors"] != learned(tmp_path / "run")


def test_a_run_that_was_ended_at_its_last_step_is_still_measured(tmp_path: Path, whole: tuple[Path, Any]) -> None:
    def after(step: int) -> None:
        if step == STEPS - 1:  # the next one is finished and saved, and there is no time for more
            os.kill(os.getpid(), signal.SIGTERM)

    first = run(tmp_path / "run", AT_THE_ENDS, after=after)
    assert (first.status, first.steps, first.held_out.after.step) == ("interrupted", STEPS, 0)
    result = run(tmp_path / "run", AT_THE_ENDS, resume=True)
    assert (result.status, result.held_out.after) == ("completed", whole[1].held_out.after)


def test_no_number_is_never_the_best_and_a_best_checkpoint_that_does_not_hold_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_are(monkeypatch, {0: 9, 2: float("nan"), 4: 4, 6: 5, 8: 6})

    def after(step: int) -> None:
        if step == 7:
            (tmp_path / "run" / "checkpoints" / "step-4" / "weights.safetensors").unlink()

    result = run(tmp_path / "run", changed(eval={"keep_best": True}), after=after)
    assert (result.held_out.best.step, result.held_out.saved_step) == (4, STEPS)
    assert any("step-4 does not hold (weights.safetensors is missing)" in text for text in result.warnings)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eval": {"every": "2 steps"}}, "eval.every needs held-out rows"),
        ({"data": {"train": "a.jsonl", "eval": "a.jsonl"}}, "data: eval names the rows that are trained on"),
        ({"data": {"train": "a/b:c", "eval": "a/b:c", "split": "test"}}, "eval_split=test is what is trained on"),
        ({"data": {"eval": "builtin:arithmetic"}, "eval": {"keep_best": True}}, "eval.keep_best compares steps"),
        (
            {"data": {"eval": "builtin:arithmetic"}, "eval": {"every": "often"}},
            "write '50 steps', '10 %', 'start and end'",
        ),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(Path("unused"), changes)


def test_logits_are_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a forward gives those of every token: no copy of all the learned ones is made of them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from fasttune.core import evaluation
    from fasttune.data.sharing import flat

    tokens, vocab, made = 600, 50, []

    class Made(TorchDispatchMode):
        """The most rows of logits that one operation brings into being."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            before = {arg.untyped_storage().data_ptr() for arg in args if torch.is_tensor(arg)}
            if torch.is_tensor(result) and result.shape[-1:] == (vocab,):
                made.append(0 if result.untyped_storage().data_ptr() in before else result.numel() // vocab)
            return result

    logits = torch.randn(1, tokens, vocab)
    model = type("Model", (), {"device": torch.device("cpu"), "__call__": lambda *_, **__: Output(logits)})
    validator = evaluation.Validator.__new__(evaluation.Validator)
    validator.model, validator.autocast = model(), False
    batch = flat([(np.arange(tokens) % vocab, np.arange(tokens) > 9)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with Made():
        loss, right, count = validator._sums(batch)
    labels = torch.arange(10, tokens) % vocab
    expected = logits[0, 9:-1]
    assert count == tokens - 10 and right == int((expected.argmax(-1) == labels).sum())
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(expected, labels, reduction="sum")), rel=1e-5)
    assert 0 < max(made) <= evaluation.AT_ONCE
