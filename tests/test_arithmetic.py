"""builtin:arithmetic: the answers are right, and no held-out sum is ever trained on."""

import pytest

from fasttune import config
from fasttune.data import arithmetic, sources


def test_rows_are_seeded_and_their_answers_are_right() -> None:
    rows = arithmetic.generate("train", seed=3, rows=500)
    assert rows == arithmetic.generate("train", seed=3, rows=500) != arithmetic.generate("train", seed=4, rows=500)
    for row in rows:
        left, right = next(line for line in row["answer"].splitlines() if "=" in line).split(" = ")
        assert eval(left) == int(right) == int(arithmetic.final_number(row["answer"]) or "x")


def test_parts_share_no_sum() -> None:
    def sums(part: arithmetic.Part, seed: int) -> set[str]:
        return {row["answer"].splitlines()[1] for row in arithmetic.generate(part, seed=seed, rows=3000)}

    held_out = sums("test", 0) | sums("test", 1)
    assert len(held_out) > 100
    assert not held_out & (sums("train", 0) | sums("train", 1))


def test_the_quickstart_is_scored_on_sums_it_never_trains_on() -> None:
    settings = config.load("configs/quickstart.yaml")
    assert settings.eval.problems == 40 and settings.data.eval is not None
    (source,) = settings.data.sources
    read = sources.read(source, "train", max_rows=settings.data.max_rows)
    trained = [row for chunk in read for _, _, row in chunk.numbered()]
    held_out = [row for _, _, row in sources.first_rows(settings.data.eval, "test", "train", settings.eval.problems)]
    assert len(trained) >= settings.train.batch_rows * (settings.train.max_steps or 0) and len(held_out) == 40
    assert not {row["question"] for row in held_out} & {row["question"] for row in trained}
    assert not {row["answer"].splitlines()[1] for row in held_out} & {row["answer"].splitlines()[1] for row in trained}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 1,234", "1234"),
        ("#### 5.", "5."),
        ("#### -3 dollars", "-3"),
        ("7", None),
        ("####", None),
        ("#### 1\n#### 2", "1"),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert arithmetic.final_number(text) == number
