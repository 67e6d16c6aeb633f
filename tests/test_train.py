"""The real training on the tiny model: what it writes, what it learns, and that the numbers are those of what ran."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_budgets
import yaml

from fasttune import config
from fasttune.errors import FasttuneError, ModelError

pytestmark = pytest.mark.usefixtures("unsloth")

GOLDEN = Path(__file__).parent / "golden" / "tiny_lora.json"
GOLDEN_TOLERANCE = 1e-4  # relative, on another kind of machine: fp32 sums in another order
CONTRACT = set(
    "status steps first_loss last_loss tokens loss_tokens padding_fraction tokens_per_s seconds_to_first_step wall_s "
    "peak_memory_gib mfu fraction_of_measured_matmul cost_usd usd_per_million_tokens backend versions hardware "
    "warnings".split()
)
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


def command(*arguments: str, python: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *python, "-m", "fasttune.cli", "train", *arguments]


def machine_kind() -> str:
    """What fp32 sums depend on: the chip (family, model, stepping), its vector width, threads and torch."""
    import torch

    text = Path("/proc/cpuinfo").read_text()
    chip = [
        found[1]
        for key in ("vendor_id", "cpu family", "model", "stepping")
        if (found := re.search(rf"^{key}\s*: (.+)$", text, re.M))
    ]
    vector = torch.backends.cpu.get_cpu_capability()
    return f"{' '.join(chip)}, {vector}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run through the real command; its stdout is kept in stdout.txt, its imports in imports.txt."""
    folder = tmp_path_factory.mktemp("train")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree(samples=1, eval={"problems": 3}, data={"eval": "builtin:arithmetic"})))
    output = folder / "run"
    arguments = [str(path), f"output_dir={output}", "usd_per_hour=3.6", "--json"]
    timed = command(*arguments, python=("-X", "importtime"))
    done = subprocess.run(timed, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-5000:]
    assert sorted(entry.name for entry in folder.iterdir()) == ["run", "tiny.yaml"]  # nothing strayed into the cwd
    (output / "stdout.txt").write_text(done.stdout)
    (output / "imports.txt").write_text("\n".join(re.findall(r"^import time:.*\| +(fasttune\S*)$", done.stderr, re.M)))
    return output


def test_the_command_writes_the_contract(run: Path) -> None:
    written = {path.name for path in run.iterdir()} - {"stdout.txt", "imports.txt"}
    assert written == {"config.yaml", "metrics.jsonl", "run.json", "report.html", "adapter", "library.log", ".lock"}
    result = json.loads((run / "run.json").read_text())
    assert result.keys() >= CONTRACT
    assert result["status"] == "completed" and result["steps"] == 4
    assert json.loads((run / "stdout.txt").read_text().splitlines()[-1]) == result
    adapter = {path.name for path in (run / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= adapter
    assert result["forecast"]["steps"] == 4 and "forecast" in {each["name"] for each in result["settings"]}
    assert len(result["samples"]) == 1 and result["samples"][0]["reference"].count("####") == 1
    assert result["exact_match"] == {"problems": 3, "before": 0.0, "after": 0.0}  # what a random model can do


def test_a_run_loads_only_what_it_needs(run: Path) -> None:
    """Of this package: what is for rare cases (other data, a GPU, --resume, an error) stays unread."""
    loaded = {"fasttune.cli", *(run / "imports.txt").read_text().split()}
    loaded -= {"fasttune.core.builtin_models"}  # makes the model, once a machine
    assert {"fasttune", "fasttune.core.train", "fasttune.tools.card"} <= loaded
    files = [Path(*name.split(".")) for name in loaded]
    files = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in files]
    assert len(loaded) <= test_budgets.RUN_MODULES, sorted(loaded)
    test_budgets.check("a run", files, test_budgets.RUN_LINES, test_budgets.RUN_CODE_LINES)


def test_the_numbers_are_those_of_the_steps(run: Path) -> None:
    result = json.loads((run / "run.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert (result["first_loss"], result["last_loss"]) == (steps[0]["loss"], steps[-1]["loss"])
    for name in ("tokens", "loss_tokens"):
        assert result[name] == sum(step[name] for step in steps)
    for step in steps:
        assert 0 < step["loss_tokens"] < step["tokens"] and step["padding_tokens"] >= 0
        assert step["tokens_per_s"] == pytest.approx(step["tokens"] / step["seconds"])
    assert result["cost_usd"] == pytest.approx(3.6 * result["wall_s"] / 3600)
    assert result["usd_per_million_tokens"] == pytest.approx(1000 / result["tokens_per_s"])
    assert 0 < result["fraction_of_measured_matmul"] < 1.5
    assert result["mfu"] is None  # no datasheet peak for a CPU


def test_the_backend_is_what_ran(run: Path) -> None:
    backend = json.loads((run / "run.json").read_text())["backend"]
    assert backend["attention"] == "RowsAttention"
    assert backend["gradient_checkpointing"] == "none"
    assert backend["packing"] == "packed: 8 rows in 1 micro-batch (last step)"


def test_its_resolved_config_reproduces_the_run(run: Path, tmp_path: Path) -> None:
    from fasttune.core import train as training

    resolved = config.load(run / "config.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert "auto" not in (run / "config.yaml").read_text()
    training.run(resolved, Silent())
    assert losses(tmp_path / "again") == losses(run)


PLAIN_LOGITS = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
folder, prompt, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.inference_mode():
    torch.save(model(**tokenizer(prompt, return_tensors="pt")).logits, out)
assert "unsloth" not in sys.modules
"""


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_plain_peft_loads_the_adapter_to_the_same_logits(tmp_path: Path, init: str) -> None:
    """In a process without unsloth. PiSSA changes the base while it trains, so it is saved as an ordinary adapter."""
    import torch

    from fasttune.core import prepare, train as training

    kept: dict[str, Any] = {}

    def keep(*arguments: Any) -> Any:
        kept["job"] = prepare.prepare(*arguments)
        return kept["job"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare", keep)
        result = train(tmp_path / "run", lora={"init": init, "rslora": init == "pissa"})
    assert result.status == "completed"
    job, prompt, out = kept["job"], "What is 2 + 3?", tmp_path / "logits.pt"
    script = [sys.executable, "-c", PLAIN_LOGITS, str(tmp_path / "run" / "adapter"), prompt, str(out)]
    subprocess.run(script, check=True, capture_output=True)
    job.model.eval()
    with torch.inference_mode():
        trained = job.model(**job.tokenizer(prompt, return_tensors="pt")).logits
    with job.model.disable_adapter(), torch.inference_mode():
        base = job.model(**job.tokenizer(prompt, return_tensors="pt")).logits
    loaded = torch.load(out, weights_only=True)
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
    assert (trained - base).abs().max() > 1e-2  # the adapter does something, so the comparison can fail


def test_golden_losses(tmp_path: Path) -> None:
    """20 steps: to the last bit on the kind of machine they were recorded on, within GOLDEN_TOLERANCE elsewhere.

    Changed on purpose? Run with FASTTUNE_RECORD_GOLDEN=1 and say why in the commit.
    """
    train(tmp_path / "run", train={"max_steps": 20})
    seen, machine = losses(tmp_path / "run"), machine_kind()
    if os.environ.get("FASTTUNE_RECORD_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"machine": machine, "losses": seen}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(seen) == len(golden["losses"]) == 20
    if machine == golden["machine"]:
        assert seen == golden["losses"]
    assert seen == pytest.approx(golden["losses"], rel=GOLDEN_TOLERANCE)
    assert seen[-1] < 0.95 * seen[0]


def test_unsloths_mark_of_a_pissa_adapter_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU Unsloth writes it beside whatever is saved; beside an adapter that was converted it is wrong."""
    import importlib.util

    import unsloth

    from fasttune.core import model

    spec = importlib.util.spec_from_file_location("init", Path(unsloth.__file__).parent / "models" / "lora_init.py")
    assert spec is not None and spec.loader is not None
    lora_init = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lora_init)
    plain = model.add_lora

    def marked(*arguments: Any, **keywords: Any) -> Any:
        made = plain(*arguments, **keywords)
        made._unsloth_fast_pissa = {"default"}
        lora_init.record_fast_pissa(made)
        return made

    monkeypatch.setattr(model, "add_lora", marked)
    train(tmp_path / "run", lora={"init": "pissa"})
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.rglob(lora_init.SIDECAR))


def test_how_a_batch_is_split_does_not_change_the_step(tmp_path: Path) -> None:
    """8 × 1, 4 × 2 and 1 × 8: the loss is normalised over all trained tokens of the optimizer step."""
    seen = []
    for micro in (8, 2, 1):
        train(tmp_path / str(micro), train={"micro_batch_rows": micro})
        seen.append(losses(tmp_path / str(micro)))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
    assert seen[2] == pytest.approx(seen[0], rel=1e-5)


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


def test_gradient_checkpointing_runs_when_asked_for_and_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "without")
    result = train(tmp_path / "with", train={"gradient_checkpointing": "full"})
    assert result.backend.gradient_checkpointing == "full"
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-6)


def test_a_setting_that_does_not_run_is_a_warning(tmp_path: Path) -> None:
    result = train(tmp_path / "run", train={"optimizer": "adamw_8bit"})
    assert any("train.optimizer=adamw_8bit was replaced" in warning for warning in result.warnings)
    assert train(tmp_path / "plain").warnings == []


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


def test_a_signal_ends_the_run_in_order(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree(train={"max_steps": 100000})))
    folder = tmp_path / "run"
    arguments = command(str(path), f"output_dir={folder}")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "step 1/" in line:
                process.send_signal(signal.SIGTERM)
                break
        process.stderr.read()
    assert process.returncode == 143
    result = json.loads((folder / "run.json").read_text())
    assert (result["status"], result["error"]) == ("interrupted", "stopped by SIGTERM")
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

    def in_an_evaluation(validator: Any, done: int) -> Any:
        gpu_memory.takes(evaluation_gib + done)
        return measure(validator, done)

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
