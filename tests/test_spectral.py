"""Factors balanced again: the same product, the moments of the same gradients, and no change where none is possible."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import STEPS, learned, losses, run, whole_and_copy

torch = pytest.importorskip("torch")

from fasttune.core import spectral  # noqa: E402


def factors(n: int = 2, out: int = 24, width: int = 40, rank: int = 6, dtype: Any = torch.float32) -> tuple[Any, Any]:
    random = torch.Generator().manual_seed(0)
    spread = torch.logspace(1, -2, rank, dtype=dtype)
    a = torch.randn(n, rank, width, generator=random, dtype=dtype) * spread[:, None]
    return a, torch.randn(n, out, rank, generator=random, dtype=dtype)


def relative(found: Any, wanted: Any) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_the_product_stays_and_the_factors_are_balanced() -> None:
    a, b = factors()
    new_a, new_b, change, back, values = spectral.balanced(a, b)
    assert relative(new_b @ new_a, b @ a) <= 1e-6
    assert float((spectral.balance(new_a, new_b) / values.norm(dim=-1)).max()) <= 1e-6
    assert relative(change @ new_a, a) <= 1e-5 and relative(b @ change, new_b) <= 1e-5
    assert relative(change @ back, torch.eye(6).expand(2, 6, 6)) <= 1e-4


def test_twice_is_as_once() -> None:
    once = spectral.balanced(*factors())
    twice = spectral.balanced(once[0], once[1])
    assert relative(twice[0], once[0]) <= 1e-5 and relative(twice[1], once[1]) <= 1e-5


class Model(torch.nn.Module):
    """Two adapters of a PEFT model, as far as they are looked at."""

    def __init__(self, a: Any, b: Any) -> None:
        super().__init__()
        for number in range(len(a)):
            layer = torch.nn.Module()
            for name, weight in (("lora_A", a[number]), ("lora_B", b[number])):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
                linear.weight = torch.nn.Parameter(weight.clone())
                layer.add_module(name, torch.nn.ModuleDict({"default": linear}))
            self.add_module(f"layer{number}", layer)


def test_moments_are_those_of_the_gradients_at_the_new_factors() -> None:
    """First moments are a sum of gradients, each of them known at both factors. In fp64, where nothing rounds."""
    a, b = factors(dtype=torch.float64)
    model = Model(a, b)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random, wanted = torch.Generator().manual_seed(1), {}
    new_a, new_b, _, _, _ = spectral.balanced(a, b)
    gradients = [torch.randn(24, 40, generator=random, dtype=torch.float64) for _ in range(5)]  # of the product
    for number, pair in enumerate(spectral.pairs(model)):
        new = {"a": lambda g, x=new_b[number]: x.T @ g, "b": lambda g, x=new_a[number]: g @ x.T}
        for name, of in new.items():
            average = torch.zeros_like(getattr(pair, name))
            for gradient in gradients:
                average = 0.9 * average + 0.1 * of(gradient)
            wanted[pair.layer, name] = average
        old = {"a": lambda g, x=b[number]: x.T @ g, "b": lambda g, x=a[number]: g @ x.T}
        for name, of in old.items():
            average = torch.zeros_like(getattr(pair, name))
            for gradient in gradients:
                average = 0.9 * average + 0.1 * of(gradient)
            optimizer.state[getattr(pair, name)] = {"exp_avg": average, "exp_avg_sq": average.square()}
    spectral.refactor(model, optimizer)
    for pair in spectral.pairs(model):
        for name in ("a", "b"):
            assert relative(optimizer.state[getattr(pair, name)]["exp_avg"], wanted[pair.layer, name]) <= 1e-5


def test_second_moments_are_moved_as_those_of_independent_entries() -> None:
    """Over many random gradients the mean square of the moved ones is the moved mean square."""
    a, b = factors(n=1, rank=3)
    _, _, change, _, _ = spectral.balanced(a, b)
    random = torch.Generator().manual_seed(2)
    scale = torch.rand(3, 40, generator=random) + 0.1
    drawn = scale * torch.randn(4000, 3, 40, generator=random)
    moments = {"exp_avg_sq": scale.square()}
    spectral._move(moments, change[0].T, left=True)
    seen = (change[0].T @ drawn).square().mean(0)
    assert float(((seen - moments["exp_avg_sq"]) / moments["exp_avg_sq"]).abs().mean()) <= 0.03


def test_a_layer_that_does_nothing_yet_stays() -> None:
    a, b = factors()
    b[0] = 0
    model = Model(a, b)
    seen = spectral.refactor(model, SimpleNamespace(state={}))
    assert [each["skipped"] for each in seen] == [True, False]
    first, second = spectral.pairs(model)
    assert torch.equal(first.a, a[0]) and torch.equal(first.b, b[0])
    assert not torch.equal(second.a, a[1]) and seen[1]["balance_after"] <= 1e-6 < seen[1]["balance"]


def test_no_random_number_is_drawn() -> None:
    model = Model(*factors())
    before = torch.get_rng_state()
    spectral.refactor(model, SimpleNamespace(state={}))
    assert torch.equal(torch.get_rng_state(), before)


RECIPE: dict[str, Any] = {
    "lora": {"refactor_every": 3, "init": "pissa", "rslora": True, "dropout": 0.05},
    # Several micro-batches a step: once a step all the same.
    "train": {"micro_batch_rows": 1, "gradient_checkpointing": "full"},
}


@pytest.fixture(scope="module")
def whole(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole recipe; beside it, as `copy`, as it was after step 5, with checkpoints of steps 2 and 4."""
    return whole_and_copy(tmp_path_factory.mktemp("refactored") / "run", 5, RECIPE)


def test_a_run_says_what_it_balanced(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "refactor.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {3, 6} and len({line["layer"] for line in lines}) == len(lines) / 2 == 14
    assert all(line["balance_after"] <= 1e-5 for line in lines)
    steps = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [step["adapter_balance"] is not None for step in steps] == [
        number in (3, 6) for number in range(1, STEPS + 1)
    ]


def test_killed_and_resumed_across_a_refactoring_it_is_the_same_run(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole.with_name("copy"), tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints" / "step-4")  # so that step 3, with its refactoring, is done again
    result = run(folder, RECIPE, resume=True)
    assert (result.status, result.resumed_from_step) == ("completed", 2)
    assert (losses(folder), learned(folder)) == (losses(whole), learned(whole))
    assert (folder / "refactor.jsonl").read_text() == (whole / "refactor.jsonl").read_text()


def test_where_it_is_never_due_the_run_is_the_same_to_the_bit(unsloth: None, tmp_path: Path) -> None:
    for name, every in (("off", None), ("later", STEPS + 1)):
        result = run(tmp_path / name, {"lora": {"refactor_every": every}})
    assert result.warnings == [f"lora.refactor_every={STEPS + 1}: never, the run has {STEPS} steps"]
    assert learned(tmp_path / "later") == learned(tmp_path / "off") and learned(tmp_path / "off")
    assert not (tmp_path / "later" / "refactor.jsonl").exists()


def test_the_loss_of_a_batch_does_not_change(unsloth: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out loss right before and right after."""
    from fasttune.core import evaluation

    seen: list[tuple[float, float]] = []
    refactor, validators = spectral.refactor, list[evaluation.Validator]()
    begin = evaluation.Validator.__init__
    monkeypatch.setattr(
        evaluation.Validator, "__init__", lambda self, *a: (begin(self, *a), validators.append(self))[0]
    )

    def measured(*arguments: Any) -> Any:
        before = validators[0].measure(0).loss
        found = refactor(*arguments)
        seen.append((before, validators[0].measure(0).loss))
        return found

    monkeypatch.setattr(spectral, "refactor", measured)
    run(tmp_path / "run", {"lora": {"refactor_every": 3}, "data": {"eval": "builtin:arithmetic"}})
    assert len(seen) == 2 and all(after == pytest.approx(before, rel=1e-6) for before, after in seen)


def test_moments_that_cannot_be_moved_are_refused(unsloth: None, tmp_path: Path) -> None:
    from fasttune.errors import ConfigError

    with pytest.raises(ConfigError, match="train.optimizer=paged_adamw_8bit needs a GPU"):
        run(tmp_path / "run", {"train": {"optimizer": "paged_adamw_8bit"}})
    with pytest.raises(ConfigError, match="refactor_every: not with train.optimizer=adamw_8bit"):
        run(tmp_path / "run", {"lora": {"refactor_every": 3}, "train": {"optimizer": "adamw_8bit"}})
    assert not (tmp_path / "run").exists()


def test_the_second_matrix_learns_faster_and_a_resumed_run_knows_it(unsloth: None, tmp_path: Path) -> None:
    """lora.plus_ratio: the first steps of Adam are as long as the learning rate, so B moved as many times as far."""
    changes = {"lora": {"plus_ratio": 4.0}, "train": {"max_steps": 4, "scheduler": "constant", "warmup_ratio": 0.0}}
    whole = whole_and_copy(tmp_path / "run", 3, changes)
    from safetensors.numpy import load_file

    weights = load_file(whole.with_name("copy") / "checkpoints" / "step-2" / "weights.safetensors")
    second = max(float(abs(value).max()) for name, value in weights.items() if "lora_B" in name)  # it began at 0
    assert second == pytest.approx(2 * 4.0 * 1e-2, rel=0.1)
    result = run(whole.with_name("copy"), changes, resume=True)
    assert result.resumed_from_step == 2 and learned(whole.with_name("copy")) == learned(whole)
