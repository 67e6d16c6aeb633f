"""Corpora of continued pretraining: files of tokens, tokens split at random, several sources with their own figures."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttune import cli, config, terminal
from fasttune.data import corpus, files, load, megatron, store
from fasttune.errors import DataError

WORDS = "bahay maganda kumain nagluto pagkain dagat isda gabi bulaklak tinapay gaganda".split()


def write(path: Path, documents: int, seed: int) -> str:
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(4, 30))) for _ in range(documents))
    path.write_text("".join(json.dumps({"text": f"{text}."}) + "\n" for text in texts))
    return str(path)


def asked(train: Any, max_length: int = 64, tree: dict[str, Any] | None = None, **data: Any) -> config.Config:
    base = {"model": {"name": "builtin:tiny", "max_length": max_length}}
    return config.parse(base | {"data": {"train": train, "layout": "concat"} | data} | (tree or {}))


def encoded(settings: config.Config, tokenizer: Any) -> Any:
    return load.encode(settings, tokenizer, True, lambda what, share: None)


def test_tokens_on_disk_train_as_their_text_does(
    tmp_path: Path,
    cache: Path,
    tiny_tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "a.jsonl", 60, 0)
    (tmp_path / "c.yaml").write_text(
        f"model: {{name: builtin:tiny}}\ndata: {{train: {source}, tokenization: stochastok}}"
    )
    assert cli.main(["tokenize", "c.yaml", "--out", "tokens", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    text = encoded(asked(source, tokenization="stochastok"), tiny_tokenizer)
    binary = encoded(asked("tokens.bin"), tiny_tokenizer)
    assert len(load.nothing_split(text)) == 1, "a token of this model is a byte"
    assert not load.nothing_split(binary)
    assert (told["documents"], told["tokens"], told["bytes_a_token"]) == (60, len(text.parts[0].ids), 2)
    steps = range(text.steps_per_epoch)
    assert [[ids.tolist() for ids, _ in text.encoded(step)] for step in steps] == [
        [ids.tolist() for ids, _ in binary.encoded(step)] for step in steps
    ]
    assert cli.main(["tokenize", "c.yaml", "--out", "tokens"]) == 2, "nothing is overwritten"
    assert "tokens.bin is there already" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"holds tokens already, data.tokenization=stochastok needs text"):
        encoded(asked("tokens.bin", tokenization="stochastok"), tiny_tokenizer)
    with pytest.raises(DataError, match=r"holds the token id \d+, the tokenizer of the model has 40 tokens"):
        corpus.tokenized("tokens.bin", 40, None, True, lambda share: None)
    for setting, why in (("data.redraw=true", "hold one draw"), (f"data.train={{{source}: 2}}", "has the weight 2")):
        assert cli.main(["tokenize", "c.yaml", "--out", "other", setting, "data.layout=concat"]) == 2
        assert why in capsys.readouterr().err


@pytest.fixture
def merging(tiny_tokenizer: Any) -> Any:
    """A tokenizer whose tokens are of several letters, so that they can be split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    made.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return type(tiny_tokenizer)(tokenizer_object=made, eos_token="<eos>", chat_template="{{ messages }}")


@pytest.mark.parametrize("mode", ["stochastok", "patok"])
def test_splits_are_of_the_document_whoever_makes_them(
    tmp_path: Path, cache: Path, merging: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Of any number of processes; other ones in each epoch; never of what is measured on; the text stays."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 2000)
    source = write(tmp_path / "a.jsonl", 80, 1)
    how = {"tokenization": mode} | ({"affixes": "filipino"} if mode == "patok" else {"stochastok_p": 0.5})
    settings = asked(source, tree={"train": {"epochs": 3}}, redraw=True, eval_share=0.25, **how)
    alone = encoded(settings, merging)
    monkeypatch.setenv("FASTTUNE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(store, "POOL_FROM_CHUNKS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    pool = encoded(settings, merging)
    assert [part.ids.tolist() for (part,) in pool.draws] == [part.ids.tolist() for (part,) in alone.draws]
    first, second, third = ([part.row(at)[0].tolist() for at in range(80)] for (part,) in alone.draws)
    assert not load.nothing_split(alone) and first != second != third and alone.parts[0] is alone.draws[0][0]
    plain = encoded(asked(source), merging).parts[0]
    assert alone.parts[0].checksum != plain.checksum, "by which a resumed run knows that tokens were split otherwise"
    for epoch in (first, second, third):
        assert [merging.decode(ids) for ids in epoch] == [merging.decode(plain.row(at)[0]) for at in range(80)]
        assert all(ids[-1] == merging.eos_token_id for ids in epoch)
    held_out, _ = load.held_out(settings, merging, alone, lambda what, share: None)
    ((_, measured),) = held_out.items()
    whole = {tuple(plain.row(int(at))[0].tolist()) for at in alone.split[0][1]}
    assert {tuple(ids.tolist()) for ids, _ in measured} & whole, "held-out documents, as the tokenizer makes them"


def test_documents_of_one_token_leave_no_step_without_a_loss(
    unsloth: None,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ten of two tokens among ninety of one: a step of four sequences of eight would mostly have none of them."""
    from fasttune.core import train

    monkeypatch.chdir(tmp_path)
    lengths = np.where(np.arange(100) % 10 == 9, 2, 1)
    with megatron.Writer("ones", 100) as file:
        file.add_many(np.arange(lengths.sum()) % 90 + 3, lengths)
    tree = {"train": {"batch_rows": 1, "max_steps": 4}, "output_dir": "run", "eval": {"rows": 2}}
    asked_for = asked("ones.bin", max_length=8, tree=tree, eval_share=0.2)
    result = train.run(asked_for, terminal.Reporter(quiet=True))
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert result.status == "completed" and len(steps) == 4
    assert min(step["loss_tokens"] for step in steps) > 0 and min(step["loss"] for step in steps) > 1
    (told,) = [each.value for each in result.settings if each.name == "data" and "ones.bin" in each.value]
    Path("c.yaml").write_text(
        "model: {name: builtin:tiny, max_length: 8}\ndata: {train: ones.bin, layout: concat}\neval: {every: never}\n"
    )
    capsys.readouterr()
    assert cli.main(["data", "c.yaml", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["rows"] == figures["data_sets"][0]["rows_kept"] == 10 and figures["tokens"] == 20
    assert sum(figures["data_sets"][0]["rows_dropped"].values()) == 90 and figures["lengths"]["shortest_tokens"] == 2
    assert "10 documents, 20 tokens" in told and "90 dropped: of fewer than two tokens" in told
    crossing = encoded(asked("ones.bin", max_length=8, cross_document=True), _tokens_of(100))
    assert crossing.parts[0].counts["kept"] == 100 and len(crossing.split[0][0]) == 100


def _tokens_of(count: int) -> Any:
    """What is asked of a tokenizer where the files hold tokens."""
    return type("Tokens", (), {"__len__": lambda self: count, "pad_token_id": 0})()


def test_a_file_of_tokens_is_read_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with megatron.Writer("some", 100) as file:
        file.add_many(np.arange(90), np.full(9, 10))
    first = encoded(asked("some.bin"), _tokens_of(100)).parts[0].checksum
    read, plain = list[int](), np.memmap.__getitem__

    def counting(self: Any, at: Any) -> Any:
        found = plain(self, at)
        read.append(found.nbytes if self.dtype == "<u2" else 0)
        return found

    monkeypatch.setattr(np.memmap, "__getitem__", counting)
    assert encoded(asked("some.bin"), _tokens_of(100)).parts[0].checksum == first
    assert 180 <= sum(read) < 200
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    Path("some.bin").write_bytes(Path("some.bin").read_bytes()[:-2] + b"\x01\x00")
    assert encoded(asked("some.bin"), _tokens_of(100)).parts[0].checksum != first
    assert encoded(asked("some.bin", max_rows=8), _tokens_of(89)).parts[0].counts["tokens"] == 80


def test_of_a_corpus_that_is_split_only_held_out_documents_are_tokenised_again(
    tmp_path: Path, cache: Path, merging: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", 80, 1)
    settings = asked({source: 1.0}, eval_share=0.1, tokenization="stochastok", tree={"eval": {"rows": 1000}})
    made, texts = encoded(settings, merging), list[int]()
    encode = store.Encoder.encode

    def counting(self: Any, chunk: Any) -> Any:
        block = encode(self, chunk)
        texts.extend(block.numbers.tolist())
        return block

    monkeypatch.setattr(store.Encoder, "encode", counting)
    found, _ = load.held_out(settings, merging, made, lambda what, share: None)
    assert texts == made.parts[0].numbers[made.split[0][1]].tolist() and len(texts) == 8
    monkeypatch.setattr(store.Encoder, "encode", encode)
    plain = encoded(asked(source), merging).parts[0]
    whole = np.concatenate([plain.row(number - 1)[0] for number in texts])
    rows = found[source]
    assert sum(len(ids) - 1 for ids, _ in rows) == len(whole) - 8, "each token once, but a document's first"
    assert set(np.concatenate([ids for ids, _ in rows]).tolist()) == set(whole.tolist())


@pytest.mark.parametrize("changed", ["affixes", "cross_document"])
def test_another_corpus_is_not_resumed(
    unsloth: None,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: str,
) -> None:
    """By the command. A token of this model is a byte, so the tokens are the same with any affixes."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", 40, 4)
    Path("affixes.txt").write_text("mag-\n-an\n")
    Path("c.yaml").write_text(
        "model: {name: builtin:tiny, max_length: 32}\noutput_dir: run\ntrain: {batch_rows: 2, max_steps: 3}\n"
        "data: {train: a.jsonl, layout: concat, tokenization: patok, affixes: affixes.txt}\n"
    )
    assert cli.main(["train", "c.yaml", "checkpoint.max_hours=0.000001"]) == 143
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"
    if changed == "affixes":
        Path("affixes.txt").write_text("mag-\n-in\n")
    capsys.readouterr()
    other = ["data.cross_document=true"] if changed == "cross_document" else []
    assert cli.main(["train", "c.yaml", "--resume", "run", *other]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "belongs to another run" in line]
    assert (f"{changed} sha256" if changed == "affixes" else "cross_document=False") in told and "Set that back" in told
    Path("affixes.txt").write_text("mag-\n-an\n")
    assert cli.main(["train", "c.yaml", "--resume", "run"]) == 0


def test_each_source_has_its_figures(unsloth: None, tmp_path: Path, cache: Path) -> None:
    from fasttune.core import train

    sources = {write(tmp_path / "a.jsonl", 60, 2): 1.0, write(tmp_path / "b.jsonl", 30, 3): 2.0}
    tree = {"train": {"batch_rows": 4, "max_steps": 5, "learning_rate": 0.01}, "output_dir": str(tmp_path / "run")}
    settings = asked(sources, tree=tree, cross_document=True, eval_share=0.2)
    result = train.run(settings, terminal.Reporter(quiet=True))
    told = {Path(each.source).name: each for each in result.sources}
    assert sum(each.tokens for each in told.values()) == result.tokens and min(e.tokens for e in told.values()) > 0
    held = result.held_out
    assert held is not None and held.after is not None and held.before is not None
    losses = list(held.after.loss_by_source.values())
    assert len(losses) == 2 and min(losses) < held.after.loss < max(losses)
    assert all(each.last_loss < each.first_loss for each in told.values() if each.last_loss and each.first_loss)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "perplexity" in page and "a.jsonl" in page


def test_what_leaves_nothing_to_train_or_to_measure_is_refused(
    tmp_path: Path, cache: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with megatron.Writer("ones", 100) as file:
        file.add_many(np.full(5, 2), np.ones(5, np.int64))
    source = write(tmp_path / "a.jsonl", 20, 0)

    def held_out(settings: config.Config) -> list[str]:
        made = encoded(settings, tiny_tokenizer)
        found, warnings = load.held_out(settings, tiny_tokenizer, made, lambda what, share: None)
        load.check_held_out(settings, found)
        return warnings

    with pytest.raises(DataError, match=r"no document of ones.bin has two tokens"):
        held_out(asked("ones.bin"))
    with pytest.raises(DataError, match=r"the weights leave no row"):
        held_out(asked({source: 0.001}))
    with pytest.raises(DataError, match=r"data.eval=ones.bin has nothing to predict"):
        held_out(asked(source, eval="ones.bin"))
    with pytest.raises(DataError, match=r"data.eval_share=0.001 holds no row out"):
        held_out(asked(source, eval_share=0.001))
    some = tmp_path / "some.jsonl"
    some.write_text('{"text": "bago ito"}\n' + "".join(Path(source).read_text().splitlines(True)[:3]))
    assert "of 4 held-out documents 3 are trained on" in held_out(asked(source, eval=str(some)))[0]


def test_a_config_with_a_best_step_and_problems_can_be_tokenised(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", 20, 0)
    (tmp_path / "c.yaml").write_text(
        "model: {name: builtin:tiny}\ndata: {train: a.jsonl, eval_share: 0.1}\nsamples: 2\n"
        "eval: {every: 1 steps, keep_best: true, problems: 1}\ntrain: {group_by_prompt: true}"
    )
    assert cli.main(["tokenize", "c.yaml", "--out", "tokens"]) == 0
