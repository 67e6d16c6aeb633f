"""Text and spans → ids and labels: exactly the learned characters, whatever the tokenizer and the length limit."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fasttune.data import tokenize, windows
from fasttune.data.chat import Template
from fasttune.data.sources import Chunk
from fasttune.data.tokenize import IGNORE, Block, Encoder, Recipe
from fasttune.errors import DataError

END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
CONVERSATIONS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def encode(recipe: Recipe, rows: list[dict[str, Any]]) -> Block:
    return Encoder(recipe).encode(Chunk("rows.jsonl", 1, 1.0, rows=rows))


def pieces(block: Block) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) of each row."""
    ends = np.cumsum(block.lengths)[:-1]
    pairs = zip(np.split(block.ids, ends), np.split(block.supervised, ends), strict=True)
    return [(ids, tokenize.labels(ids, learned)) for ids, learned in pairs]


def learned_text(recipe: Recipe, block: Block) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(recipe.tokenizer_json)
    return [
        tokenizer.decode([int(i) for i in labels if i != IGNORE], skip_special_tokens=False)
        for _, labels in pieces(block)
    ]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]}


def words(tokenizer: Any) -> Recipe:
    """A recipe of a tokenizer made here, for ChatML."""
    special = {"eos_token": END}
    return Recipe(tokenizer.to_str(), Template(CHATML, special, False), "messages", (), "assistant", 512, "truncate")


@given(CONVERSATIONS)
def test_any_conversation_learns_its_answers_and_their_ends(tiny_recipe: Recipe, turns: list[tuple[str, str]]) -> None:
    block = encode(tiny_recipe, [chat(*turns)])
    assert learned_text(tiny_recipe, block) == ["".join(answer + END for _, answer in turns)]
    last = encode(replace(tiny_recipe, train_on="last"), [chat(*turns)])
    assert learned_text(tiny_recipe, last) == [turns[-1][1] + END]
    assert (last.ids == block.ids).all()
    whole = encode(replace(tiny_recipe, train_on="all"), [chat(*turns)])
    text = "".join(f"<|im_start|>user\n{q}{END}\n<|im_start|>assistant\n{a}{END}\n" for q, a in turns)
    assert learned_text(tiny_recipe, whole) == [text.removeprefix("<|im_start|>")]  # nothing predicts the first token


@given(st.lists(CONVERSATIONS, min_size=1, max_size=5))
def test_rows_of_a_chunk_do_not_mix(tiny_recipe: Recipe, rows: list[list[tuple[str, str]]]) -> None:
    together = encode(tiny_recipe, [chat(*turns) for turns in rows])
    alone = [encode(tiny_recipe, [chat(*turns)]) for turns in rows]
    assert (together.ids == np.concatenate([block.ids for block in alone])).all()
    assert (together.supervised == np.concatenate([block.supervised for block in alone])).all()
    assert together.lengths.tolist() == [int(block.lengths[0]) for block in alone]
    assert together.numbers.tolist() == list(range(1, len(rows) + 1))


@given(CONVERSATIONS, st.integers(8, 60))
def test_split_learns_every_label_exactly_once(tiny_recipe: Recipe, turns: list[tuple[str, str]], limit: int) -> None:
    whole = encode(tiny_recipe, [chat(*turns)])
    split = encode(replace(tiny_recipe, max_length=limit, too_long="split"), [chat(*turns)])
    learned = [labels[labels != IGNORE] for _, labels in pieces(split)]
    ((_, expected),) = pieces(whole)
    assert np.concatenate(learned).tolist() == expected[expected != IGNORE].tolist()
    assert max(split.lengths) <= limit
    assert all(len(row) for row in learned)
    assert set(split.numbers.tolist()) == {1}
    assert split.counts["split"] == (_tokens(tiny_recipe, turns) > limit)
    assert split.supervised.sum() == whole.supervised.sum()


def _tokens(recipe: Recipe, turns: list[tuple[str, str]]) -> int:
    return int(encode(replace(recipe, train_on="all"), [chat(*turns)]).lengths[0])


@given(CONVERSATIONS, st.integers(8, 60))
def test_truncate_learns_what_fits(tiny_recipe: Recipe, turns: list[tuple[str, str]], limit: int) -> None:
    whole = encode(tiny_recipe, [chat(*turns)])
    cut = encode(replace(tiny_recipe, max_length=limit), [chat(*turns)])
    ((ids, labels),) = pieces(whole)
    kept = [index for index, label in enumerate(labels[:limit]) if label != IGNORE]
    assert cut.lengths.tolist() == ([kept[-1] + 1] if kept else [])
    assert cut.ids.tolist() == ids[: kept[-1] + 1 if kept else 0].tolist()
    assert cut.supervised.nonzero()[0].tolist() == kept
    assert cut.counts["truncated"] == (_tokens(tiny_recipe, turns) > limit)
    assert bool(cut.counts[f"dropped: no supervised token within model.max_length={limit}"]) == (not kept)


def test_drop_leaves_the_long_ones_out_and_counts_them(tiny_recipe: Recipe) -> None:
    rows = [chat(("q", "a" * length)) for length in (3, 400, 4)]
    block = encode(replace(tiny_recipe, max_length=100, too_long="drop"), rows)
    assert learned_text(tiny_recipe, block) == ["aaa" + END, "aaaa" + END]
    assert (block.counts["rows"], block.counts["dropped_too_long"], block.examples) == (3, 1, {})
    assert block.numbers.tolist() == [1, 3]


def test_a_row_of_exactly_the_limit_fits(tiny_recipe: Recipe) -> None:
    row = chat(("q", "answer"))
    length = _tokens(tiny_recipe, [("q", "answer")])
    for too_long, count in (("drop", "dropped_too_long"), ("truncate", "truncated"), ("split", "split")):
        exact = encode(replace(tiny_recipe, max_length=length, too_long=too_long), [row])
        assert (len(exact.lengths), exact.counts[count]) == (1, 0)
        assert encode(replace(tiny_recipe, max_length=length - 1, too_long=too_long), [row]).counts[count] == 1


def test_what_follows_the_last_learned_token_is_cut_off(tiny_recipe: Recipe) -> None:
    row = {"messages": [*chat(("q", "a"))["messages"], {"role": "user", "content": "thanks, that is all"}]}
    assert encode(tiny_recipe, [row]).ids.tolist() == encode(tiny_recipe, [chat(("q", "a"))]).ids.tolist()
    assert encode(tiny_recipe, [row]).supervised[-1]


def test_plain_text_is_learned_whole_and_ends(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, form="text")
    block = encode(recipe, [{"text": "once upon"}])
    assert learned_text(recipe, block) == ["nce upon" + END]  # nothing predicts the first token
    split = encode(replace(recipe, max_length=9, too_long="split"), [{"text": "abcdefghijklmnopqrstuvwxyz"}])
    assert "".join(learned_text(recipe, split)) == "bcdefghijklmnopqrstuvwxyz" + END
    assert split.supervised.sum() == 26


def test_rows_that_teach_nothing_are_counted_and_one_of_each_is_kept_to_show(tiny_recipe: Recipe) -> None:
    asked = {"messages": chat(("q" * 900, "a"))["messages"][:1]}
    zero = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    block = encode(tiny_recipe, [asked, chat(("q", "")), chat(("q", " ")), chat(("q", "a")), zero])
    assert block.counts == {
        "rows": 5,
        "dropped: no assistant turn": 1,
        "dropped: empty answer": 2,
        "dropped: no supervised token": 1,
    }
    assert set(block.examples) == {"no assistant turn", "empty answer", "no supervised token"}
    assert "qqq" in block.examples["no assistant turn"]
    assert max(map(len, block.examples.values())) <= tokenize.SHOWN_CHARACTERS + 1
    assert block.numbers.tolist() == [4]


def test_a_chunk_without_any_usable_row(tiny_recipe: Recipe) -> None:
    block = encode(tiny_recipe, [chat(("q", ""))])
    assert [len(array) for array in (block.ids, block.supervised, block.lengths, block.numbers)] == [0] * 4
    assert (block.ids.dtype, block.lengths.dtype, block.supervised.dtype) == (np.int32, np.int32, bool)


def test_columns_and_form_are_the_recipes(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, form="question_answer", columns=(("answer", "solution"), ("question", "problem")))
    assert learned_text(recipe, encode(recipe, [{"problem": "q", "solution": "a"}])) == ["a" + END]
    with pytest.raises(DataError, match="data.columns: rows.jsonl row 2 has no solution; it has problem"):
        encode(recipe, [{"problem": "q", "solution": "a"}, {"problem": "q"}])


@pytest.mark.parametrize("answer", ["😀", "a😀", "😀a", "日本", "é", "👩‍👩‍👧"])
def test_a_character_of_several_tokens_is_learned_whole(tiny_recipe: Recipe, answer: str) -> None:
    block = encode(tiny_recipe, [chat(("x😀", answer), ("😀", "b"))])
    assert learned_text(tiny_recipe, block) == [answer + END + "b" + END]


def _byte_level(trim: bool) -> Any:
    """Bytes and two merges: ` a` is one token; with `trim`, its offsets leave the blank out, as GPT-2's do."""
    from tokenizers import Tokenizer

    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "ĠĠ", "Ċa"]
    merges = [("Ġ", "a"), ("Ġ", "Ġ"), ("Ċ", "a")]
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not trim)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=trim)
    raw.add_special_tokens(["<|im_start|>", END])
    return raw


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("answer", ["a", " a", "  a a", "a  ", "a \n", " a😀 a", "b a"])
def test_blanks_at_the_edge_of_an_answer_lose_no_token(trim: bool, answer: str) -> None:
    """A token that begins in the prompt is not learned (`\\n` and `a` may be one), one that begins in the answer is."""
    recipe = words(_byte_level(trim))
    (found,) = learned_text(recipe, encode(recipe, [chat(("a a", answer))]))
    whole = "\n" + answer + END
    assert found in (answer + END, whole.removeprefix("\na"))
    if not (answer.startswith("a") and _merges_with_the_prompt(recipe)):
        assert found == answer + END


def _merges_with_the_prompt(recipe: Recipe) -> bool:
    from tokenizers import Tokenizer

    return "Ċa" in Tokenizer.from_str(recipe.tokenizer_json).encode("assistant\na").tokens


def test_labels_are_the_ids_where_learned_but_never_the_first() -> None:
    found = tokenize.labels(np.array([5, 6, 7], np.int32), np.array([True, False, True]))
    assert (found.tolist(), found.dtype) == ([IGNORE, IGNORE, 7], np.int64)


def test_a_sentencepiece_like_tokenizer_keeps_its_first_word() -> None:
    """Metaspace prefixes words with `▁`, whose offset is the blank before; a leading blank belongs to the answer."""
    from tokenizers import Tokenizer

    vocabulary = ["<unk>", "▁Hi", "▁Hello", "▁you", "▁", *(chr(code) for code in range(33, 127)), "\n"]
    raw = Tokenizer(models.Unigram([(token, -1.0 * len(token)) for token in vocabulary], 0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Metaspace(prepend_scheme="never")
    raw.add_special_tokens(["<|im_start|>", END])
    recipe = words(raw)
    block = encode(recipe, [chat(("Hi you", " Hello you"), ("Hi", "you Hello"))])
    assert learned_text(recipe, block) == [" Hello you" + END + "you Hello" + END]


def test_half_a_character_is_named(tiny_recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl row 2 holds half a character, \\ud83d after .*é b '") as caught:
        encode(tiny_recipe, [chat(("q", "é 😀")), chat(("q", "é b \ud83d"))])
    assert str(caught.value).isprintable()


def test_turns_not_to_be_trained_on_and_every_token_contradict_each_other(tiny_recipe: Recipe) -> None:
    row = chat(("q", "wrong"), ("q", "right"))
    row["messages"][1]["train"] = False
    assert learned_text(tiny_recipe, encode(tiny_recipe, [row])) == ["right" + END]
    with pytest.raises(DataError, match="row 1 has turns not to be trained on, which data.train_on=all would ignore"):
        encode(replace(tiny_recipe, train_on="all"), [row])


def test_bad_answers_are_refused_in_any_row(tiny_recipe: Recipe) -> None:
    with pytest.raises(DataError, match="row 2 is preference data: label is false"):
        encode(tiny_recipe, [{**chat(("q", "a")), "label": label} for label in (True, False)])


def test_what_is_not_used_is_counted_and_named(tiny_recipe: Recipe) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "<image>", "train": True, "id": 7}]
    row = {"conversations": [*turns, {"from": "gpt", "value": "a", "id": None}], "system": "other", "source": "web"}
    rows = [row, {**row, "source": None, "system": "s"}]
    counts = encode(replace(tiny_recipe, form="conversations"), rows).counts
    assert {name: n for name, n in counts.items() if name != "rows"} == {
        "not used: column source": 1,
        "not used: column system beside a system turn": 1,
        "not used: id of a turn": 2,
        "not used: train: true of a human turn": 2,
        "only text: <image>": 2,
    }


@pytest.mark.parametrize("too_long", ["truncate", "drop", "split"])
def test_a_row_longer_than_a_window_is_cut_as_any_other(
    tiny_recipe: Recipe, too_long: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny_recipe, too_long=too_long, max_length=200)
    rows = [chat(("q" * 90, "été " * 300), ("r", "b" * 700)), chat(("q", "a"))]
    at_once = encode(recipe, rows)
    monkeypatch.setattr(tokenize, "WINDOW", 400)
    monkeypatch.setattr(windows, "OVERLAP", 80)
    in_windows = encode(recipe, rows)
    assert (in_windows.ids.tolist(), in_windows.supervised.tolist()) == (
        at_once.ids.tolist(),
        at_once.supervised.tolist(),
    )
    assert (in_windows.lengths.tolist(), in_windows.counts) == (at_once.lengths.tolist(), at_once.counts)


def test_control_tokens_in_a_text_are_counted_and_named(tiny_recipe: Recipe) -> None:
    rows = [chat(("Say <|im_end|>", "a")), chat(("q", "<|im_start|><|im_start|>")), chat(("<|im_end", "a <b>"))]
    block = encode(tiny_recipe, rows)
    assert {name: n for name, n in block.counts.items() if name.startswith("control token")} == {
        "control token: <|im_end|>": 1,
        "control token: <|im_start|>": 1,
    }


@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "a", " ", "\n", "<|im_end", "é"]), min_size=1))
def test_control_tokens_as_text_are_the_text_that_they_are(tiny_recipe: Recipe, words: list[str]) -> None:
    """No id of a control token but those of the template, and the text and what is learned stay the same."""
    from tokenizers import Tokenizer

    said = "".join(words) + "x"
    row = chat((said, said))
    block = encode(replace(tiny_recipe, control_tokens="text", max_length=4096), [row])
    kept = encode(replace(tiny_recipe, max_length=4096), [row])
    tokenizer = Tokenizer.from_str(tiny_recipe.tokenizer_json)
    assert tokenizer.decode(block.ids.tolist(), skip_special_tokens=False) == tokenizer.decode(
        kept.ids.tolist(), skip_special_tokens=False
    )
    assert learned_text(tiny_recipe, block) == [said + END]
    end, start = tokenizer.token_to_id(END), tokenizer.token_to_id("<|im_start|>")
    assert [int(token) for token in block.ids if token in (end, start)] == [start, end, start, end]


def test_control_tokens_of_a_plain_text_are_text_too(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, form="text", control_tokens="text")
    block = encode(recipe, [{"text": "a<|im_end|>b"}])
    assert learned_text(recipe, block) == ["<|im_end|>b" + END]
    assert len(block.ids) == len("a<|im_end|>b") + 1
    assert not len(encode(recipe, [{"text": "a<|im_end|>\ue000"}]).lengths)  # what would mark them is there already


def test_a_template_that_refuses_every_row_is_not_asked_for_all_of_them(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, template=Template("{{ 1 / 0 }}", {}, False))
    with pytest.raises(DataError, match=r"rows.jsonl row 100: this row and all 99 before it are refused by the chat"):
        encode(recipe, [chat(("q", "a"))] * 150)
    refused = encode(recipe, [chat(("q", "a"))] * 99)
    assert refused.counts["dropped: refused by the chat template (division by zero)"] == 99


def test_what_the_template_leaves_out_is_counted_where_that_is_allowed(tiny_recipe: Recipe) -> None:
    row = chat(("q", "a"))
    row["messages"][1]["reasoning_content"] = "because"
    with pytest.raises(DataError, match=r"rows.jsonl row 1: the chat template leaves out its reasoning"):
        encode(tiny_recipe, [row])
    block = encode(replace(tiny_recipe, allow_lost=("reasoning",)), [row, chat(("q", "a"))])
    assert (block.counts["lost: reasoning"], len(block.lengths)) == (1, 2)


LONG_WORDS = ["the", "of", "river", "lake", "été", "日本語", "😀", "  ", "\n\n", "x" * 40, "1234567", "don't", "Tagus,"]


def long_text(words: int) -> str:
    chosen = random.Random(0)
    return " ".join(chosen.choice(LONG_WORDS) for _ in range(words))


@pytest.fixture(params=["byte level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = tokenizers.Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet() if request.param == "byte level" else []
    made.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if request.param == "byte level"
        else pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([long_text(40)] * 3, trainer)
    return made


class Watched:
    """Remembers how long the texts are that a tokenizer is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.lengths = tokenizer, list[int]()

    def encode(self, text: str, **options: Any) -> Any:
        self.lengths.append(len(text))
        return self.tokenizer.encode(text, **options)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.lengths += map(len, texts)
        return self.tokenizer.encode_batch(texts, **options)


def test_windows_give_the_tokens_of_the_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "WINDOW", 1500)
    monkeypatch.setattr(windows, "OVERLAP", 300)
    long, short = long_text(3000), "the river"
    watched = Watched(tokenizer)
    first, whole, last = tokenize.encode_batch(watched, [short, long, short], enough=None)
    expected = tokenizer.encode(long, add_special_tokens=False)
    assert whole.ids.tolist() == expected.ids
    assert whole.starts.tolist() == [start for start, _ in expected.offsets]
    assert first.ids == last.ids == tokenizer.encode(short).ids
    assert max(watched.lengths) <= 1500
    for at in (0, 1, 777, len(long) - 1):
        token = whole.char_to_token(at)
        assert whole.token_to_chars(token)[0] <= at
        assert token + 1 == len(whole.ids) or whole.token_to_chars(token + 1)[0] >= at


def test_what_is_cut_off_is_not_encoded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "WINDOW", 1500)
    monkeypatch.setattr(windows, "OVERLAP", 300)
    watched, long = Watched(tokenizer), long_text(30_000)
    (cut,) = tokenize.encode_batch(watched, [long], enough=100)
    assert cut.ids[:100].tolist() == tokenizer.encode(long, add_special_tokens=False).ids[:100]
    assert sum(watched.lengths) < len(long) / 10
