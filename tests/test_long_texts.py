"""Long texts are encoded in windows: the same tokens as at once, and never more than a window at a time."""

import random
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fasttune.data import long_texts

WORDS = ["the", "of", "river", "lake", "été", "日本語", "😀", "  ", "\n\n", "x" * 40, "1234567", "don't", "Tagus,"]


def text_of(words: int) -> str:
    chosen = random.Random(0)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


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
    made.train_from_iterator([text_of(40)] * 3, trainer)
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
    monkeypatch.setattr(long_texts, "WINDOW", 1500)
    monkeypatch.setattr(long_texts, "OVERLAP", 300)
    long, short = text_of(3000), "the river"
    watched = Watched(tokenizer)
    first, whole, last = long_texts.encode_batch(watched, [short, long, short], enough=None)
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
    monkeypatch.setattr(long_texts, "WINDOW", 1500)
    monkeypatch.setattr(long_texts, "OVERLAP", 300)
    watched, long = Watched(tokenizer), text_of(30_000)
    (cut,) = long_texts.encode_batch(watched, [long], enough=100)
    assert cut.ids[:100].tolist() == tokenizer.encode(long, add_special_tokens=False).ids[:100]
    assert sum(watched.lengths) < len(long) / 10
