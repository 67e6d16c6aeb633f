"""The executed checks on a GPU: every attention backend, the bf16 matmul, and Unsloth's patched layers."""

from collections.abc import Iterator

import pytest

from fasttune.verify import Result, runner

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]
ALWAYS = ["attention:sdpa-math", "attention:sdpa-flash", "attention:sdpa-efficient"]
WHERE_PRESENT = ["sdpa-cudnn", "torch-varlen", "flash-attn", "flash-attn-3"]


def results_of(module: str, *names: str) -> list[Result]:
    job = runner.CheckJob(f"fasttune.verify.{module}", names, 420, "unset")
    return runner.run_jobs((job,), lambda text: None)


@pytest.fixture(scope="module")
def attention() -> Iterator[dict[str, Result]]:
    from fasttune.verify.attention import CHECKS

    yield {result.name: result for result in results_of("attention", *CHECKS)}


@pytest.mark.parametrize("suffix", ["", "-packed"])
@pytest.mark.parametrize("name", ALWAYS)
def test_pytorchs_kernels_are_right_in_bf16(attention: dict[str, Result], name: str, suffix: str) -> None:
    seen = attention[name + suffix]
    assert seen.status == "pass", seen.detail


@pytest.mark.parametrize("name", WHERE_PRESENT)
def test_other_kernels_are_right_or_absent(attention: dict[str, Result], name: str) -> None:
    seen = attention[f"attention:{name}"]
    if seen.status == "skip":
        pytest.skip(seen.detail)
    assert seen.status == "pass", seen.detail
    assert attention[f"attention:{name}-packed"].status in ("pass", "skip")


def test_bf16_matmul_runs_on_the_gpu() -> None:
    (seen,) = results_of("attention", "matmul-bf16")
    assert seen.status == "pass", seen.detail
    assert torch.cuda.get_device_name() in seen.detail


def test_unsloth_agrees_with_plain_and_patches_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: Unsloth's error against plain float32 stays under twice that of plain bf16."""
    monkeypatch.delenv("UNSLOTH_ENABLE_FULL_FINETUNING", raising=False)  # left by a full fine-tuning in this process
    seen = {result.name: result for result in results_of("parity", "import:unsloth", "unsloth-parity")}
    assert seen["unsloth-parity"].status == "pass", seen["unsloth-parity"].detail
    assert "patched 2 of 2 layers" in seen["unsloth-parity"].detail
