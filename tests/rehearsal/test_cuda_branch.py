"""`fasttune train` through Unsloth's code for CUDA, rehearsed on a CPU (rehearse.py): the losses of an ordinary run.

One layer, five rows, 64 tokens: a pack of two lengths, a rectangle of two equal rows, and a row alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import pytest

from fasttune import config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unsloth")]

HERE = Path(__file__).parent
LENGTHS = [18, 14, 10, 11, 11]
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "shared": {"data": {"train": "alike.jsonl"}, "model": {"max_length": 64}, "train": {"batch_rows": 3}},
}
NIGHTLY: dict[str, dict[str, Any]] = {
    "dropout": {"lora": {"dropout": 0.1}},
    "rslora": {"lora": {"rslora": True}, "train": {"max_steps": 2}},
    "pissa": {"lora": {"init": "pissa"}},
    "fp32": {},
    "embeddings": {"lora": {"train_embeddings": True}, "train": {"max_steps": 2}},
    "full": {"lora": None, "train": {"method": "full"}},  # last: Unsloth keeps that in the environment
}


def of(*variants: str) -> pytest.MarkDecorator:
    marked = [pytest.param(name, marks=[pytest.mark.nightly] * (name in NIGHTLY)) for name in variants]
    return pytest.mark.parametrize("variant", marked)


ADAPTERS = of("lora", "dropout", "pissa")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(builtin:tiny with one layer instead of two, the rows)."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from fasttune.core import pretrained

    folder, tiny = tmp_path_factory.mktemp("inputs"), pretrained.builtin("builtin:tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny, num_hidden_layers=1))
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "model")
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [letters[at : at + length - 1] for at, length in enumerate(LENGTHS)]  # and a token that ends it
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    alike = [{"prompt": f"abc{end}", "completion": answer} for end, answer in (("x", "kl"), ("x", "mno"), ("y", "k"))]
    (folder / "alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alike))
    return folder / "model", folder / "rows.jsonl"


def tree(inputs: tuple[Path, Path], folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "model": {"name": str(inputs[0]), "max_length": 24, "dtype": "float32"},
        "data": {"train": str(inputs[1].with_name(changes.get("data", {}).get("train", "rows.jsonl")))},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"batch_rows": 5, "micro_batch_rows": 1, "max_steps": 1, "learning_rate": 1e-2},
        "checkpoint": {"every": "never"},
        "output_dir": str(folder),
    }
    for section, values in changes.items():
        if section != "data":
            made[section] = values and made[section] | values
    return {section: values for section, values in made.items() if values is not None}


def rehearsed(inputs: tuple[Path, Path], folder: Path, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    runs = {
        name: {"config": tree(inputs, folder / name, changes), "fused": name != "fp32"}
        for name, changes in variants.items()
    }
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, str(HERE / "rehearse.py"), "runs.json", "out.json"]
    environment = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def seen(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return rehearsed(inputs, tmp_path_factory.mktemp("rehearsed"), VARIANTS)


@pytest.fixture(scope="module")
def seen_at_night(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return rehearsed(inputs, tmp_path_factory.mktemp("rehearsed"), NIGHTLY)


@pytest.fixture
def run(request: pytest.FixtureRequest, variant: str) -> dict[str, Any]:
    """What was seen of the variant that a test asks for."""
    found = request.getfixturevalue("seen_at_night" if variant in NIGHTLY else "seen")[variant]
    assert found["status"] == "completed", found["error"]
    return found


@of("lora", *NIGHTLY)
def test_it_teaches_what_an_ordinary_run_does(
    run: dict[str, Any], inputs: tuple[Path, Path], tmp_path: Path, variant: str
) -> None:
    """To the bit when it was written, but for the loss of a second step (9e-8 off).

    Unsloth's PiSSA for CUDA, a randomised decomposition, makes other matrices: the loss is the same, the gradient was
    2.4e-4 off. Dropout draws other numbers.
    """
    tolerance = {"pissa": 1e-3, "dropout": 1.0}.get(variant, 1e-6)
    compare(run, (VARIANTS | NIGHTLY)[variant], inputs, tmp_path / "run", tolerance)


def compare(
    run: dict[str, Any], changes: dict[str, Any], inputs: tuple[Path, Path], folder: Path, norm_tolerance: float
) -> None:
    from fasttune.core import train
    from fasttune.terminal import Reporter

    result = train.run(config.parse(tree(inputs, folder, changes)), Reporter(quiet=True))
    assert result.status == "completed", result.error
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run["loss"] == pytest.approx([step["loss"] for step in steps], rel=1e-6)
    assert run["grad_norm"] == pytest.approx([step["grad_norm"] for step in steps], rel=norm_tolerance)


@of("lora", "full", "dropout")
def test_it_teaches_what_it_taught(run: dict[str, Any], variant: str) -> None:
    goldens.check("runs.json", f"CUDA branch, {variant}", {name: run[name] for name in ("loss", "grad_norm")})


def test_a_shared_beginning_is_computed_once(seen: dict[str, Any], inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Two rows with one question behind what all three begin with: the padded run's loss, with half of the tokens."""
    alone = VARIANTS["shared"] | {"train": {"batch_rows": 3, "packing": False}}
    compare(seen["shared"], alone, inputs, tmp_path / "run", 1e-5)
    (attention,) = seen["shared"]["attention"]
    kind, *lengths = attention["lengths"]
    assert kind == "torch.int32" and len(lengths) == 5, "what all, two, and each alone have"
    starts = [0, lengths[0], lengths[0] + lengths[1], lengths[0] + lengths[1], lengths[0]]
    expected = [range(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    assert seen["shared"]["positions"] == [[at for segment in expected for at in segment]]
    backend = seen["shared"]["backend"]
    assert backend["attention"] == "SharedAttention" and "shared beginnings" in backend["packing"]


@of("dropout")
def test_dropout_has_a_gradient_of_its_own(run: dict[str, Any], seen: dict[str, Any]) -> None:
    assert run["loss"] == pytest.approx(seen["lora"]["loss"], rel=1e-6)  # B is zero: nothing to drop yet
    assert run["grad_norm"] != pytest.approx(seen["lora"]["grad_norm"], rel=1e-3)


ALONE, PACK, RECTANGLE = (
    {"backend": "sdpa", "mask": False, "lengths": lengths, "shape": [rows, 4, tokens, 16]}
    for lengths, rows, tokens in ((None, 1, 18), (["torch.int32", 14, 10], 1, 24), (None, 2, 11))
)


@ADAPTERS
def test_what_reaches_attention(run: dict[str, Any]) -> None:
    """Lengths of unequal rows only, whose positions begin anew; never a mask; never a row of logits."""
    assert run["attention"] == [ALONE, PACK, RECTANGLE]
    assert run["positions"] == [None, [*range(14), *range(10)], None]
    assert run["hidden"] == [[1, 18, 64], [1, 24, 64], [2, 11, 64]] and run["logits"] == []


@pytest.mark.nightly
def test_full_fine_tuning_runs_no_whole_logits_either(seen_at_night: dict[str, Any]) -> None:
    """Unsloth compiles transformers' own model for it, whose attention does not go through that dispatch."""
    run = seen_at_night["full"]
    assert run["attention"] == [] and run["logits"] == []
    assert (run["backend"]["patched_mlps"], run["backend"]["fused_lora_layers"]) == (1, 0)


@of("lora", "full", "dropout", "pissa")
def test_the_attention_of_a_whole_step_is_said(run: dict[str, Any]) -> None:
    backend = run["backend"]
    assert backend["attention"] == "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert backend["packing"] == "packed: 5 rows in 3 micro-batches (last step)"


@ADAPTERS
def test_a_step_is_counted_before_it_is_moved_and_row_lengths_stay(run: dict[str, Any]) -> None:
    """Up to the attention of the pack, which is the second micro-batch."""
    events = run["events"]
    counted, used = events.index("counted"), [at for at, event in enumerate(events) if event == "used"]
    assert set(events[:counted]) == {"made"}
    assert {"moved input_ids", "moved labels"} <= set(events[counted : used[0]])
    assert {"moved input_ids", "moved labels", "moved position_ids"} <= set(events[used[0] : used[1]])
    assert "moved packed_seq_lengths" not in events[: used[1]]


def test_what_is_patched_is_said_apart(seen: dict[str, Any]) -> None:
    names = ("patched_layers", "patched_mlps", "fused_lora_layers")
    counts = {variant: tuple(run["backend"][name] for name in names) for variant, run in seen.items()}
    assert counts == {"lora": (1, 1, 1), "shared": (1, 1, 1)}
    assert not any("Unsloth runs" in warning for run in seen.values() for warning in run["warnings"])


def test_the_lora_function_for_a_cpu_stays_off(seen: dict[str, Any]) -> None:
    """Its layers are fp32 and lie on the CPU here, so that only the card keeps it off."""
    for run in seen.values():
        assert run["cpu_lora_layers"] == 0 and run["backend"]["library"] == "unsloth + trl"
        assert not any("no GPU" in setting for setting in run["settings"])


@pytest.mark.nightly
def test_an_fp32_base_is_not_fused_and_the_run_says_so(seen_at_night: dict[str, Any]) -> None:
    run = seen_at_night["fp32"]
    assert run["cpu_lora_layers"] == 0 and run["backend"]["patched_mlps"] == run["backend"]["fused_lora_layers"] == 0
    assert "MLP of 0, LoRA of attention of 0 of 1 layers" in " ".join(run["warnings"])
    assert not any("no GPU" in setting for setting in run["settings"])


@ADAPTERS
def test_memory_is_what_the_forecast_counts(
    run: dict[str, Any], inputs: tuple[Path, Path], tmp_path: Path, variant: str
) -> None:
    """Bytes that the layer keeps for backward: 710 values a token, of which norms and attention have 6 of their own.

    Not of full fine-tuning, whose MLP keeps less once it is compiled. Without a variable-length kernel the attention of
    a pack is put together from that of its rows, so that its output is there twice.
    """
    from transformers import AutoConfig

    from fasttune.core.memory import GIB, Choices, Shape, Workload, forecast

    shape = Shape.of(AutoConfig.from_pretrained(inputs[0]))
    choices = Choices(80.0, "lora", "float32", "none", "adamw_torch_fused", packed=True, parts=1)
    settings = config.parse(tree(inputs, tmp_path, (VARIANTS | NIGHTLY)[variant]))
    kept = {found["tokens"]: found["bytes"] for found in run["kept"]}
    kept[24] -= 24 * shape.query_width * 4
    for tokens, seen_bytes in kept.items():
        counted = forecast(settings, shape, choices, Workload(tokens, tokens, 0, 0)).activations * GIB
        assert seen_bytes == pytest.approx(counted, rel=0.015)
    assert kept.keys() == {18, 24, 22}


@pytest.mark.nightly
def test_nothing_of_pissa_is_left_behind(
    seen_at_night: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert seen_at_night["pissa"]["status"] == "completed"
    assert not list(tmp_path_factory.getbasetemp().rglob("unsloth_lora_init.json"))
