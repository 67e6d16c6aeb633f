"""What every test shares: no network, no trace on the machine, and the tiny model's tokenizer."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="fasttune-tests-")
os.environ |= {
    "FASTTUNE_CACHE": _CACHE.name,  # inherited by the commands that tests start
    "HF_HOME": _CACHE.name,
    "HF_HUB_OFFLINE": "1",
}


def pytest_unconfigure() -> None:
    _CACHE.cleanup()


@pytest.fixture(scope="session")
def unsloth() -> None:
    """Unsloth and all below it are imported, once, and what they warn of while they are is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fasttune.trainer  # noqa: F401


@pytest.fixture
def tiny_tokenizer(unsloth: None) -> Iterator[Any]:
    """A fresh tokenizer of builtin:tiny."""
    from fasttune import builtin, model

    yield model.transformers.AutoTokenizer.from_pretrained(builtin.path("builtin:tiny"))
