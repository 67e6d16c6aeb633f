"""Documents end to end: each token is predicted once an epoch, whatever the length; what sees what is as was asked."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fasttune import config, terminal
from fasttune.data import load
from fasttune.data.sequences import Sequences, Stream
from fasttune.data.store import Rows
from fasttune.data.tokenize import IGNORE
from fasttune.errors import DataError

DOCUMENTS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


def corpus(lengths: list[int], name: str = "a.txt") -> Rows:
    """Every token has an id of its own, which says where it stands."""
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    numbers = np.arange(1, len(lengths) + 1)
    return Rows(name, np.arange(sum(lengths), dtype=np.int32), None, starts, numbers, Counter(tokens=sum(lengths)))


def sequences(parts: list[Rows], **changed: Any) -> Sequences:
    settings: dict[str, Any] = {"weights": [1.0] * len(parts), "seed": 3, "eval_share": 0.0, "batch_rows": 2}
    settings |= {"micro_rows": 2, "max_length": 8, "packed": True, "pad_id": 0, "cross_document": True}
    return Sequences(parts, **(settings | changed))


def predicted(data: Sequences, epoch: int) -> tuple[list[int], list[list[int]]]:
    """(the supervised tokens of an epoch, the ids of every row) as the trainer gets them."""
    targets, rows = [], []
    for step in range(epoch * data.steps_per_epoch, (epoch + 1) * data.steps_per_epoch):
        for batch in data.micro_batches(step):
            targets += batch["labels"][batch["labels"] != IGNORE].tolist()
        rows += [ids.tolist() for ids, _ in data.encoded(step)]
    return targets, rows


@given(lengths=DOCUMENTS, max_length=st.integers(8, 50), packed=st.booleans(), epoch=st.integers(0, 2))
def test_every_token_is_predicted_once_an_epoch(lengths: list[int], max_length: int, packed: bool, epoch: int) -> None:
    rows, total = corpus(lengths), sum(lengths)
    crossing = sequences([rows], max_length=max_length, packed=packed)
    targets, seen = predicted(crossing, epoch)
    order = crossing._stream(0, epoch).order
    end_to_end = np.concatenate([rows.row(int(document))[0] for document in order]).tolist()
    assert Counter(targets) == Counter(end_to_end[1:])
    assert sorted(map(len, seen), reverse=True)[: (total - 1) // (max_length - 1)] == [max_length] * (
        (total - 1) // (max_length - 1)
    ), "full length, but the last"
    assert all(ids in [end_to_end[at : at + len(ids)] for at in range(total)] for ids in seen)
    apart = sequences([rows], max_length=max_length, packed=packed, cross_document=False)
    targets, seen = predicted(apart, epoch)
    firsts = set(rows.starts[:-1].tolist())
    assert Counter(targets) == Counter(set(range(total)) - firsts), "nothing predicts a document's first token"
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    assert all(len(set(document_of[ids])) == 1 for ids in seen), "no row has two documents"


def test_documents_are_shuffled_by_seed_and_epoch_and_not_by_process() -> None:
    rows = [corpus([9] * 40), corpus([5] * 30, "b.txt")]
    one, same, other = sequences(rows), sequences(rows, rank=1, ranks=2), sequences(rows, seed=4)
    orders = [[data._stream(0, epoch).order.tolist() for epoch in range(2)] for data in (one, same, other)]
    assert orders[0] == orders[1] != orders[2] and orders[0][0] != orders[0][1]
    assert [ids.tolist() for ids, _ in one.encoded(7)] == [ids.tolist() for ids, _ in same.encoded(7)]
    weighted = sequences(rows, weights=[0.5, 2.0])
    assert weighted.rows_per_epoch == round(0.5 * one.sizes[0]) + 2 * one.sizes[1]
    told = load.tokens_by_source(one, one.steps_per_epoch)
    lengths = [len(ids) for step in range(one.steps_per_epoch) for ids, _ in one.encoded(step)]
    assert sum(told.values()) == sum(lengths) and told["a.txt"] == 40 * 9 + one.sizes[0] - 1
    part, number = one.rows_of(0)[0]
    ids = one.items(0)[0][2][0][0]
    inside = one._stream(part, 0).documents(number)
    assert set((np.searchsorted(rows[part].starts, ids, side="right")).tolist()) == set(inside.tolist())


def test_held_out_documents_are_not_trained_on() -> None:
    rows = corpus([7] * 50)
    data = sequences([rows], eval_share=0.2)
    held = {int(token) for document in data.split[0][1] for token in rows.row(int(document))[0]}
    targets, _ = predicted(data, 0)
    assert len(held) == 70 and not held & set(targets)


def test_an_epoch_drawn_anew_has_as_many_steps_as_the_first() -> None:
    """Its tokens are others, and may be fewer: then its first sequences come again."""
    rows, fewer = corpus([9] * 20), corpus([8] * 20)
    fewer.ids = fewer.ids + 1000
    data = sequences([rows], draws=[[rows], [fewer]])
    first, second = predicted(data, 0)[0], predicted(data, 1)[0]
    assert max(first) < 1000 <= min(second)
    assert data.sizes[0] > len(data._stream(0, 1)), "fewer, or this tests nothing"
    assert set(second) | {
        int(data._stream(0, 1).rows.ids[data._stream(0, 1).rows.starts[o]]) for o in [data._stream(0, 1).order[0]]
    } == set(fewer.ids.tolist())


def test_a_document_over_many_sequences_and_an_empty_one() -> None:
    rows = corpus([40, 1, 3])
    rows.starts = np.array([0, 40, 40, 44])
    stream = Stream(rows, np.array([1, 0, 2]), 8, cross_document=False)
    assert [len(ids) for number in range(len(stream)) for ids, _ in stream[number]][:5] == [8, 8, 8, 8, 8]
    assert [stream.documents(number).tolist() for number in (0, 5, 6)] == [[1], [1, 3], [3]]


@pytest.mark.parametrize("crosses", [True, False])
def test_what_a_document_sees_is_as_was_asked(unsloth: None, tmp_path: Path, cache: Path, crosses: bool) -> None:
    """The loss of the first step against transformers' own forward: of whole sequences, or of documents alone."""
    import torch

    from fasttune.core import model as models, prepare, train

    path = tmp_path / "docs.jsonl"
    texts = ["ang bahay ay malaki " * n for n in (1, 2, 3, 1, 4, 2)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"train": str(path), "layout": "concat", "cross_document": crosses}
    tree: dict[str, Any] = {"model": {"name": "builtin:tiny", "max_length": 48}, "data": data}
    tree["train"] = {"batch_rows": 4, "max_steps": 1}
    asked = config.parse(tree | {"output_dir": str(tmp_path / "run"), "eval": {"every": "never"}})
    result = train.run(asked, terminal.Reporter(quiet=True))
    job = prepare.prepare(
        config.parse(tree | {"output_dir": str(tmp_path / "again")}), tmp_path / "again", terminal.Reporter(quiet=True)
    )
    plain, _ = models.load(asked.model, "float32", "none", False, asked.seed)
    loss = count = 0.0
    for ids, _ in job.data.encoded(0):
        with torch.no_grad():
            logits = plain(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
        loss += float(
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:].astype(np.int64)), reduction="sum")
        )
        count += len(ids) - 1
    lengths = sorted(len(ids) for ids, _ in job.data.encoded(0))
    assert (lengths == [48] * 4) is crosses
    assert result.first_loss is not None and math.isclose(result.first_loss, loss / count, rel_tol=1e-5)


def test_the_layout_is_for_plain_text(tmp_path: Path, cache: Path, tiny_tokenizer: Any) -> None:
    tree = {"model": {"name": "builtin:tiny"}, "data": {"train": "builtin:arithmetic", "layout": "concat"}}
    with pytest.raises(DataError, match=r"has the form question_answer: data.layout=concat is for plain text"):
        load.encode(config.parse(tree), tiny_tokenizer, True, lambda what, share: None)
