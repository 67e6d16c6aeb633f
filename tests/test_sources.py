"""Files → rows: every kind and compression gives the same rows; every bad file is one line that names the place."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fasttune.data import arithmetic, arrow, files, sources
from fasttune.errors import DataError

ROWS = [*arithmetic.generate("train", rows=4), {"question": 'a "b", c\nd', "answer": "é 😀 #### 3"}]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def write(path: Path, content: bytes) -> str:
    compression = files.COMPRESSIONS.get(path.suffix)
    if compression is None:
        path.write_bytes(content)
    else:
        with pyarrow.CompressedOutputStream(str(path), compression) as out:
            out.write(content)
    return str(path)


def read(source: str, max_rows: int | None = None) -> list[dict[str, Any]]:
    return [row for chunk in sources.read(source, "train", max_rows=max_rows) for _, _, row in chunk.numbered()]


def refused(source: str) -> str:
    """The one line a person sees."""
    with pytest.raises(DataError) as caught:
        read(source)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("data")
    assert Path(source).name in message
    return message


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("ending", "content"),
    [("jsonl", jsonl), ("ndjson", jsonl), ("json", as_json), ("json", jsonl), ("csv", as_csv), ("JSONL", jsonl)],
)
def test_every_kind_of_file_holds_the_same_rows(
    tmp_path: Path, ending: str, content: Callable[[list[dict[str, Any]]], bytes], compression: str
) -> None:
    source = write(tmp_path / f"rows.v2.{ending}{compression}", content(ROWS))
    assert read(source) == ROWS
    assert read(source, max_rows=2) == ROWS[:2]
    assert read(source, max_rows=99) == ROWS
    by_mark = write(tmp_path / f"bom.{ending}{compression}", b"\xef\xbb\xbf" + content(ROWS))
    assert read(by_mark) == ROWS


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.parquet", as_parquet(ROWS))
    assert read(source) == ROWS
    assert read(source, max_rows=2) == ROWS[:2]


def test_keys_that_only_the_column_type_brings_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow gives each object of a column the keys of all of them: below the columns null is absence, not in a list."""

    def row(**arguments: Any) -> dict[str, Any]:
        call = {"function": {"name": "f", "arguments": arguments}}
        return {
            "input": None,
            "messages": [{"role": "assistant", "tool_calls": [call]}],
            "tools": [{"list": [1, None]}],
        }

    rows = [row(city="Faro"), row(a={"b": 2}), row(a={"c": 3})]
    assert read(write(tmp_path / "rows.parquet", as_parquet(rows))) == rows
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(city=None)))
    assert read(str(tmp_path / "rows.jsonl")) == [row(city=None)]  # here somebody wrote it
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert [row for chunk in arrow.hub("owner/name", "train", False, ()) for row in chunk.rows] == rows


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n  \n{"text": "a"}\r\n\n{"text": "b"}\n\n{"text": "c"}')
    found = [(number, row["text"]) for chunk in sources.read(str(path), "train") for number, _, row in chunk.numbered()]
    assert found == [(3, "a"), (5, "b"), (7, "c")]
    assert [number for number, _, _ in sources.first_rows(str(path), "train", "train", 1)] == [3]
    assert [number for number, _, _ in sources.first_rows(str(path), "train", "train", 2)] == [3, 5]
    path.write_bytes(b"\n" * 5000)
    assert read(str(path)) == []


@pytest.mark.parametrize("rows", [1, 999, 1000, 1001, 2500])
def test_row_numbers_and_max_rows_across_chunks(tmp_path: Path, rows: int) -> None:
    written = [{"text": str(number)} for number in range(1, 2501)]
    for source in (
        write(tmp_path / "rows.csv", as_csv(written)),
        write(tmp_path / "rows.jsonl", jsonl(written)),
        "builtin:arithmetic",
    ):
        chunks = list(sources.read(source, "train", max_rows=rows))
        assert [number for chunk in chunks for number, _, _ in chunk.numbered()] == list(range(1, rows + 1))


def test_a_chunk_stays_small_however_long_the_file(tmp_path: Path) -> None:
    row = {"text": "x" * 1000}
    source = write(tmp_path / "rows.jsonl", jsonl([row]) * 5000)
    chunks = list(sources.read(source, "train"))
    sizes = [sum(map(len, chunk.rows)) for chunk in chunks]
    assert sum(map(len, chunks)) == 5000
    assert max(sizes) <= files.BLOCK_BYTES + 1100
    done = [chunk.done for chunk in chunks]
    assert done == sorted(done)
    assert (0 < done[0] < 0.3, done[-1]) == (True, 1.0)
    many = write(tmp_path / "rows.csv", as_csv([{"text": "x"}] * 2500))
    assert [len(chunk) for chunk in sources.read(many, "train")] == [1000, 1000, 500]
    table = write(tmp_path / "rows.parquet", as_parquet([{"text": "x"}] * 2500))
    assert [len(chunk) for chunk in sources.read(table, "train")] == [1000, 1000, 500]


def test_a_line_of_10_mb_is_read(tmp_path: Path) -> None:
    long = {"text": "x" * 10_000_000}
    assert read(write(tmp_path / "rows.jsonl", jsonl([ROWS[0], long, ROWS[1]]))) == [ROWS[0], long, ROWS[1]]
    assert read(write(tmp_path / "rows.csv", as_csv([long]))) == [long]


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 3 << 20)
    source = write(tmp_path / "rows.jsonl", jsonl([ROWS[0]]) + b"x" * (5 << 20))
    assert "line 2 is over 3 MiB: is it JSONL?" in refused(source)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"text": ', "line 2 is no valid JSON: .* at column 10"),
        (b'{"text": "a"} {"text": "b"}', "line 2 is no valid JSON: Extra data at column 15"),
        (b'["a"]', "line 2 is no JSON object, it is list"),
        (b'"a"', "line 2 is no JSON object, it is str"),
        ('{"text": "é"}'.encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xe9\): convert it, e.g. iconv"),
        (b'{"a":' * 100_000, "line 2 is no valid JSON: nested too deeply"),
    ],
)
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, told: str, compression: str) -> None:
    source = write(tmp_path / f"rows.jsonl{compression}", b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    with pytest.raises(DataError, match=told):
        read(source)
    refused(source)
    assert read(source, max_rows=1) == [{"text": "a"}]


def test_a_bad_line_far_down_is_named(tmp_path: Path) -> None:
    content = jsonl([{"text": "x" * 90}]) * 30_000  # three blocks
    source = write(tmp_path / "rows.jsonl", content + b"oops\n" + content[:1000])
    assert "line 30001 is no valid JSON" in refused(source)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, the header has 2"),
        (b"a,b\n1,2\n\n1\n", "line 4 has 1 fields, the header has 2"),
        (b'a,b\n1,2\n1,"2\n', "line 3 is no valid CSV: unexpected end of data"),
        (b'a,b\n1,"2"3\n', "line 2 is no valid CSV"),
        ("é,b\n1,2\n".encode("latin-1"), r"line 1 is not UTF-8 \(byte 0xe9\): convert it, e.g. iconv"),
        ("a,b\n1,é\n".encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xe9\)"),
        (b"\xef\xbb\xbfa,b\r\n" + b"1,2\r\n" * 5 + b"1,\xe9\r\n", "line 7 is not UTF-8"),
        (b"a,b\n" + b'1,"2\n2"\n' * 5000 + b"1,2\xe9\n", "line 10002 is not UTF-8"),
        (b"a,b\n" + b"1,%s\n" % (b"2" * 9000) + b"1,\xff\n", "line 3 is not UTF-8"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    source = write(tmp_path / "rows.csv", content)
    with pytest.raises(DataError, match=told):
        read(source)
    refused(source)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (as_json(ROWS)[:-40], "is no valid JSON"),
        (b'[{"text": "a"}, 3]', "row 2 is no JSON object, it is int"),
        ("[{'a': 'é'}]".encode("latin-1"), "is not UTF-8"),
    ],
)
def test_a_bad_json_array_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    assert told in refused(write(tmp_path / "rows.json", content))


def test_a_file_cut_off_in_the_middle_is_an_error(tmp_path: Path) -> None:
    content = jsonl(ROWS * 1000)
    lines = content.count(b"\n")
    assert f"line {lines} is no valid JSON" in refused(write(tmp_path / "rows.jsonl", content[:-20]))
    parquet = as_parquet(ROWS)
    assert "cut off" in refused(write(tmp_path / "rows.parquet", parquet[:-50]))
    for ending in ("jsonl.gz", "jsonl.zst", "csv.gz", "json.zst"):
        kind = {"jsonl": jsonl, "csv": as_csv, "json": as_json}[ending.partition(".")[0]]
        path = Path(write(tmp_path / f"rows.{ending}", kind(ROWS * 1000)))
        whole = path.read_bytes()
        for left in (len(whole) - 1, len(whole) // 2, 9):
            path.write_bytes(whole[:left])
            told = refused(str(path))
            assert "cut off" in told
            assert "after line" in told or kind is not jsonl


@pytest.mark.parametrize("ending", ["jsonl.gz", "csv.zst", "json.gz", "parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(jsonl(ROWS))
    assert "copy it again" in refused(str(path))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere.jsonl", "no file nowhere.jsonl"),
        ("./nowhere", "no file"),
        ("a/b/c", "no file"),
        ("builtin:poetry", "builtin:arithmetic"),
        ("pyproject.toml", "unknown ending"),
        ("docs", "none of its"),
    ],
)
def test_a_source_that_cannot_be_is_refused_early(source: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        sources.check_source(source)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.touch()
    assert "is empty" in refused(str(path))


def test_a_split_of_a_file_would_be_ignored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would be ignored"):
        sources.check_source(write(tmp_path / "rows.jsonl", jsonl(ROWS)), split="test")


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(name: str, rows: list[dict[str, Any]]) -> str:
        return sources.fingerprint(write(tmp_path / name, jsonl(rows)), "train", "train")

    assert fingerprint("a.jsonl", ROWS) == fingerprint("b.jsonl", ROWS) != fingerprint("a.jsonl", ROWS[:-1])


def test_a_csv_column_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer,answer\na,b,c\n")
    with pytest.raises(DataError, match="line 1 names a column twice"):
        list(sources.read(str(path), "train"))
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "names a column twice" in refused(str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz"])
def test_wide_encodings_are_named_with_the_right_remedy(tmp_path: Path, encoding: str, ending: str) -> None:
    content = as_csv(ROWS) if ending == "csv" else jsonl(ROWS)
    told = refused(write(tmp_path / f"rows.{ending}", content.decode().encode(encoding)))
    assert f"iconv -f {encoding.replace('-le', 'le')} -t utf-8" in told


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_separators_are_named_with_a_command_that_helps(tmp_path: Path, mark: str, name: str) -> None:
    old, new = tmp_path / "rows.csv", tmp_path / "new.csv"
    old.write_text(f'question{mark}answer\nName it.{mark}"The Tagus, of course."\n')
    told = refused(str(old))
    assert f"line 1 is separated by {name}" in told and len(told) - len(str(old)) < 240
    command = told[told.index("python -c") :].replace("python", sys.executable, 1)
    command = command.replace("<OLD", f"<{old}").replace(">NEW", f">{new}")
    subprocess.run(command, shell=True, check=True)
    assert read(str(new)) == [{"question": "Name it.", "answer": "The Tagus, of course."}]


def test_a_file_of_a_folder_that_save_to_disk_wrote_is_named_with_a_command_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    monkeypatch.chdir(tmp_path)
    told = refused(source := "one/data-00000-of-00001.arrow")
    code = told[told.index('python -c "') + len('python -c "') : told.rindex('"')]
    exec(code.replace("FILE", source))
    assert read("rows.parquet") == ROWS


def test_values_of_unused_columns_are_not_read(tmp_path: Path) -> None:
    """A date beyond Python's, a time zone nobody knows, bytes that are no text; in JSON an integer too long for int."""
    table = pyarrow.table(
        {
            "question": ["q", "r"],
            "day": pyarrow.array([1 << 30, 1], pyarrow.date32()),
            "time": pyarrow.array([1, 2], pyarrow.timestamp("us", tz="Mars/Olympus")),
            "mine": ["a", "b"],
            "raw": pyarrow.StringArray.from_buffers(
                2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
            ),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    source = str(tmp_path / "rows.parquet")
    unread = dict.fromkeys(("day", "time", "raw"), "not read")
    assert read(source) == [
        {"question": "q", "mine": "not read", **unread},
        {"question": "r", "mine": "not read", **unread},
    ]
    (chunk,) = sources.read(source, "train", also=["mine"])
    assert [row["mine"] for _, _, row in chunk.numbered()] == ["a", "b"]
    with pytest.raises(DataError, match="rows.parquet row 1: raw cannot be read .*codec can't decode byte 0xff"):
        list(sources.read(source, "train", also=["raw"]))
    pyarrow.parquet.write_table(table.select(["day"]), tmp_path / "rows.parquet")
    assert read(source) == [{"day": "not read"}] * 2
    digits = "9" * 5000
    row = read(write(tmp_path / "rows.jsonl", f'{{"text": "a", "id": {digits}, "n": -1}}\n'.encode()))[0]
    assert (row["text"], str(row["id"]), row["n"], type(row["n"])) == ("a", digits, -1, int)
    with pytest.raises(DataError, match="line 1 is no valid JSON: Extra data"):
        read(write(tmp_path / "rows.jsonl", f'{{"text": {digits}}} {{}}\n'.encode()))


def test_a_source_says_how_far_it_is_read(tmp_path: Path) -> None:
    for ending, content in (("csv", as_csv), ("json", as_json), ("csv.gz", as_csv)):
        source = write(tmp_path / f"rows.{ending}", content([{"text": "x" * 50}] * 2000))
        first, last = (chunk.done for chunk in sources.read(source, "train"))
        assert 0 < first <= last == 1, ending


def test_a_folder_that_cannot_be_entered_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    source = write(closed / "rows.jsonl", jsonl(ROWS))
    closed.chmod(0)
    me = os.geteuid()
    try:
        if me == 0:
            os.seteuid(65534)  # root may enter any folder
        with pytest.raises(DataError, match="rows.jsonl cannot be reached: a folder on its way cannot be entered"):
            sources.check_source(source)
    finally:
        os.seteuid(me)
        closed.chmod(0o700)
    with pytest.raises(DataError, match="no file"):
        sources.check_source("~nobody-of-that-name/rows.jsonl")
    with pytest.raises(DataError, match="no file"):
        sources.check_source("x" * 300 + ".jsonl")
