"""The real training on the tiny model: what it learns and saves, and that what was asked for is what ran."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttune import cli, config, terminal
from fasttune.errors import FasttuneError, ModelError

pytestmark = pytest.mark.usefixtures("unsloth")

TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "builtin:tiny", "max_length": 512},
    "data": {"train": "builtin:arithmetic", "max_rows": 64},
    "lora": {"rank": 4, "alpha": 8},
    "train": {"batch_rows": 8, "max_steps": 4, "learning_rate": 1e-2},
}


class Silent:
    """A reporter that only remembers its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keywords: None


def tree(**sections: Any) -> dict[str, Any]:
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in TREE.items()}
    for name, value in sections.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return {key: value for key, value in merged.items() if value is not None}


def train(folder: Path, **sections: Any) -> Any:
    from fasttune.core import train as training

    return training.run(config.parse(tree(output_dir=str(folder), **sections)), Silent())


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, result) of a run of TREE as it is, which has all 8 rows of a step in one micro-batch."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    result = train(folder)
    assert (result.status, result.warnings) == ("completed", [])
    assert result.backend.packing.startswith("packed: 8 rows in 1 micro-batch, 36 tokens of shared beginnings")
    return folder, result


PLAIN_LOGITS = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
prompt, *folders = sys.argv[1:]
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.save(model(**tokenizer(prompt, return_tensors="pt")).logits, f"{folder}/logits.pt")
assert "unsloth" not in sys.modules
"""


def test_plain_peft_loads_the_adapter_to_the_same_logits(tmp_path: Path) -> None:
    """In a process without unsloth. PiSSA and OLoRA change the base while they train: saved as ordinary adapters."""
    import torch

    from fasttune.core import prepare, train as training

    prompt, seen, jobs = "What is 2 + 3?", dict[Path, Any](), []

    def keep(*arguments: Any) -> Any:
        jobs.append(prepare.prepare(*arguments))
        return jobs[-1]

    for init in ("default", "pissa", "olora", "orthogonal"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "prepare", keep)
            assert train(tmp_path / init, lora={"init": init, "rslora": init == "pissa"}).status == "completed"
        model, asked = jobs[-1].model.eval(), jobs[-1].tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            seen[tmp_path / init / "adapter"] = model(**asked).logits
        with model.disable_adapter(), torch.inference_mode():
            base = model(**asked).logits
        assert (seen[tmp_path / init / "adapter"] - base).abs().max() > 1e-2  # so the comparison can fail
    command = [sys.executable, "-c", PLAIN_LOGITS, prompt, *map(str, seen)]
    subprocess.run(command, check=True, capture_output=True)
    for folder, logits in seen.items():
        loaded = torch.load(folder / "logits.pt", weights_only=True)
        torch.testing.assert_close(loaded, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro", [2, 1])
def test_how_a_batch_is_split_does_not_change_the_step(plain: tuple[Path, Any], tmp_path: Path, micro: int) -> None:
    """8 × 1, 4 × 2 and 1 × 8: the loss is normalised over all trained tokens of the optimizer step."""
    train(tmp_path / "run", train={"micro_batch_rows": micro})
    assert losses(tmp_path / "run") == pytest.approx(losses(plain[0]), rel=1e-5)


def test_full_fine_tuning_saves_a_model_that_plain_transformers_loads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    result = train(tmp_path / "run", lora=None, train={"method": "full", "learning_rate": 1e-3})
    assert result.status == "completed" and not (tmp_path / "run" / "adapter").exists()
    from fasttune.core import pretrained

    old = AutoModelForCausalLM.from_pretrained(pretrained.builtin("builtin:tiny"))
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True) if a.dim() > 1)


def test_frozen_weights_stay_and_only_the_adapter_learns(tmp_path: Path) -> None:
    from fasttune.core import prepare, pretrained, train as training

    kept: dict[str, Any] = {}

    def keep(*arguments: Any) -> Any:
        job = prepare.prepare(*arguments)
        kept["before"] = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
        kept["model"] = job.model
        return job

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare", keep)
        train(tmp_path / "run")
    after = kept["model"].state_dict()
    changed = {name for name, tensor in kept["before"].items() if not tensor.equal(after[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert len(changed) == 2 * 7 * 2  # A and B, seven projections, two layers
    assert pretrained.builtin("builtin:tiny").is_dir()


def test_gradient_checkpointing_runs_when_asked_for_and_changes_nothing(
    plain: tuple[Path, Any], tmp_path: Path
) -> None:
    result = train(tmp_path / "run", train={"gradient_checkpointing": "full"})
    assert (result.backend.gradient_checkpointing, plain[1].backend.gradient_checkpointing) == ("full", "none")
    assert losses(tmp_path / "run") == pytest.approx(losses(plain[0]), rel=1e-6)


def test_a_setting_that_does_not_run_is_a_warning(tmp_path: Path) -> None:
    result = train(tmp_path / "run", train={"optimizer": "adamw_8bit", "max_steps": 1})
    assert any("train.optimizer=adamw_8bit was replaced" in warning for warning in result.warnings)


def test_what_is_not_counted_gives_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps experts as one tensor, bitsandbytes packs two weights into a byte: no layers to count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from fasttune import report
    from fasttune.core import what_ran
    from fasttune.core.memory import Shape

    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    dense, mixture = LlamaForCausalLM(LlamaConfig(**sizes)), MixtralForCausalLM(MixtralConfig(**sizes))
    assert what_ran.count_flops(dense) == Shape.of(dense.config).flops(full=True, adapter_weights=0)
    linear = sum(module.weight.numel() for module in mixture.modules() if isinstance(module, torch.nn.Linear))
    assert linear < Shape.of(mixture.config).computed.parameters / 3
    assert what_ran.count_flops(mixture) is None
    layer = dense.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    assert what_ran.count_flops(dense) is None

    monkeypatch.setattr(what_ran, "count_flops", lambda model: None)
    result = train(tmp_path / "run")
    assert result.tokens_per_s and (result.mfu, result.fraction_of_measured_matmul) == (None, None)
    notes = {figure.label: figure.note for figure in report.key_figures(result)}
    assert all("no mixture of experts" in notes[name] for name in ("MFU", "matmul share"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    def signalled(reporter: Any, step: Any) -> None:
        if step.step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(terminal.Reporter, "step", signalled)
    path, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(tree(train={"max_steps": 100000})))
    assert cli.main(["train", str(path), f"output_dir={folder}"]) == code
    result = json.loads((folder / "run.json").read_text())
    assert (result["status"], result["error"]) == ("interrupted", f"stopped by {number.name}")
    assert result["steps"] == len(losses(folder)) < 100000
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_bad_input_of_a_model_leaves_nothing(tmp_path: Path) -> None:
    for sections, told in [
        ({"lora": {"targets": ["q_proj", "query"]}}, "lora.targets: this model has no query"),
        ({"model": {"name": str(tmp_path)}}, "has no config.json"),
        ({"model": {"name": "nobody/nothing"}}, "HF_HUB_OFFLINE is set"),
    ]:
        with pytest.raises(ModelError, match=told):
            train(tmp_path / "run", **sections)
        assert not (tmp_path / "run").exists()


def test_a_truncated_base_model_is_named(tmp_path: Path) -> None:
    from fasttune.core import pretrained

    shutil.copytree(pretrained.builtin("builtin:tiny"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        train(tmp_path / "run", model={"name": str(tmp_path / "model")})
    assert not (tmp_path / "run").exists()


def test_peak_memory_is_that_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_memory: Any) -> None:
    """Loading and evaluation leak into no step; where they take more, that is said, too."""
    from fasttune import report
    from fasttune.core.evaluation import Validator
    from fasttune.core.trainer import MeasuredTrainer

    step, measure = MeasuredTrainer._micro_step, Validator.measure

    def in_a_step(trainer: Any, *arguments: Any) -> Any:
        gpu_memory.takes(10.0 - trainer.state.global_step)
        return step(trainer, *arguments)

    def in_an_evaluation(validator: Any, done: int, *progress: Any) -> Any:
        gpu_memory.takes(evaluation_gib + done)
        return measure(validator, done, *progress)

    monkeypatch.setattr(MeasuredTrainer, "_micro_step", in_a_step)
    monkeypatch.setattr(Validator, "measure", in_an_evaluation)
    evaluation_gib = 30.0
    gpu_memory.takes(60.0)
    result = train(tmp_path / "run", data={"eval_share": 0.25}, eval={"every": "1 steps", "rows": 8})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["peak_memory_gib"] for line in lines] == [10.0, 9.0, 8.0, 7.0]
    assert (result.status, result.peak_memory_gib, result.peak_outside_steps_gib) == ("completed", 10.0, 60.0)
    (said,) = [figure for figure in report.key_figures(result) if figure.label == "peak memory"]
    assert (said.value, said.note) == ("10.0 GiB", "in the steps; 60.0 GiB outside of them")
    evaluation_gib = 5.0
    again = train(tmp_path / "again", data={"eval_share": 0.25}, eval={"every": "1 steps", "rows": 8})
    assert again.peak_outside_steps_gib == 9.0, "of the evaluation after the last step; no step counts as outside"


def test_unsloths_emptying_of_the_cache_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own SFTConfig, which replaces TRL's on a GPU, empties it every 250 steps."""
    import dataclasses

    import trl

    from fasttune.core import trainer

    @dataclasses.dataclass
    class Theirs(trl.SFTConfig):  # type: ignore[misc]
        torch_empty_cache_steps: int | None = 250

    seen: list[Any] = []
    real = trainer.MeasuredTrainer.__init__

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        seen.append(options["args"])
        real(self, *arguments, **options)

    monkeypatch.setattr(trainer.trl, "SFTConfig", Theirs)
    monkeypatch.setattr(trainer.MeasuredTrainer, "__init__", made)
    assert train(tmp_path / "run", train={"max_steps": 1}).status == "completed"
    assert [(type(each), each.torch_empty_cache_steps) for each in seen] == [(Theirs, None)]


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fasttune import chips, hardware

    machine = chips.with_gpu(hardware.detect(), "h100-80")
    monkeypatch.setattr(hardware, "detect", lambda path: machine)
    with pytest.raises(FasttuneError, match="cannot use the NVIDIA H100 80GB HBM3: fasttune verify says what fixes it"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()
