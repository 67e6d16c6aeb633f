"""Files behind a URL are read as files here; what S3 needs is named, and no secret of a URL is repeated."""

import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fasttune.data import sources
from fasttune.errors import DataError
from tests.test_sources import ROWS, as_csv, as_parquet, jsonl, read, refused, write


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of a folder, while it is served from this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_behind_a_url_is_read_as_here(tmp_path: Path, served: str) -> None:
    for name, content in (
        ("rows.jsonl.gz", jsonl(ROWS)),
        ("rows.parquet", as_parquet(ROWS)),
        ("rows.csv", as_csv(ROWS)),
    ):
        here = write(tmp_path / name, content)
        assert read(f"{served}/{name}") == read(here) == ROWS
        there = sources.fingerprint(f"{served}/{name}", "train", "train")
        assert there == sources.fingerprint(here, "train", "train")
    assert "cannot be downloaded (FileNotFoundError" in refused(f"{served}/none.jsonl")
    with pytest.raises(DataError, match="unknown ending"):
        sources.check_source(f"{served}/rows.text")
    for secret in ("https://me:word@host/rows.jsonl", "https://host/rows.jsonl?token=word"):
        with pytest.raises(DataError, match="URL of host holds a password or a .query") as caught:
            sources.check_source(secret)
        assert "word@" not in str(caught.value) and "token" not in str(caught.value)


def test_what_s3_needs_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert f"pip install s3fs=={fsspec.__version__}" in refused("s3://bucket/rows.jsonl")
