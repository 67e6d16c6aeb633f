"""The numbers of Unsloth's kernels for a GPU, which no run on a CPU goes through: kernel_numbers.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly  # they change with the pins only
CASES = ["rms_norm", "swiglu", "rope", "cross_entropy", "cross_entropy_128k", "lora_qkv", "lora_o", "lora_mlp"]
EPS = {"float32": 2.0**-23, "float16": 2.0**-10}
# A result in fp16 is rounded once or twice from fp32, by half an eps each; in fp32 every addition rounds.
LIMIT_EPS = {"float32": 8, "float16": 1}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("numbers")
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("kernel_numbers.py")]
    environment = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_case_is_there(report: dict[str, dict[str, dict[str, float]]]) -> None:
    assert list(report) == CASES and all(list(found) == list(EPS) for found in report.values())


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_what_float64_does(
    report: dict[str, dict[str, dict[str, float]]], case: str, dtype: str
) -> None:
    errors_eps = {name: error / EPS[dtype] for name, error in report[case][dtype].items()}
    assert any(name.startswith("out") for name in errors_eps) and any(name.startswith("d") for name in errors_eps)
    assert all(error <= LIMIT_EPS[dtype] for error in errors_eps.values()), errors_eps
