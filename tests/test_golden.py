"""The same numbers as before: what every kind of run learns, in one go and resumed, what is cached, what is merged."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import goldens
import pytest
from tiny_run import learned, losses, run, whole_and_copy

from fasttune.core import checkpoint
from fasttune.data import arithmetic, sources, store
from fasttune.settings import ModelConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unsloth")]

STEPS, RESUMED_FROM = 6, 4
FULL = {"method": "full", "learning_rate": 1e-3}
BF16 = {"dtype": "bfloat16"}
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded, two at once": {"train": {"packing": False, "micro_batch_rows": 2}},
    "dropout": {"lora": {"dropout": 0.1}},
    "rslora": {"lora": {"rslora": True}},
    "pissa": {"lora": {"init": "pissa"}},
    "full": {"train": FULL},
    "full, fp32 weights": {"model": BF16, "train": FULL},
    "full, rounded by chance": {"model": BF16, "train": FULL | {"optimizer": "adamw_8bit"}},
    "weighted sets": {"data": {"train": {"builtin:arithmetic": 0.7, "ROWS": 2}}},
    "shared beginnings": {"data": {"train": "ROWS"}},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread(unsloth: None) -> Iterator[None]:
    """Sums of several are in another order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 conversations of different lengths that begin with the same system turn."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(24):
            contents = ["You are a patient teacher.", f"What is {i} plus {7 * i}?", f"It is {8 * i}." * (1 + i % 5)]
            turns = zip(("system", "user", "assistant"), contents, strict=True)
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def whole(rows: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """(folder, config) of a run of a kind that nothing interrupts, made once; `copy` beside it is of step 5."""

    @functools.cache
    def of(kind: str) -> tuple[Path, dict[str, Any]]:
        changes = json.loads(json.dumps(KINDS[kind]).replace("ROWS", rows))
        changes["train"] = changes.get("train", {}) | {"max_steps": STEPS}
        folder = whole_and_copy(tmp_path_factory.mktemp("whole") / "run", 5, changes)
        backend = json.loads((folder / "run.json").read_text())["backend"]
        assert ("shared beginnings" in backend["packing"]) == (
            backend["packing"].startswith("packed") and kind != "dropout"
        )
        return folder, changes

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_what_it_learned(whole: Any, kind: str) -> None:
    folder, _ = whole(kind)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen: dict[str, Any] = {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}
    tolerance = goldens.BF16_TOLERANCE if KINDS[kind].get("model") == BF16 else goldens.TOLERANCE
    goldens.check("runs.json", kind, seen | {"weights": goldens.digest(*learned(folder).values())}, tolerance)
    assert min(seen["loss"][-2:]) < seen["loss"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_in_its_second_epoch_ends_bit_identical(whole: Any, tmp_path: Path, kind: str) -> None:
    """A step after a checkpoint."""
    folder, changes = killed(whole, tmp_path, kind)
    result = run(folder, changes, resume=True)
    assert (result.status, result.steps, result.resumed_from_step) == ("completed", STEPS, RESUMED_FROM)
    assert result.resume_command is None and f"resuming from {folder}/checkpoints/step-4, step 4" in result.told
    assert losses(folder) == losses(whole(kind)[0])
    assert learned(folder) == learned(whole(kind)[0]) and learned(folder)
    assert [step for step, _ in checkpoint.steps(folder)] == [4, 2]


def killed(whole: Any, tmp_path: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """(folder, config) of a run of a kind that ended without a word after step 5."""
    folder, changes = whole(kind)
    return Path(shutil.copytree(folder.with_name("copy"), tmp_path / "run")), changes


def test_checkpoints_change_nothing(whole: Any, tmp_path: Path) -> None:
    result = run(tmp_path / "run", {"train": {"max_steps": STEPS}, "checkpoint": {"every": "never"}})
    assert result.resumed_from_step is None and not (tmp_path / "run" / "checkpoints").exists()
    assert losses(tmp_path / "run") == losses(whole("packed")[0])
    assert learned(tmp_path / "run") == learned(whole("packed")[0])


def test_without_the_random_states_dropout_would_differ(whole: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The comparison above can fail."""
    from fasttune.core import restore

    folder, changes = killed(whole, tmp_path, "dropout")
    monkeypatch.setattr(restore, "restore_random", lambda checkpoint: None)
    run(folder, changes, resume=True)
    expected = losses(whole("dropout")[0])
    assert losses(folder)[:RESUMED_FROM] == expected[:RESUMED_FROM] and losses(folder) != expected


def test_the_bytes_of_the_token_cache(tiny_recipe: Any, rows: str, monkeypatch: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    monkeypatch.setenv("FASTTUNE_CACHE", str(tmp_path))
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps(row) + "\n" for row in arithmetic.generate("train", rows=50)))
    split = {"too_long": "split", "max_length": 48, "train_on": "all"}
    found = []
    for source, recipe in [
        (rows, tiny_recipe),
        (rows, replace(tiny_recipe, train_on="last")),
        (rows, replace(tiny_recipe, **split)),
        (str(sums), replace(tiny_recipe, form="question_answer")),
    ]:
        key = sources.fingerprint(source, "train", "train")
        store.stored(source, key, recipe, lambda source=source: sources.read(source, "train"), lambda share: None)
        (entry,) = (path for path in (tmp_path / "data").iterdir() if path.name not in {name for name, _ in found})
        found.append((entry.name, goldens.digest(*((entry / name).read_bytes() for name in sorted(store.ARRAYS)))))
    goldens.check("runs.json", "token cache", {"exact": [bytes_of for _, bytes_of in found]})


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merged_weights(whole: Any, tmp_path: Path, dtype: str | None) -> None:
    import torch
    from safetensors.torch import load_file

    from fasttune.tools import merged_weights

    base = ModelConfig(name="builtin:tiny")
    merged_weights.write(merged_weights.plan(base, whole("rslora")[0] / "adapter"), tmp_path, dtype, lambda share: None)
    (file,) = tmp_path.glob("*.safetensors")
    norms = {name: float(torch.linalg.vector_norm(tensor.double())) for name, tensor in load_file(file).items()}
    seen = {"norms": sum(norms.values()), "weights": goldens.digest(file.read_bytes())}
    goldens.check("runs.json", f"merged, {dtype or 'as the base'}", seen)
