"""What every test shares: no network, no trace on the machine, and the tiny model's tokenizer."""

import functools
import gc
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.configuration
import pytest

from fasttune import gpus

gpus.pin()  # with several GPUs tests in this process, too, take one
_CACHE = tempfile.TemporaryDirectory(prefix="fasttune-tests-")
os.environ |= {
    "FASTTUNE_CACHE": _CACHE.name,  # inherited by the commands that tests start
    "HF_HOME": _CACHE.name,
    "HF_HUB_OFFLINE": "1",
}
# The same examples each time, and none kept in the checkout.
hypothesis.configuration.set_hypothesis_home_dir(_CACHE.name)
hypothesis.settings.register_profile("tests", database=None, deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that two processes are busy until the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure() -> None:
    _CACHE.cleanup()


@pytest.fixture(scope="session", autouse=True)
def matmuls_measured_once() -> Iterator[None]:
    """A run measures this machine's matmuls for a second before and after: no test looks at the rate of a real one."""
    from fasttune import hardware
    from fasttune.core import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "cpu_matmul_tflops", functools.cache(hardware.cpu_matmul_tflops))
        patch.setattr(train, "MATMUL_SECONDS", 0.01)
        yield


@pytest.fixture(scope="session")
def unsloth() -> None:
    """Unsloth and all below it are imported, once, and what they warn of while they are is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fasttune.core.trainer  # noqa: F401
    gc.freeze()  # a million objects that stay: every run collects garbage, and would look through them


class GpuMemory:
    """In place of a GPU's counter: 1 GiB is held, and `takes` is the most that was."""

    def __init__(self) -> None:
        self.peak = 1.0

    def takes(self, gib: float) -> None:
        self.peak = max(self.peak, gib)

    def restart(self) -> float:
        peak, self.peak = self.peak, 1.0
        return peak


@pytest.fixture
def gpu_memory(unsloth: None, monkeypatch: pytest.MonkeyPatch) -> GpuMemory:
    """A run on a CPU that measures its memory as on a GPU."""
    from fasttune.core import what_ran

    memory = GpuMemory()
    monkeypatch.setattr(what_ran, "peak_memory_gib", lambda: memory.peak)
    monkeypatch.setattr(what_ran, "restart_peak", memory.restart)
    return memory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of encoded rows; returns where its entries are."""
    monkeypatch.setenv("FASTTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def tiny_tokenizer(unsloth: None) -> Iterator[Any]:
    """A fresh tokenizer of builtin:tiny."""
    from fasttune.core import model, pretrained

    yield model.transformers.AutoTokenizer.from_pretrained(pretrained.builtin("builtin:tiny"))


@pytest.fixture(scope="session")
def tiny_recipe(unsloth: None) -> Any:
    """What encodes `messages` for builtin:tiny; tests change a field with dataclasses.replace."""
    from fasttune.core import model, pretrained
    from fasttune.data import tokenize

    tokenizer = model.transformers.AutoTokenizer.from_pretrained(pretrained.builtin("builtin:tiny"))
    return tokenize.recipe_of(tokenizer, "messages", {}, "assistant", 512, "truncate")


@pytest.fixture(scope="session")
def finished_run(unsloth: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of one finished run of builtin:tiny. Read only.

    Its adapter is overwritten with noise: a few steps make this random model say the same to every prompt.
    """
    import safetensors.torch
    import torch

    from fasttune import config, terminal
    from fasttune.core import train
    from fasttune.tools import card, estimate

    tree = {
        "name": "tiny",
        "model": {"name": "builtin:tiny", "max_length": 256},
        "data": {"train": "builtin:arithmetic", "max_rows": 32},
        "lora": {"rank": 4, "alpha": 8, "rslora": True},
        "train": {"batch_rows": 8, "max_steps": 2},
    }
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings, reporter = config.parse({**tree, "output_dir": str(folder)}), terminal.Reporter(quiet=True)
    result = train.run(settings, reporter, when_ready=estimate.add_to, when_saved=card.of_run)
    assert result.status == "completed"
    path, random = folder / "adapter" / "adapter_model.safetensors", torch.Generator().manual_seed(0)
    noise = {
        name: 0.02 * torch.randn(tensor.shape, generator=random) if "lora_B" in name else tensor
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    safetensors.torch.save_file(noise, path, {"format": "pt"})
    return folder
