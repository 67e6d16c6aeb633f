"""Folders that save_to_disk of the library datasets wrote: every row, in order; a split of several; damaged ones."""

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fasttune import cli, config
from fasttune.data import load, sources
from fasttune.errors import DataError

CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}], "mine": i}
    for i in range(2500)
]
ROWS[1]["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def saved(folder: Path, rows: list[dict[str, Any]] = ROWS, shards: int = 3) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder), num_shards=shards)
    return folder


def several(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    datasets.disable_progress_bars()
    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(folder))
    return folder


def read(folder: Path, split: str = "train", also: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    chunks = sources.read(str(folder), "train", split, also=also)
    return [row for chunk in chunks for _, _, row in chunk.numbered()]


def test_every_row_comes_in_order_with_its_number(tmp_path: Path) -> None:
    folder = saved(tmp_path / "rows")
    assert read(folder, also=("mine",)) == ROWS, "nothing that the type of a column adds, as in Parquet"
    assert {row["mine"] for row in read(folder)} == {"not read"}
    chunks = list(sources.read(str(folder), "train"))
    assert [number for chunk in chunks for number, _, _ in chunk.numbered()] == list(range(1, 2501))
    assert [0 < chunk.done <= 1 for chunk in chunks] == [True] * 3 and chunks[-1].done > 0.99
    assert chunks[0].done < chunks[1].done
    assert sources.not_read(str(folder)) == []


def test_one_batch_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = saved(tmp_path / "rows", [{"text": f"{i} " * 500} for i in range(20_000)], 1)  # 55 MB
    for _ in sources.read(str(folder), "train", max_rows=1):
        pass
    gc.collect()
    tracemalloc.start()
    rows = sum(len(chunk) for chunk in sources.read(str(folder), "train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 20_000 and peak < 12 << 20


def test_a_split_is_chosen_and_another_may_be_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    several(Path("my") / "set", train=ROWS[:30], dev=ROWS[30:40])
    assert (len(read(Path("my/set"))), len(read(Path("my/set"), "dev"))) == (30, 10)
    tree: dict[str, Any] = {"model": {"name": "builtin:tiny"}}
    asked = config.parse(tree | {"data": {"train": "my/set", "eval": "my/set", "eval_split": "dev"}})
    assert (asked.data.held_out_split, load.form_of(asked, "my/set", "dev")[0]) == ("dev", "messages")
    with pytest.raises(DataError, match="my/set has no split test, it has train, dev: set data.split"):
        read(Path("my/set"), "test")
    saved(tmp_path / "one", ROWS[:30])
    with pytest.raises(DataError, match=r"data.split=dev would be ignored: one holds one data set, no splits"):
        read(Path("one"), "dev")


def test_one_among_other_files_is_named_alone(tmp_path: Path) -> None:
    saved(tmp_path / "all" / "one", ROWS[:3])
    (tmp_path / "all" / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="save_to_disk wrote .*/all/one, which is no folder of files: name it alone"):
        sources.check_source(str(tmp_path / "all"), "train")


def test_the_fingerprint_is_of_its_content(tmp_path: Path) -> None:
    first, same = saved(tmp_path / "a", ROWS[:20]), saved(tmp_path / "b", ROWS[:20])
    other = saved(tmp_path / "c", [*ROWS[:19], ROWS[20]])
    prints = [sources.fingerprint(str(each), "train", "train") for each in (first, same, other)]
    assert prints[0] == prints[1] != prints[2]
    both = several(tmp_path / "d", train=ROWS[:20], dev=ROWS[20:40])
    assert len({sources.fingerprint(str(both), "train", split) for split in ("train", "dev")}) == 2


def cut_off(folder: Path) -> None:
    file = next(folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-8])


def changed(name: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {name: value}))

    return change


def garbled(folder: Path) -> None:
    file = next(folder.glob("*.arrow"))
    file.write_bytes(b"\0" * 100 + file.read_bytes()[100:])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_off, "data-00000-of-00001.arrow is cut off: copy it again"),
        (garbled, "data-00000-of-00001.arrow is cut off or damaged"),
        (lambda folder: next(folder.glob("*.arrow")).unlink(), "names data-00000-of-00001.arrow, which is not there"),
        (changed("_data_files", [{"filename": "../rows.arrow"}]), "names ../rows.arrow, which is not there"),
        (changed("_data_files", None), "state.json is not what save_to_disk writes"),
        (changed("_indices_data_files", [{"filename": "x"}]), "was saved by datasets 1"),
        (lambda folder: (folder / "state.json").write_text("{"), "state.json is not what save_to_disk writes"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(saved(tmp_path / "rows", ROWS[:20], 1))
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], unsloth: None) -> None:
    several(tmp_path / "both", train=ROWS[2:30], dev=ROWS[30:40])
    (tmp_path / "c.yaml").write_text("model: {name: builtin:tiny, max_length: 256}\nlora: {rank: 4}\n")
    settings = [f"data.train={tmp_path}/both", f"data.eval={tmp_path}/both", "data.eval_split=dev"]
    assert cli.main(["data", str(tmp_path / "c.yaml"), "--rows", "0", "--json", *settings]) == 0
    (found,) = json.loads(capsys.readouterr().out)["data_sets"]
    assert (found["rows_read"], found["files_not_read"]) == (28, [])
    assert cli.main(["plan", str(tmp_path / "c.yaml"), "--json", *settings]) == 0
