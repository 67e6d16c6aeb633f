"""A fuzzing case from a seed: files of a folder and the command to run there. The same seed is the same case."""

import contextlib
import copy
import csv
import gzip
import io
import json
import random
import sys
from dataclasses import dataclass, field
from typing import Any

import yaml

from fasttune import config, hints

DEEP: Any = "deep"  # a mark: written out as brackets in brackets
# fmt: off
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-300, 1e30, 1e308, 2**31, 2**63, 10**400, float("nan"),
    float("inf"), "", " ", "auto", "never", "yes", "no", "on", "off", "null", "~", "1:30", "010", "0x_", "0x10",
    "1_000", "1e400", "-0", "2024-13-45", "2024-01-01", "50", "50 steps", "0 steps", "0 minutes", "1e9 minutes",
    "start and end", "٥ steps", "~nosuchuser/x", "/", "..", ".", "/dev/null", "/proc/self/mem", "owner/name",
    "owner/name:sub", "a/b/c", "builtin:", "builtin:arithmetic", "builtin:tiny", "rows.jsonl", "keep.txt", "out",
    "nul\0x", "lone \ud800", "x" * 300, "/x" * 3000, "\x1b[2J", "a\nb", "{", "[", "'", "%s %d {0} {x}", "é" * 200,
    "q_proj", "(a+)+$", "<|im_end|>", "9" * 5000, [], [1], ["q_proj"], [[]], {}, {"a": 1}, {"rows.jsonl": 2},
    {"rows.jsonl": 0}, {"rows.jsonl": 1e9}, {"": 1}, DEEP,
]
LINES = [  # what stands in a file as it is
    "seed: !!bool maybe", "seed: !!python/object/apply:os.system [touch RAN]", "seed: 0x_", "seed: 2024-13-45",
    "name: &a [*a]", "a: &a {<<: *a}", "name: *b", "? [a, b]\n: c", "- x", "---\nname: x", "%YAML 9.9", "\tname: x",
    "name: x: y", "name: 'x", 'name: "\\ud800"', 'name: "\\0"', "name: " + "[" * 300, "name: " + "[" * 50_000,
    "name: \x07", "name: \ufeff", "null: x", "true: x", "1: x", "<<: {seed: 1}", "<<: 3", "model:", "lora:", "data:",
    "train: 7", "eval: []", "checkpoint: yes", "#" * 120_000, "seed: " + "9" * 5000,
    "\n".join(["a0: &a0 [x,x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]),
    "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]),
]
# fmt: on
TURNS = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}]
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"messages": [{"role": "system", "content": "Add."}, *TURNS, *TURNS]},
    {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]},
    {"question": "2 + 3?", "answer": "2 + 3 = 5 #### 5"},
    {"prompt": "2 + 3?", "completion": " 5"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"instruction": "Add.", "input": "2 + 3", "output": "5"},
    {"query": "2 + 3?", "response": "5"},
    {"text": "Two and three are five."},
    {
        "messages": [
            *TURNS[:1],
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        ]
    },
]
MARKS = "tool_calls tools weight train loss label chosen images system history reasoning_content function_call".split()
TEXTS = [
    "lone \ud800",
    "nul\0",
    "<|im_end|>",
    "<think>a</think>b",
    "\u202e",
    "x " * 5000,
    "",
    " ",
    "\U0001f600" * 50,
    "9" * 5000,
]


@dataclass
class Case:
    """`files`: name → bytes. `arguments`: of `fasttune`, run in their folder."""

    arguments: list[str]
    files: dict[str, bytes] = field(default_factory=dict)


def make(seed: int) -> Case:
    """Half of them are configs, half are data, and a few of these are trained on."""
    draw = random.Random(seed)
    case = Case([draw.choice(["data", "plan"]), "c.yaml"])
    tree: dict[str, Any] = {
        "name": "fuzz",
        "output_dir": "out",
        "model": {"name": "builtin:tiny", "max_length": 192},
        "data": {"train": "rows.jsonl"},
        "train": {"batch_rows": 2, "max_steps": 1},
    }
    case.files |= {"keep.txt": b"mine", "out/notes.txt": b"mine too"}
    if draw.random() < 0.5:
        case.files["rows.jsonl"] = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:2] * 3)
        case.files["c.yaml"] = _config(draw, tree, case.arguments)
    else:
        name, content = _data(draw)
        case.files[name] = content
        tree["data"] = {"train": name}
        if draw.random() < 0.2:
            tree["data"] = {"train": "builtin:arithmetic", "max_rows": 4, "eval": name}
            case.arguments.append("eval.rows=2")
        if draw.random() < 0.2:
            case.arguments.append(
                draw.choice(["data.train_on=last", "data.train_on=all", "data.too_long=split", "data.eval_share=0.5"])
            )
        case.files["c.yaml"] = yaml.safe_dump(tree).encode()
        if draw.random() < 0.1:
            case.arguments[0] = "train"
            case.arguments += ["overwrite=true"] * draw.randrange(2)
    if case.arguments[0] == "data" and draw.random() < 0.3:
        case.arguments += ["--rows", draw.choice(["0", "1", "100000", "-1", "9" * 30, "x"])]
    return case


def _config(draw: random.Random, tree: dict[str, Any], arguments: list[str]) -> bytes:
    known = config.known_keys()
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        key, value = draw.choice(known), draw.choice(VALUES)
        if draw.random() < 0.1:
            key = draw.choice([*hints.OTHER_TOOLS, "x", "model.x.y"])
        if draw.random() < 0.3:
            text = value if isinstance(value, str) else json.dumps(value)
            arguments.append(f"{key}={text}")
            continue
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        if isinstance(node, dict):
            node[leaf] = value
    if draw.random() < 0.1:
        arguments += draw.choice(
            [["a.b"], ["=1"], ["model=null"], ["lora=null", "train.method=full"], ["..=1"], ["x" * 400]]
        )
    odd = draw.choice(LINES) if draw.random() < 0.3 else ""
    if odd:
        tree.pop("name", None)
    text = json.dumps(tree, ensure_ascii=False).replace('"deep"', "[" * 100 + "]" * 100)
    if odd or draw.random() < 0.5:
        with contextlib.suppress(yaml.YAMLError, UnicodeError):
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    text = f"{text}\n{odd}" if draw.random() < 0.7 else f"{odd}\n{text}"
    if draw.random() < 0.1:
        text += "\n" + draw.choice(text.splitlines())
    content = text.encode(draw.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32"]), "surrogatepass")
    return _damage(draw, content) if draw.random() < 0.2 else content


def _data(draw: random.Random) -> tuple[str, bytes]:
    rows = [copy.deepcopy(draw.choice(ROWS)) for _ in range(draw.choice([1, 2, 5]))]
    if draw.random() < 0.85:
        rows = [copy.deepcopy(rows[0]) for _ in rows]
    for _ in range(draw.choice([0, 1, 1, 1, 2])):
        draw.choice([_change, _retell, _retell, _add, _add])(draw, rows)
    if draw.random() < 0.05:
        rows *= 2000 // len(rows)
    kind = draw.choice(["jsonl", "jsonl", "jsonl", "json", "csv", "parquet"])
    content = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}[kind](draw, rows)
    if draw.random() < 0.25:
        content = _damage(draw, content)
    ending = (
        kind if draw.random() < 0.9 else draw.choice(["json", "jsonl", "csv", "parquet", "txt", "jsonl.gz", "zst", ""])
    )
    if draw.random() < 0.1 and kind != "parquet":
        return f"rows.{kind}.gz", gzip.compress(content, mtime=0)[: draw.choice([None, None, 20])]
    return f"rows.{ending}", content


def _retell(draw: random.Random, rows: list[Any]) -> None:
    """A text anywhere in the rows becomes an odd one."""
    places = [(node, key) for node in _nodes(rows) for key in _keys(node) if isinstance(node[key], str)]
    if places:
        node, key = draw.choice(places)
        node[key] = draw.choice(TEXTS)


def _add(draw: random.Random, rows: list[Any]) -> None:
    """A field that nobody asked for, or one that means something, in a row or in a turn."""
    places = [node for node in _nodes(rows) if isinstance(node, dict)]
    if places:
        draw.choice(places)[draw.choice([*MARKS, "x"])] = draw.choice([*VALUES, *TEXTS, 10**4400])


def _nodes(node: Any) -> list[Any]:
    return [node, *(found for key in _keys(node) for found in _nodes(node[key]))]


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []


def _change(draw: random.Random, rows: list[Any]) -> None:
    """Something anywhere in the rows becomes something else."""
    node: Any = rows
    while True:
        if not _keys(node):
            return
        key = draw.choice(_keys(node))
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.75:
            node = node[key]
            continue
        if isinstance(node, dict) and draw.random() < 0.3:
            value = node.pop(key)
            if draw.random() < 0.7:
                node[draw.choice([*MARKS, "x", "", "\ud800", "x" * 300])] = value
        else:
            node[key] = draw.choice(VALUES)
        return


def _dumps(value: Any) -> str:
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(limit)


def _text(value: Any) -> str:
    return _dumps(value).replace('"deep"', "[" * 3000 + "]" * 3000)


def _jsonl(draw: random.Random, rows: list[Any]) -> bytes:
    newline = draw.choice(["\n"] * 6 + ["\r\n", "\n\n", ","])
    return newline.join(map(_text, rows)).encode() + draw.choice([b"\n", b"", b"\n\n"])


def _json(draw: random.Random, rows: list[Any]) -> bytes:
    return _text(draw.choice([rows, rows, rows, {"data": rows}, rows[0]])).encode()


def _csv(draw: random.Random, rows: list[Any]) -> bytes:
    out = io.StringIO()
    rows = [row for row in rows if isinstance(row, dict)] or [{}]
    names = list(rows[0])
    writer = csv.writer(out, delimiter=draw.choice([",", ",", ",", ";", "\t"]))
    writer.writerow(names)
    writer.writerows(
        [[row.get(name) if isinstance(row.get(name), str) else _text(row.get(name)) for name in names] for row in rows]
    )
    return out.getvalue().encode("utf-8", "surrogatepass")


def _parquet(draw: random.Random, rows: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    rows = [row for row in rows if isinstance(row, dict)]
    try:
        table = pyarrow.Table.from_pylist(rows)
        if draw.random() < 0.5:
            table = table.append_column("odd", _odd_column(draw, pyarrow, len(rows)))
        pyarrow.parquet.write_table(table, out)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        return _jsonl(draw, rows)
    return out.getvalue()


def _odd_column(draw: random.Random, pyarrow: Any, rows: int) -> Any:
    """Values that Parquet can hold and Python cannot."""
    far = pyarrow.array([2**62] * rows, pyarrow.int64())
    not_utf8 = pyarrow.array([b"\xff\xfe"] * rows)
    return draw.choice(
        [
            far.cast(pyarrow.timestamp("us")),
            far.cast(pyarrow.timestamp("us", tz="Nowhere/City")),
            far.cast(pyarrow.duration("s")),
            pyarrow.array([2**31 - 1] * rows, pyarrow.int32()).cast(pyarrow.date32()),
            not_utf8,
            pyarrow.Array.from_buffers(pyarrow.utf8(), rows, not_utf8.buffers()),
            pyarrow.array([None] * rows),
            pyarrow.array([{"a": None}] * rows, pyarrow.struct([("a", pyarrow.null())])),
        ]
    )


def _damage(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    odd = draw.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b'"', b"\xef\xbb\xbf", b"\x1a", b"}" * 50, b"[" * 5000])
    how = draw.randrange(6)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + odd + content[at:]
    if how == 2:
        return content[:at] + odd + content[at + len(odd) :]
    if how == 3:
        return content.decode("utf-8", "replace").encode(
            draw.choice(["utf-16", "utf-16-le", "utf-32", "cp500"]), "replace"
        )
    if how == 4:
        return content + content[at:]
    return bytes(draw.randrange(256) for _ in range(draw.choice([0, 1, 100])))
