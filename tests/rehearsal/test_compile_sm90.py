"""Unsloth's Triton kernels for Llama-3.1-8B compile for an H100 and fit its shared memory: compile_sm90.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A block of compute capability 9.0: https://docs.nvidia.com/cuda/hopper-tuning-guide/#unified-shared-memory-l1-texture-cache
MOST_SHARED_BYTES = 227 * 1024
MOST_THREADS = 1024
LAUNCHES = {
    "_rms_layernorm_forward": 2,
    "_rms_layernorm_backward": 2,
    "_rms_sum_dw_partials": 1,
    "_fg_kernel": 1,
    "_DWf_DW_dfg_kernel": 1,
    "_rope_embedding_QK": 4,
    "_chunked_cross_entropy_forward": 1,
    "_cross_entropy_forward": 1,
    "_cross_entropy_backward": 2,
}


@pytest.mark.nightly  # it changes with the pins only
def test_the_kernels_of_an_8b_model_compile_for_an_h100(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("compile_sm90.py")]
    own = {"UNSLOTH_COMPILE_LOCATION": str(tmp_path / "unsloth"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    names = [kernel["kernel"] for kernel in compiled]
    assert {name: names.count(name) for name in names} == LAUNCHES
    for kernel in compiled:
        assert kernel["for"] == 90 and kernel["machine_code"] > 1000, kernel
        assert kernel["shared_bytes"] <= MOST_SHARED_BYTES and 32 * kernel["warps"] <= MOST_THREADS, kernel
