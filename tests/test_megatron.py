"""Megatron's .bin and .idx: the bytes, every broken file in one line, and Megatron's and NeMo's own code on them."""

import importlib.util
import os
import signal
import struct
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fasttune.data import megatron
from fasttune.data.megatron import Writer, read
from fasttune.errors import DataError, OutputError

DTYPES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}  # those that can hold ids
CLIENTS = {
    "megatron-core": "megatron.core.datasets.indexed_dataset",
    "nemo-automodel": "nemo_automodel.components.datasets.llm.megatron.indexed_dataset",
}
# Reads ours document by document, makes the same with the client's own builder, and others of sequences in documents.
CLIENT = """
import importlib, sys
import numpy as np, torch
client, folder = importlib.import_module(sys.argv[1]), sys.argv[2]
for kind, bits in (("small", np.uint16), ("large", np.int32)):
    seen = client.IndexedDataset(f"{folder}/{kind}")
    assert seen.index.dtype == bits and seen.document_indices.tolist() == list(range(len(seen) + 1))
    builder = client.IndexedDatasetBuilder(f"{folder}/{kind}-theirs.bin", dtype=bits)
    for at in range(len(seen)):
        builder.add_document(torch.from_numpy(seen[at].astype(np.int64)), [len(seen[at])])
    builder.finalize(f"{folder}/{kind}-theirs.idx")
for name in sys.argv[3:]:
    builder = client.IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=getattr(np, name))
    builder.add_document(torch.arange(5), [2, 0, 3])  # a document of three sentences
    builder.add_document(torch.zeros(0), [])  # one that its encoder found empty
    builder.add_item(torch.tensor([7, 8]))
    builder.add_item(torch.tensor([9]))
    builder.end_document()
    builder.end_document()
    builder.finalize(f"{folder}/{name}.idx")
"""


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 50_000) -> Path:
    with Writer(prefix, vocab_size) as file:
        for document in documents:
            file.add(np.array(document, np.int64))
    return prefix


def by_hand(prefix: Path, ids: np.ndarray, lengths: list[int], boundaries: list[int]) -> Path:
    """As the format is described, without a line of ours."""
    offsets = [sum(lengths[:at]) * ids.itemsize for at in range(len(lengths))]
    head = (
        b"MMIDIDX\0\0"
        + struct.pack("<QB", 1, DTYPES[ids.dtype.name])
        + struct.pack("<QQ", len(lengths), len(boundaries))
    )
    counts = [
        struct.pack(f"<{len(each)}{kind}", *each) for each, kind in ((lengths, "i"), (offsets, "q"), (boundaries, "q"))
    ]
    Path(f"{prefix}.idx").write_bytes(head + b"".join(counts))
    Path(f"{prefix}.bin").write_bytes(ids.tobytes())
    return prefix


def test_the_bytes_are_those_of_the_description(tmp_path: Path) -> None:
    write(tmp_path / "tl", [[5, 258], [], [7]])
    assert (tmp_path / "tl.bin").read_bytes() == b"\x05\0\x02\x01\x07\0"
    assert (tmp_path / "tl.idx").read_bytes() == bytes.fromhex(
        "4d4d494449445800 00"  # MMIDIDX and two zeros
        "0100000000000000 08 0300000000000000 0400000000000000"  # version, u16, 3 sequences, 4 boundaries
        "02000000 00000000 01000000"  # tokens
        "0000000000000000 0400000000000000 0400000000000000"  # bytes
        "0000000000000000 0100000000000000 0200000000000000 0300000000000000"
    )
    assert sorted(os.listdir(tmp_path)) == ["tl.bin", "tl.idx"]


@settings(max_examples=60)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 127), max_size=5), max_size=4), max_size=12),
    name=st.sampled_from(sorted(DTYPES)),
    block=st.integers(1, 5),
)
def test_any_documents_come_back(
    tmp_path_factory: Any, documents: list[list[list[int]]], name: str, block: int
) -> None:
    """Those of other makers, of several sequences and of none; ours; in blocks that end anywhere."""
    folder = tmp_path_factory.mktemp("any")
    sequences = list(chain(*documents))
    whole = [list(chain(*document)) for document in documents]
    boundaries = np.cumsum([0, *map(len, documents)]).tolist()
    ids, shares = np.array(list(chain(*whole)), name), list[float]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "BLOCK", block)
        theirs = read(by_hand(folder / "theirs", ids, list(map(len, sequences)), boundaries))
        with Writer(folder / "ours", 128) as file:
            file.add_many(ids, np.array(list(map(len, whole)), np.int64))
        assert (file.documents, file.tokens) == (len(whole), len(ids))
        for found in (theirs, read(folder / "ours")):
            assert [found.tokens(at).tolist() for at in range(len(found))] == whole
            assert found.lengths.tolist() == list(map(len, whole)) and found.starts.dtype == np.int64
            assert found.scan(progress=shares.append)[0] == max(ids.tolist(), default=-1)
        assert theirs.ids.dtype == ids.dtype and (not len(ids) or shares[-1] == 1.0)


def test_a_document_is_a_view_and_any_name_of_the_pair_opens_it(tmp_path: Path) -> None:
    write(tmp_path / "v1.5", [[1, 2], [3]])
    for name in ("v1.5", "v1.5.bin", "v1.5.idx"):
        found = read(tmp_path / name)
        assert found.tokens(1).base is not None and isinstance(found.ids, np.memmap) and not found.ids.flags.writeable
        assert found.prefix == tmp_path / "v1.5"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32), (200_000, np.int32)])
def test_ids_take_two_bytes_where_they_fit(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    found = read(write(tmp_path / "tl", [[vocab_size - 1, 0]], vocab_size))
    assert found.ids.dtype == dtype and found.scan()[0] == vocab_size - 1


def test_what_cannot_be_an_id_is_our_mistake(tmp_path: Path) -> None:
    for wrong in ([100], [-1]):
        with pytest.raises(AssertionError):
            write(tmp_path / "tl", [wrong], vocab_size=100)
    with pytest.raises(AssertionError), Writer(tmp_path / "tl", 100) as file:
        file.add_many(np.arange(3), np.array([1, 1]))
    assert not os.listdir(tmp_path)


def put(file: str, at: int, value: bytes) -> Any:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.{file}")
        path.write_bytes(path.read_bytes()[:at] + value + path.read_bytes()[at + len(value) :])

    return damage


def cut(file: str, size: int) -> Any:
    """To so many bytes; where it has fewer, filled up."""
    return lambda prefix: os.truncate(f"{prefix}.{file}", size)


def swap(prefix: Path) -> None:
    ids, index = (Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx"))
    Path(f"{prefix}.bin").write_bytes(index)
    Path(f"{prefix}.idx").write_bytes(ids)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


# [[1, 2, 3], [4], [5, 6]] as u16: header to byte 34, lengths to 46, offsets to 70, boundaries to 102
BROKEN = {
    "no index": (lambda prefix: os.remove(f"{prefix}.idx"), "no file .*tl.idx; .* side by side"),
    "no ids": (lambda prefix: os.remove(f"{prefix}.bin"), "no file .*tl.bin"),
    "a folder": (lambda prefix: (os.remove(f"{prefix}.idx"), os.mkdir(f"{prefix}.idx")), "no file .*tl.idx"),
    "empty index": (cut("idx", 0), "is no index of Megatron's"),
    "old format": (put("idx", 0, b"TNTIDX\0\0"), "is no index of Megatron's"),
    "swapped": (swap, "is the .bin, and the .bin is the index: swap them"),
    "header cut": (cut("idx", 33), "ends within its header, after 33 bytes"),
    "version": (put("idx", 9, u64(2)), "is of version 2, only 1 is known"),
    "big-endian": (put("idx", 9, struct.pack(">Q", 1)), "is of version 72057594037927936"),
    "no such type": (put("idx", 17, b"\x09"), "of type 9, which is none of 1 to 8"),
    "floats": (put("idx", 17, b"\x07"), "tl.bin holds float32 numbers, not token ids; name a file of ids"),
    "another type": (put("idx", 17, b"\x04"), "sequence 1 is not where the one before it ends"),
    "sequences": (put("idx", 18, u64(2**63)), "has 102 bytes, but 9,223,372,036,854,775,808 sequences and 4 .* need"),
    "fewer sequences": (put("idx", 18, u64(2)), "but 2 sequences and 4 boundaries of documents need 90"),
    "documents": (
        put("idx", 26, u64(2**64 - 1)),
        "has 102 bytes, but 3 sequences and 18,446,744,073,709,551,615 bound",
    ),
    "no documents": (put("idx", 26, u64(0)), "has 102 bytes, but 3 sequences and 0 boundaries"),
    "index cut": (cut("idx", 101), "has 101 bytes, but 3 sequences and 4 boundaries of documents need 102"),
    "index grown": (cut("idx", 110), "has 110 bytes, but"),
    "multimodal": (cut("idx", 105), "tl.bin is multimodal"),
    "negative length": (put("idx", 38, struct.pack("<i", -1)), "lies outside of the .bin"),
    "other length": (put("idx", 34, struct.pack("<i", 4)), "sequence 1 is not where the one before it ends"),
    "first offset": (put("idx", 46, u64(2)), "sequence 0 is not where"),
    "far offset": (put("idx", 62, u64(2**62)), "lies outside of the .bin"),
    "negative offset": (put("idx", 62, u64(2**64 - 8)), "lies outside of the .bin"),
    "last length": (put("idx", 42, struct.pack("<i", 2**31 - 1)), "is of a .bin of 4,294,967,302 bytes, .* has 12"),
    "first document": (put("idx", 70, u64(1)), "document 0 or one behind it does not follow"),
    "documents fall": (put("idx", 78, u64(3)), "document 0 or one behind it does not follow"),
    "document outside": (put("idx", 94, u64(4)), "document 0 or one behind it does not follow"),
    "negative document": (put("idx", 70, u64(2**64 - 1)), "document 0 or one behind it does not follow"),
    "last document": (put("idx", 94, u64(2)), "its documents end with sequence 2, of 3"),
    "ids cut": (cut("bin", 11), "lies outside|is of a .bin of 12 bytes, and that beside it has 11"),
    "no id": (cut("bin", 0), "lies outside of the .bin"),
    "ids grown": (cut("bin", 14), "is of a .bin of 12 bytes, and that beside it has 14"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_is_one_line_that_says_what_to_do(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tl", [[1, 2, 3], [4], [5, 6]])
    assert len(read(tmp_path / "tl")) == 3
    do, told = BROKEN[damage]
    do(tmp_path / "tl")
    with pytest.raises(DataError, match=told) as caught:
        read(tmp_path / "tl.bin")
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    monkeypatch.setattr(megatron, "BLOCK", 1)
    with pytest.raises(DataError):
        read(tmp_path / "tl.bin")


def test_a_negative_id_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "BLOCK", 2)
    found = read(by_hand(tmp_path / "tl", np.array([1, 2, 3, -4], np.int32), [4], [0, 1]))
    with pytest.raises(DataError, match=r"tl\.bin: token 3 is -4, which is no id"):
        found.scan()


def test_nothing_is_written_over_and_an_error_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "tl", [[1]])
    for missing in ("bin", "idx"):
        with pytest.raises(OutputError, match=r"is there already; remove it"):
            Writer(tmp_path / "tl", 10)
        os.remove(tmp_path / f"tl.{missing}")
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "tl", 10) as file:
        file.add(np.array([1]))
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)
    with pytest.raises(OutputError, match="cannot be written .*; free some room there, or choose another folder"):
        write(tmp_path / "none" / "tl", [[1]])


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"), Writer(tmp_path / "tl", 10) as file:
        file._ids = Full()  # type: ignore[assignment]
        file.add(np.array([1]))
    assert not os.listdir(tmp_path)


KILLED = """
import os, signal, sys
import numpy as np
from fasttune.data.megatron import Writer
with Writer(sys.argv[1], 100) as file:
    file.add(np.arange(50))
    file._ids.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_nothing_under_the_names(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "tl")])
    assert done.returncode == -signal.SIGKILL
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(".tl-")]
    assert read(write(tmp_path / "tl", [[1]])).ids.tolist() == [1]


@pytest.mark.parametrize("client", CLIENTS)
def test_the_real_client_reads_ours_and_we_read_its(tmp_path: Path, client: str) -> None:
    module = CLIENTS[client]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"{client} is not installed: stacks/dev.txt has it")
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 40, 200)
    for kind, vocab_size in (("small", 60_000), ("large", 130_000)):
        with Writer(tmp_path / kind, vocab_size) as file:
            file.add_many(draw.integers(0, vocab_size, lengths.sum()), lengths)
    done = subprocess.run([sys.executable, "-c", CLIENT, module, tmp_path, *DTYPES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind in ("small", "large"):
        for ending in ("bin", "idx"):
            ours, theirs = (tmp_path / f"{kind}{whose}.{ending}" for whose in ("", "-theirs"))
            assert ours.read_bytes() == theirs.read_bytes()
    for name in DTYPES:
        found = read(tmp_path / name)
        assert [found.tokens(at).tolist() for at in range(len(found))] == [[0, 1, 2, 3, 4], [], [7, 8, 9], []]
        assert found.ids.dtype == name
