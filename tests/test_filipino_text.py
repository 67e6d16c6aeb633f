"""The made-up Filipino text: words as Tagalog forms them, and the same bytes from the same seed."""

import importlib.util
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def text() -> Any:
    spec = importlib.util.spec_from_file_location("filipino_text", "benchmarks/filipino_text.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_words_are_formed_as_in_tagalog(text: Any) -> None:
    eat, study, cook = text.verb_forms("kain", True), text.verb_forms("aral", False), text.verb_forms("luto", False)
    assert [eat[slot] for slot in ("done", "now", "will", "object_done", "object_now", "command", "able")] == (
        "kumain kumakain kakain kinain kinakain kainin makakain".split()
    )
    assert [study[slot] for slot in ("done", "now", "will", "study", "gerund", "social")] == (
        "nag-aral nag-aaral mag-aaral pinag-aralan pag-aaral nakipag-aral".split()
    )
    assert [cook[slot] for slot in ("now", "object_done", "command")] == "nagluluto niluto lutuin".split()
    assert text.verb_forms("ngiti", True)["now"] == "ngumingiti"
    assert list(text.quality_forms("ganda").values()) == (
        "magandang pinakamagandang napakaganda magagandang kagandahan gumanda".split()
    )
    assert len({*text.UM, *text.MAG, *text.NOUNS, *text.QUALITIES}) >= 300


def test_documents_come_from_the_seed(text: Any, tmp_path: Path) -> None:
    made = list(islice(text.documents(7), 200))
    assert made == list(islice(text.documents(7), 200)) != list(islice(text.documents(8), 200))
    lengths = sorted(map(len, made))
    assert lengths[20] < 300 < lengths[100] < 1500 < lengths[-1]
    assert not any("\n\n" in one or "{" in one or one != one.strip() for one in made)
    for form in ("jsonl", "txt"):
        count = text.write(tmp_path / form, 50_000, form, 7)
        written = (tmp_path / form).read_text(encoding="utf-8")
        assert 50_000 <= len(written.encode()) < 80_000
        found = (
            [json.loads(line)["text"] for line in written.splitlines()]
            if form == "jsonl"
            else written.split("\n\n")[:-1]
        )
        assert found == made[:count]
