"""The flash-attn package, where it helps: `install()` never fails the set-up, it ends in one line of what was done.

A wheel fits one torch, CUDA, Python and C++ ABI only; whatever is installed has to prove itself by running its kernel
in a process of its own, or it is removed again. Only wheels of the project itself or of configured indexes are taken.
"""

import json
import os
import shutil
import subprocess

from shell import Shell, reachable

from fasttune.hardware import Hardware

RELEASES = "https://github.com/Dao-AILab/flash-attention/releases/download"
VERSIONS = ("2.8.3.post1", "2.8.3")
GIB_PER_JOB = 9  # https://github.com/Dao-AILab/flash-attention/blob/main/setup.py: "peak memory cost is ~8-9GB"
FALLBACK = "the Flash Attention 2 kernels inside PyTorch will be used"

DESCRIBE = """
import json, sys, torch
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "abi": torch._C._GLIBCXX_USE_CXX11_ABI,
                  "python": f"cp{sys.version_info[0]}{sys.version_info[1]}"}))
"""
INSTALLED = "import importlib.metadata; print(importlib.metadata.version('flash-attn'))"
PROVE = """
import torch, flash_attn
q, k, v = (torch.randn(2, 128, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
out = flash_attn.flash_attn_func(q, k, v, causal=True)  # (batch, sequence, heads, dim)
q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
reference = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
error = (out.float().transpose(1, 2) - reference).abs().max().item()
assert error < 2e-2, f"its result is off by {error}"
print(flash_attn.__version__)
"""


def install(mode: str, hardware: Hardware, shell: Shell) -> str:
    """Try `auto` or `build`, and say in one line what came of it."""
    if not hardware.gpus:
        return "no GPU: not used"
    if version := run(shell, PROVE):
        return f"{version} is installed and its kernel runs"
    facts = json.loads(run(shell, DESCRIBE) or "{}")
    if not facts.get("cuda"):
        return f"torch is no CUDA build; {FALLBACK}"
    broken = run(shell, INSTALLED)
    if broken:  # uv would take it for the one that is wanted
        shell.try_uv("uninstall", "flash-attn")
    said = build(hardware, facts["cuda"], shell) if mode == "build" else get_wheel(facts, shell)
    if not said and (version := run(shell, PROVE)):
        said = f"{version} installed and its kernel runs"
    elif not said:
        shell.try_uv("uninstall", "flash-attn")
        said = f"was installed, but its kernel does not run, so it was removed; {FALLBACK}"
    return f"{broken} did not run and was removed; {said}" if broken else said


def get_wheel(facts: dict[str, str], shell: Shell) -> str:
    """From a configured index, or from the project's releases; returns why there is none, or nothing."""
    found = shell.try_uv("install", "--only-binary", ":all:", "--no-deps", "flash-attn")
    if not found:
        found = any(shell.try_uv("install", "--no-deps", url) for url in wheel_urls(facts) if reachable(url))
    return "" if found else f"no wheel for torch {facts['torch']}, {facts['python']}; {FALLBACK}"


def wheel_urls(facts: dict[str, str]) -> list[str]:
    """Where the project publishes the wheel for this torch, by its naming convention; newest first."""
    torch = ".".join(facts["torch"].partition("+")[0].split(".")[:2])
    cuda, abi = facts["cuda"].split(".")[0], "TRUE" if facts["abi"] else "FALSE"
    tag = f"cu{cuda}torch{torch}cxx11abi{abi}-{facts['python']}-{facts['python']}-linux_x86_64"
    return [f"{RELEASES}/v{version}/flash_attn-{version.partition('.post')[0]}%2B{tag}.whl" for version in VERSIONS]


def build(hardware: Hardware, cuda: str, shell: Shell) -> str:
    """Compile for the present chip only; returns what stood in the way, or nothing."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if not (shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")):
        return f"not built: no nvcc (install the CUDA {cuda} toolkit, or set CUDA_HOME); {FALLBACK}"
    major, minor = hardware.gpus[0].compute_capability
    jobs = max(1, min(hardware.cores, int(hardware.memory_gib // GIB_PER_JOB)))
    settings = {"MAX_JOBS": str(jobs), "FLASH_ATTENTION_FORCE_BUILD": "TRUE"}
    settings |= {"FLASH_ATTN_CUDA_ARCHS": f"{major}{minor}", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    shell.try_uv("install", "--no-deps", "ninja")  # without it the build uses one core
    # --no-cache: a wheel that was built for another torch lies there under the same name
    options = ["--no-deps", "--no-build-isolation", "--no-binary", "flash-attn", "--no-cache"]
    built = shell.try_uv("install", *options, f"flash-attn=={VERSIONS[-1]}", **settings)
    return "" if built else f"not built: the compiler failed, see the log; {FALLBACK}"


def run(shell: Shell, code: str) -> str:
    """The last line that the environment's Python prints, or nothing where it fails."""
    command = [shell.python, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=shell.environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().rpartition("\n")[2]
