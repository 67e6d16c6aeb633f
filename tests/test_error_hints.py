"""What verify says of an error that a package raises when it is loaded."""

import re

import pytest

from fasttune.verify import PIP, error_hints, read_table


@pytest.mark.parametrize(
    ("text", "meaning", "fix"),
    [  # where the order of the hints, or what they take from the text, decides
        ("flash_attn_2_cuda.so: undefined symbol: _ZN2at4_ops5zeros4callE", "flash-attn was compiled", "uninstall -y"),
        ("/x/libcusparse.so.12: undefined symbol: __nvJitLinkComplete_12_4, version libnvJitLink.so.12",
         "CUDA libraries of two installations", "unset LD_LIBRARY_PATH"),
        ("torchao/_C.abi3.so: undefined symbol: aoti_torch", "built against another version", "torch=="),
        ("ImportError: libcudart.so.11.0: cannot open shared object file", "another CUDA version", "torch=="),
        ("x/libbitsandbytes_cuda130.so: cannot open shared object file", "no binary for the CUDA", "torch=="),
        ("libGL.so.1: cannot open shared object file", "libGL.so.1 is missing", "apt-file search libGL.so.1"),
        ("ModuleNotFoundError: No module named 'numpy._core.multiarray'", "NumPy generation", "numpy=="),
        ("ModuleNotFoundError: No module named 'peft.tuners'", "peft.tuners is missing", "peft=="),
        ("tokenizers>=0.19,<0.20 is required for a normal functioning of this module, but found tokenizers==0.23.3.\n"
         "Try:", "refuses tokenizers==0.23.3", "tokenizers=="),
        ("[enforce fail at /p/gloo/transport/tcp/device.cc:83] ifa != nullptr. Unable to find address for: eth9",
         "no network interface", "GLOO_SOCKET_IFNAME"),
        ("NCCL WARN Error while creating shared memory segment /dev/shm/nccl-x (size 9)\nncclSystemError: System call",
         "more shared memory", "--shm-size"),
        ("DistBackendError: NCCL error in: /p/NCCLUtils.cpp:77\nncclRemoteError: A call failed possibly",
         "could not exchange", "NCCL_DEBUG=INFO"),
        ("ImportError: cannot import name '_Ink' from 'PIL._typing' (/x)", "PIL._typing has no _Ink", "pillow=="),
    ],
)  # fmt: skip
def test_loader_errors_are_explained(text: str, meaning: str, fix: str) -> None:
    known = error_hints.explain(text)
    assert known is not None
    assert meaning in known.meaning
    assert fix in known.fix


def test_every_hint_can_be_filled_in() -> None:
    for hint in read_table("error_hints.toml")["hints"]:
        groups, filled = ["x"] * re.compile(hint["pattern"]).groups, {"suspect": "torch", "pip": PIP, "python": "3.12"}
        assert ("fix" in hint) != ("reinstall" in hint), hint
        for text in (hint["meaning"], hint.get("fix", ""), *hint.get("reinstall", ())):
            assert "{" not in text.format(*groups, **filled), hint


def test_an_unknown_error_is_shown_as_it_is() -> None:
    assert error_hints.explain("ValueError: all is well") is None
    assert error_hints.from_exception("x", ValueError("all\nis well")).detail == "ValueError: all is well"


def test_the_cause_of_an_error_is_read_too() -> None:
    error = RuntimeError("Failed to import trl")
    error.__cause__ = ImportError("x.so: undefined symbol: abc")
    assert "built against another version" in error_hints.from_exception("x", error).detail


# ---- facts
