"""Plain text: what a document is, folders and patterns of files, and what a killed process leaves of its tokens."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings as examples, strategies as st

from fasttune import config
from fasttune.data import files, load, sources, store, texts
from fasttune.data.sources import Chunk
from fasttune.data.tokenize import Recipe
from fasttune.errors import ConfigError, DataError


def documents(source: str, what: str | None) -> list[tuple[int, str]]:
    chunks = sources.read(source, "train", documents=what)
    return [(number, row["text"]) for chunk in chunks for number, _, row in chunk.numbered()]


def test_a_document_is_what_was_said(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\n\n \t\n\nthree\n")
    assert documents(str(path), "line") == [(1, "one"), (2, "two"), (6, "three")]  # lines as an editor counts them
    assert documents(str(path), "blank_line") == [(1, "one\r\ntwo"), (2, "three")]
    assert documents(str(path), "file") == [(1, "one\r\ntwo\n\n \t\n\nthree\n")]
    with pytest.raises(DataError, match=r"text.txt is plain text: say what a document of it is, data.documents=file"):
        documents(str(path), None)


@examples(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from(["a", "bé", " c", "", " ", "\t", "\r"]), min_size=2, max_size=30),
    block=st.integers(1, 9),
)
def test_documents_do_not_depend_on_how_a_file_is_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], block: int
) -> None:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_bytes("\n".join(lines).encode())
    expected: dict[str, list[str]] = {"line": [], "blank_line": []}
    together: list[str] = []
    for line in [*lines, ""]:
        bare = line.removesuffix("\r")
        expected["line"] += [bare] if bare.strip() else []
        if bare.strip():
            together.append(line)
        elif together:
            expected["blank_line"].append("\n".join(together).rstrip("\r"))
            together = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "BLOCK_BYTES", block)
        for what, found in expected.items():
            assert [text for _, text in documents(str(path), what)] == found


def test_bad_texts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"good\n\nb\xe9se\n")
    with pytest.raises(DataError, match=r"text.txt document 2 is not UTF-8 \(byte 0xe9\)"):
        documents(str(path), "blank_line")
    monkeypatch.setattr(texts, "MAX_BYTES", dict.fromkeys(texts.MAX_BYTES, 10))
    path.write_bytes(b"x" * 30)
    with pytest.raises(DataError, match=r"a document of over 0 MiB: set data.documents to what its documents are"):
        documents(str(path), "line")


def test_a_folder_and_a_pattern_are_read_file_by_file(tmp_path: Path, cache: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "b.txt").write_text("from b\nand more")
    (folder / "below" / "c.jsonl").write_text('{"text": "from c"}\n')
    (folder / "a.txt").write_text("from a\n\n")
    (folder / "notes.md").write_text("no text of the corpus")
    (folder / ".hidden.txt").write_text("no text either")
    assert documents(str(folder), "line") == [(1, "from a"), (3, "from b"), (4, "and more"), (5, "from c")]
    assert [text for _, text in documents(str(folder / "*.txt"), "line")] == ["from a", "from b", "and more"]
    assert sources.not_read(str(folder)) == ["notes.md"]
    shares = [chunk.done for chunk in sources.read(str(folder), "train", documents="line")]
    assert shares == sorted(shares) and shares[-1] == 1.0
    asked = config.parse({"model": {"name": "builtin:tiny"}, "data": {"train": str(folder), "documents": "line"}})
    (line,) = load.describe(load.encode(asked, tiny_tokenizer, True, lambda what, share: None))
    assert "4 rows" in line and line.endswith("not read: notes.md")
    before = sources.fingerprint(str(folder), "train", "train")
    (folder / "b.txt").write_text("from b\nand less")
    assert sources.fingerprint(str(folder), "train", "train") != before
    (folder / "b.txt").write_bytes(b"fine\n\xff")
    with pytest.raises(DataError, match=r"b.txt document 2 is not UTF-8"):  # the file, not the folder
        documents(str(folder), "line")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"nothing: no file there ends in one of .jsonl"):
        sources.check_source(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"\*.csv: no file there ends in one of"):
        sources.check_source(str(folder / "*.csv"))
    with pytest.raises(DataError, match=r"is a pattern, it has no splits"):
        sources.check_source(str(folder / "*.txt"), "test")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"cross_document": True}, "cross_document would be ignored: rows see no other"),
        ({"train": "a.bin"}, "a.bin holds documents of any length: set data.layout=concat"),
        ({"layout": "concat", "too_long": "drop"}, "too_long=drop would be ignored"),
        ({"stochastok_p": 0.1}, "stochastok_p would be ignored by data.tokenization=vanilla"),
        ({"tokenization": "stochastok", "affixes": "filipino"}, "affixes would be ignored by data.tokenization=stoch"),
        ({"tokenization": "patok"}, "patok needs affixes"),
        ({"tokenization": "stochastok", "redraw": True}, "redraw needs data.layout=concat"),
        ({"layout": "concat", "train_on": "last"}, "train_on would be ignored: plain text has no turns"),
        ({"format": "text", "allow_lost": ["tools"]}, "allow_lost would be ignored: plain text has no turns"),
        ({"train": "a.bin", "layout": "concat", "control_tokens": "text"}, "control_tokens would be ignored"),
        ({"eval": "b.txt", "eval_split": "validation"}, "eval_split=validation would be ignored"),
        ({"layout": "concat", "eval_share": 0.1, "samples": 1}, "no problem to answer in data.layout=concat"),
    ],
)
def test_what_would_be_ignored_is_refused(data: dict[str, Any], told: str) -> None:
    samples = {"samples": data.pop("samples", 0)}
    with pytest.raises(ConfigError, match=told):
        config.parse({"model": {"name": "builtin:tiny"}, "data": {"train": "a.txt"} | data} | samples)


def test_what_would_be_ignored_is_refused_where_the_rows_say_that_they_are_text(tmp_path: Path) -> None:
    from fasttune.core import prepare

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "isa"}\n')
    tree = {"model": {"name": "builtin:tiny"}, "data": {"train": str(path), "train_on": "last"}}
    with pytest.raises(ConfigError, match="train_on would be ignored"):
        prepare.check_sources_and_model(config.parse(tree))
    path.write_text('{"question": "isa?", "answer": "dalawa"}\n')
    prepare.check_sources_and_model(config.parse(tree))


class Ended(BaseException):
    """A process that is killed."""


def test_a_killed_process_loses_a_part_of_its_tokens_only(
    tmp_path: Path, cache: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SAVE_CHUNKS", 3)
    path, recipe = tmp_path / "text.txt", replace(tiny_recipe, form="text")
    path.write_text("".join(f"document {n}\n" for n in range(100)))
    seen: list[int] = []

    def chunks(end: int) -> Iterator[Chunk]:
        lines = path.read_text().splitlines()
        for at in range(0, 100, 5):
            if at == end:
                raise Ended
            yield Chunk("text.txt", at + 1, (at + 5) / 100, [{"text": text} for text in lines[at : at + 5]])

    encode = store.Encoder.encode
    monkeypatch.setattr(store.Encoder, "encode", lambda self, chunk: seen.append(chunk.first) or encode(self, chunk))
    monkeypatch.setattr(store, "POOL_FROM_CHUNKS", 1)  # so that chunks are read as they are encoded
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    for end in (40, 75):
        with pytest.raises(Ended):
            store.stored("text.txt", "key", recipe, lambda end=end: chunks(end), lambda share: None)
    rows = store.stored("text.txt", "key", recipe, lambda: chunks(-1), lambda share: None)
    assert seen == [*range(1, 41, 5), *range(31, 76, 5), *range(76, 101, 5)], "8 chunks, from the 7th, from the 16th"
    whole = store.stored("text.txt", "other", recipe, lambda: chunks(-1), lambda share: None)
    assert rows.ids.tolist() == whole.ids.tolist() and rows.numbers.tolist() == list(range(1, 101))
    assert rows.counts == whole.counts
    assert len(list(cache.iterdir())) == 2, "nothing unfinished is left"


def test_a_folder_with_a_link_back_to_itself_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("isa\n")
    (tmp_path / "inner" / "loop").symlink_to("..")
    (tmp_path / "inner" / "again").symlink_to("../inner")
    assert files.several(str(tmp_path))[0] == [tmp_path / "inner" / "a.txt"]
    assert sources.not_read(str(tmp_path)) == ["again (a link)", "loop (a link)"]


def test_a_pattern_reads_each_file_once_and_follows_no_loop(tmp_path: Path) -> None:
    """glob follows each of the links at each level: 3 ** 40 names."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for name in ("a.txt", "inner/b.txt", "inner/notes.md"):
        (folder / name).write_text("isa\n")
    for name, target in (("inner/one", ".."), ("inner/two", ".."), ("inner/three", "../inner"), ("b.txt", "a.txt")):
        (folder / name).symlink_to(target)
    (folder / "gone.txt").symlink_to("nothing.txt")
    both = [folder / "a.txt", folder / "inner" / "b.txt"]
    for pattern, read, left in (
        ("**/*.txt", both, ["b.txt", "gone.txt", "one", "three", "two"]),
        ("**", both, ["b.txt", "gone.txt", "notes.md", "one", "three", "two"]),
        ("*.txt", both[:1], ["b.txt", "gone.txt"]),
        ("*/*.txt", both[1:], []),
        ("b*.txt", [folder / "b.txt"], []),
    ):
        assert files.several(f"{folder}/{pattern}")[0] == read, pattern
        assert [name.removesuffix(" (a link)") for name in sorted(sources.not_read(f"{folder}/{pattern}"))] == left
    assert [text for _, text in documents(f"{folder}/**/*.txt", "line")] == ["isa", "isa"]


def test_a_file_under_another_ending_is_another_source_to_the_cache(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_text('{"text": "isa"}\n')
    assert len({sources.fingerprint(str(tmp_path / name), "train", "train") for name in ("a.jsonl", "a.txt")}) == 2
