"""`fasttune plan` and the forecast of a run: memory by part, tokens, time and dollars, against what was measured."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import goldens
import numpy as np
import pytest

from fasttune import chips, cli, config, hardware, metrics, report, terminal
from fasttune.core import autoconfig, memory as memory_forecast
from fasttune.core.memory import Choices, Shape, Workload
from fasttune.data.batching import Batches
from fasttune.data.sharing import flat, padded
from fasttune.data.store import Rows
from fasttune.hardware import Hardware
from fasttune.metrics import Memory, Range
from fasttune.tools import estimate, plan

ROOT = Path(__file__).resolve().parent.parent
LLAMA_8B = Shape(
    layers=32, hidden=4096, mlp=14336, heads=32, query_width=4096, key_width=1024, vocab=128256, tied=False
)
CPU = Hardware("linux", "x86_64", "2.36", "3.11.7", "Some CPU", cores=2, memory_gib=24, disk_free_gib=100)
GPU = Choices(
    gpu_gib=80,
    method="lora",
    dtype="bfloat16",
    gradient_checkpointing="none",
    optimizer="adamw_torch_fused",
    packed=True,
    parts=1,
)


def test_a_divided_model_takes_a_part_of_its_memory_and_the_layers_that_are_together() -> None:
    one_row = memory_forecast.Workload.full(1, 1024, packed=True)
    asked = settings(train={"method": "full"})
    whole, part = (
        memory_forecast.forecast(asked, LLAMA_8B, replace(GPU, method="full", parts=parts), one_row) for parts in (1, 8)
    )
    for name in ("gradients", "optimizer"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name) / 8)
    assert whole.total > 80 > part.total and whole.weights / 8 < part.weights < whole.weights / 2


def settings(**changes: Any) -> config.Config:
    return config.parse({"model": {"name": "a/b"}, "data": {"train": "a/c"}} | changes)


def row(length: int, learned: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(length), np.arange(length) >= length - learned


def test_a_micro_batch_is_counted_as_it_is_computed() -> None:
    pack = flat([row(100, 10), row(70, 5)])
    assert Workload.of(pack, -100) == Workload(170, 15, 64 * 64 + 36 * 100 + 64 * 64 + 6 * 70, 0)
    rectangle = padded([row(100, 10), row(70, 5)], pad_id=0)
    assert Workload.of(rectangle, -100) == Workload(200, 15, 0, 2 * 100 * 100)
    assert Workload.full(2, 1024, packed=True).probabilities == 0  # longer rows compute them again


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.0), ("lora", 0.1), ("full", 0.0)])
def test_activations_are_the_tensors_that_are_saved(unsloth: None, method: str, dropout: float, packed: bool) -> None:
    """Every byte that autograd keeps of the tiny model's forward, against the count. Embeddings and head are small."""
    import torch

    from fasttune.core import model as models, packing
    from fasttune.cpu import fused_lora

    tree: dict[str, Any] = {"model": {"name": "builtin:tiny", "max_length": 256}, "data": {"train": "a/b"}}
    tree |= {"lora": {"dropout": dropout}} if method == "lora" else {}
    asked = config.parse(tree | {"train": {"method": method, "packing": packed}})
    model, _ = models.load(asked.model, "float32", "none", method == "full", 0)
    if method == "lora":
        model = models.add_lora(model, asked.lora, "none", 0)
        fused_lora.enable(model)
    if packed:
        assert packing.enable(model, 256) is None
    rows = [row(250, 200), row(131, 100)]
    arrays = flat(rows) if packed else padded(rows, 0)
    given = {name: torch.from_numpy(array % 256 if name == "input_ids" else array) for name, array in arrays.items()}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def remember(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    base = model.base_model.model.model if method == "lora" else model.model
    given.pop("labels")
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        hidden = base(**given, use_cache=False).last_hidden_state
    shape = Shape.of(model.config)
    chosen = autoconfig.resolve(asked, CPU, shape)
    counted = memory_forecast.forecast(asked, shape, chosen, Workload.of(arrays, -100)).activations * 2**30
    assert sum(kept.values()) == pytest.approx(counted, rel=0.08)
    del hidden


def test_the_states_of_llama_8b_on_a_card() -> None:
    """By arithmetic: what trains in bf16 has fp32 masters and autocast's copies, or moments of one byte."""
    one_row, gib = Workload.full(1, 512, True), LLAMA_8B.parameters / 2**30
    lora, pissa = (settings(lora={"rank": 64, "init": init}) for init in ("default", "pissa"))
    memory, begun = (memory_forecast.forecast(asked, LLAMA_8B, GPU, one_row) for asked in (lora, pissa))
    assert memory.weights == pytest.approx(2 * gib)
    assert memory.adapter == memory.gradients == memory.optimizer / 2 == pytest.approx(4 * 167_772_160 / 2**30)
    assert begun.adapter == 2 * memory.adapter  # what it began with is loaded beside it to save it
    on_cpu = replace(GPU, gpu_gib=None, dtype="float32")
    memory, begun = (memory_forecast.forecast(asked, LLAMA_8B, on_cpu, one_row) for asked in (lora, pissa))
    # SmolLM2, measured: 0.44 GiB more with PiSSA, where these weights are 0.40; its file stays mapped (513 MiB).
    assert begun.weights - memory.weights == pytest.approx(4 * LLAMA_8B.linear_weights / 2**30)
    full, on_gpu = settings(train={"method": "full"}), replace(GPU, method="full")
    states = memory_forecast.forecast(full, LLAMA_8B, on_gpu, one_row)
    assert states.gradients == states.optimizer / 2 == 4 * gib < states.weights < 6 * gib
    states = memory_forecast.forecast(full, LLAMA_8B, replace(on_gpu, optimizer="adamw_8bit"), one_row)
    assert states.weights == states.gradients == states.optimizer == 2 * gib
    states = memory_forecast.forecast(full, LLAMA_8B, replace(on_gpu, optimizer="paged_adamw_8bit"), one_row)
    in_fp32 = LLAMA_8B.vocab * LLAMA_8B.hidden / 2**30  # bitsandbytes keeps the moments of embeddings so
    assert states.gradients == 4 * gib < states.weights and states.optimizer == pytest.approx(2 * gib + 6 * in_fp32)


def test_speed_is_a_rate_on_file_or_a_wide_range(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = chips.with_gpu(CPU, "h100-80")
    chosen = autoconfig.resolve(settings(train={"batch_rows": 64}), h100, LLAMA_8B)
    monkeypatch.setattr(estimate, "on_file", list)
    wide, source = estimate.rate_tflops(settings(), chosen, h100)
    assert wide is not None and wide.high / wide.low == pytest.approx(3) and "no speed of 5 repeats" in source
    measured = {
        "machine": "NVIDIA H100 80GB HBM3",
        "dtype": "bfloat16",
        "method": "lora",
        "packed": True,
        "tflops": [400.0, 420.0, 410.0],
        "date": "2026-11-21",
        "source": "benchmarks/results/x.jsonl",
    }
    monkeypatch.setattr(estimate, "on_file", lambda: [measured | {"method": "full", "tflops": [1.0]}, measured])
    narrow, source = estimate.rate_tflops(settings(), chosen, h100)
    assert narrow == Range(400 / 1.2, 410, pytest.approx(420 * 1.2)) and "measured on NVIDIA H100" in source
    other, source = estimate.rate_tflops(settings(train={"method": "full"}), chosen, h100)
    assert other is not None and other.expected == 1.0 and "another job" not in source
    old = hardware.replace(h100, gpus=(hardware.Gpu("Tesla T4", (7, 5), 15),))
    assert estimate.rate_tflops(settings(), chosen, old)[0] is None


def forty_rows() -> Batches:
    """Of 100 tokens each."""
    ids = np.arange(4000, dtype=np.int32) % 200
    rows = Rows("x", ids, np.ones(4000, bool), np.arange(0, 4001, 100), np.arange(40), Counter())
    return Batches([rows], [1.0], 0, 0.0, 4, 4, 512, True, 0)


def test_on_a_gpu_small_work_is_bound_by_launches() -> None:
    """Half the arithmetic of a small micro-batch is not half the time: dollars must not fall to nothing."""
    data, asked = forty_rows(), settings(train={"batch_rows": 4, "epochs": 3})
    h200 = chips.with_gpu(CPU, "h200-141")
    small = replace(LLAMA_8B, hidden=512, mlp=1024, query_width=512, key_width=512)
    expected = estimate.of_run(asked, autoconfig.resolve(asked, h200, small), data, h200, 3.5)
    assert (expected.steps, expected.tokens, expected.largest_micro_batch_tokens) == (30, 12000, 400)
    assert expected.tokens_per_s is not None
    assert expected.tokens_per_s.expected == pytest.approx(400 / (32 * 0.001))  # kernels run meanwhile
    assert expected.tokens_per_s.low < expected.tokens_per_s.expected < expected.tokens_per_s.high
    assert expected.usd is not None and expected.hours is not None
    assert expected.usd.expected == pytest.approx(3.5 * expected.hours.expected)
    twice = estimate.of_run(asked, autoconfig.resolve(asked, h200, small), data, h200, None, scale=2.0)
    assert (twice.steps, twice.tokens, twice.usd) == (60, 24000, None)


def test_launches_are_not_added_to_the_work_they_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """lora-r16-4096 on an H100: 16,384 tokens in 1.1245 s, two micro-batches, kernels running for 1.094 s of it. Its
    rate holds all that a step costs: added to that, the launches of 64 layers made it 5 % slower than it was.
    """
    ids = np.arange(4 * 4096, dtype=np.int32) % 200
    rows = Rows("x", ids, np.ones(len(ids), bool), np.arange(0, len(ids) + 1, 4096), np.arange(4), Counter())
    data = Batches([rows], [1.0], 0, 0.0, 4, 2, 4096, True, 0)
    asked = settings(model={"name": "a/b", "max_length": 4096}, train={"batch_rows": 4, "micro_batch_rows": 2})
    h100 = chips.with_gpu(CPU, "h100-80")
    chosen = replace(autoconfig.resolve(asked, h100, LLAMA_8B), gradient_checkpointing="none")
    tflops = estimate.step_flops(asked, chosen, estimate.lay_out(data, 1)) / 1.1245 / 1e12
    monkeypatch.setattr(estimate, "rate_tflops", lambda *_: (Range(tflops / 1.2, tflops, 1.2 * tflops), "measured"))
    monkeypatch.setattr(estimate, "_measured", lambda *_: [{}])
    expected = estimate.of_run(asked, chosen, data, h100, None)
    assert expected.tokens_per_s is not None and expected.tokens_per_s.expected == pytest.approx(14_570, rel=0.01)


def run_of(asked: config.Config, policy: str) -> metrics.Forecast:
    """Ten steps of four rows of 100 tokens, with this recomputation, as `plan` and as a prepared run forecast them."""
    chosen, data = autoconfig.resolve(asked, CPU, LLAMA_8B), forty_rows()
    chosen = replace(chosen, gradient_checkpointing=policy)
    expected = estimate.of_run(asked, chosen, data, CPU, None)
    job: Any = SimpleNamespace(config=asked, data=data, machine=CPU, usd_per_hour=None, settings=[])
    job.plan = replace(chosen, packed=False)
    estimate.add_to(job)
    assert job.forecast == expected  # packed as its data is, whatever was planned
    assert [setting.name for setting in job.settings] == ["forecast"]
    return expected


@pytest.fixture
def slow_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_matmul_tflops", lambda dtype, hidden, mlp: 0.1)


@pytest.mark.usefixtures("slow_matmuls")
def test_recomputation_takes_time() -> None:
    asked = settings(train={"batch_rows": 4})
    speeds = [run_of(asked, policy).tokens_per_s for policy in ("none", "full")]
    assert speeds[0] is not None and speeds[1] is not None
    assert 1.3 < speeds[0].expected / speeds[1].expected < 1.5


@pytest.mark.usefixtures("slow_matmuls")
def test_a_cpu_is_as_fast_as_its_matmuls_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    on_file = {"machine": "Some CPU, 2 cores", "dtype": "float32", "shares": [0.5, 0.6, 0.7]}
    on_file |= {"date": "2026-11-21", "source": "x"}
    asked = settings(train={"batch_rows": 4})
    chosen = autoconfig.resolve(asked, CPU, LLAMA_8B)
    monkeypatch.setattr(estimate, "on_file", lambda: [on_file])
    rate, source = estimate.rate_tflops(asked, chosen, CPU)
    assert rate is not None and (rate.low, rate.expected) == (pytest.approx(0.05 / 1.2), pytest.approx(0.06))
    assert "60% of the 0.1 TFLOP/s that matmuls do now, as in 3 runs on Some CPU" in source
    monkeypatch.setattr(estimate, "on_file", list)
    wide, source = estimate.rate_tflops(asked, chosen, CPU)
    assert wide is not None and wide.high / wide.low > 2.5 and "no run measured on such a CPU" in source


@pytest.mark.usefixtures("slow_matmuls")
def test_time_says_that_evaluation_is_left_out() -> None:
    plain = settings(train={"batch_rows": 4})
    assert "evaluation" not in estimate.in_words(run_of(plain, "none"))
    held_out = {"data": {"train": "a/c", "eval_share": 0.1}}
    for changes, left_out in (({}, True), ({"every": "never"}, False), ({"every": "never", "problems": 5}, True)):
        expected = run_of(settings(**held_out, eval=changes), "none")
        assert expected.without_evaluation == left_out
        assert ("without evaluation" in estimate.in_words(expected)) == left_out


def test_rates_on_file_can_be_read() -> None:
    for found in estimate.on_file():
        assert all(0 < each < 2000 for each in found.get("tflops") or found["shares"])
        assert ("shares" in found) == found["machine"].endswith(" cores") and (ROOT / found["source"]).exists()


TREE = """
model: {name: builtin:tiny, max_length: 256}
data: {train: builtin:arithmetic}
train: {batch_rows: 4, epochs: 2}
"""


@pytest.mark.usefixtures("unsloth")
def test_the_command_tells_the_bill_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TREE)
    assert cli.main(["plan", "tiny.yaml", "--gpu", "h100-80", "--json", "data.eval_share=0.1"]) == 0
    told = capsys.readouterr()
    figures = json.loads(told.out)
    goldens.contract("plan --json", figures)
    assert figures["fits"] and figures["machine"] == "NVIDIA H100 80GB HBM3" and figures["usd_per_hour"] == 2.5
    assert figures["forecast"]["steps"] == 900 and not figures["sampled"]
    assert sum(figures["forecast"]["memory_gib"].values()) == figures["forecast"]["peak_memory_gib"]["expected"]
    named = {setting["name"]: setting for setting in figures["settings"]}
    for name in ("dtype", "batch", "checkpointing", "optimizer", "packing", "attention"):
        assert named[name]["reason"], name
    assert named["dtype"]["value"] == "bfloat16" and "an example of" in named["price"]["reason"]
    assert "peak memory" in told.err and "fitted to two runs on an H100" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.usefixtures("unsloth")
def test_what_does_not_fit_exits_1_and_names_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    architecture = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256} | shape
    make_model(tmp_path / "llama-70b", architecture)
    (tmp_path / "big.yaml").write_text(TREE)
    command = ["plan", str(tmp_path / "big.yaml"), f"model.name={tmp_path / 'llama-70b'}", "--gpu", "rtx4090-24"]
    assert cli.main(command) == 1
    told = capsys.readouterr().err.partition("does not fit")[2]
    assert told.index("model.max_length below") < told.index("model.quantization=nf4") < told.index("a smaller model")


def make_model(folder: Path, architecture: dict[str, Any]) -> None:
    """config.json and the tiny model's tokenizer, no weights."""
    from fasttune.core import pretrained

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = pretrained.builtin("builtin:tiny") / name
        if source.exists():
            (folder / name).write_bytes(source.read_bytes())
    (folder / "config.json").write_text(json.dumps(architecture))


@pytest.mark.usefixtures("unsloth")
def test_rows_are_sampled_and_tokens_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i:06d}."} for i in range(1000, 7000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = config.parse({"model": {"name": "builtin:tiny"}, "data": {"train": str(path)}})
    reporter = terminal.Reporter(quiet=True)
    whole = plan.look(asked, None, reporter)
    monkeypatch.setattr(plan, "SAMPLED_ROWS", 500)
    sampled = plan.look(asked, None, reporter)
    assert sampled.sampled and whole.sampled and whole.forecast.steps == pytest.approx(750, rel=0.02)
    assert sampled.forecast.tokens == pytest.approx(whole.forecast.tokens, rel=0.05)
    assert sampled.forecast.steps == pytest.approx(750, rel=0.05)


@pytest.mark.usefixtures("unsloth")
def test_a_user_error_names_what_is_known() -> None:
    asked = config.parse({"model": {"name": "builtin:tiny"}, "data": {"train": "builtin:arithmetic"}})
    with pytest.raises(config.ConfigError, match="h100-80"):
        plan.look(asked, "h100", terminal.Reporter(quiet=True))


def test_the_report_shows_forecast_against_actual() -> None:
    memory = Memory(0.5, 0.5, 0, 0, 0, 1.0, 0, 0)
    expected = metrics.Forecast(
        memory, Range(1.8, 2.0, 2.2), 512, 10, 5000, Range(80, 100, 120), Range(0.1, 0.2, 0.3), None, "by hand"
    )
    from tests.test_report import make_result, make_steps

    result = make_result("nowhere", make_steps(5), forecast=expected, peak_memory_gib=2.1, tokens_per_s=90.0)
    figure = next(figure for figure in report.key_figures(result) if figure.label == "forecast")
    assert figure.value == "2.0 GiB, 100 tokens/s"
    assert "memory: 5% more was measured" in figure.note and "speed: 10% less was measured" in figure.note


def test_errors_on_file_are_within_what_is_promised() -> None:
    """Of the newest row: several configurations that chose none of the constants, and all within what is promised."""
    lines = (ROOT / "benchmarks" / "results" / "forecast-error.jsonl").read_text().splitlines()
    runs = json.loads(lines[-1])["runs"]
    errors = [abs(run["forecast_gib"] / run["measured_gib"] - 1) for run in runs]
    assert sum(not run["fitted"] for run in runs) >= 5 and max(errors) <= estimate.MEMORY_ERROR["cpu"][1] - 1
    assert max(abs(run["forecast_s"] / run["measured_s"] - 1) for run in runs if run["forecast_s"]) <= 0.2


def test_the_profile_of_the_first_step_is_not_kept(unsloth: None) -> None:
    import torch

    from fasttune.core import what_ran

    with what_ran.AttentionSeen() as seen:
        torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 4))
    assert seen.operators and "attention" in seen.operators
    assert set(vars(seen)) == {"names"}
