"""The flash-attn package, where it helps: `install()` never fails the set-up, it ends in one line of what was done.

A wheel fits one torch, CUDA, Python and C++ ABI only; whatever is installed has to prove itself by running its kernel
in a process of its own, or it is removed again. Only wheels of the project itself or of configured indexes are taken.
"""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request

from shell import Shell

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
    if version := _proven(shell):
        return f"{version} is installed and its kernel runs"
    facts = _describe(shell)
    if facts is None or not facts["cuda"]:
        return f"torch is no CUDA build; {FALLBACK}"
    broken = _run(shell, INSTALLED)
    if broken:  # pip would take it for the one that is wanted
        shell.try_pip("uninstall", "-y", "flash-attn")
    said = _get(mode, facts, hardware, shell)
    return f"{broken.strip()} did not run and was removed; {said}" if broken else said


def _get(mode: str, facts: dict[str, str], hardware: Hardware, shell: Shell) -> str:
    if mode == "build":
        problem = _build(hardware, facts["cuda"], shell)
        if problem:
            return f"not built: {problem}; {FALLBACK}"
    elif not (
        shell.try_pip("install", "--only-binary=:all:", "--no-deps", "flash-attn") or _from_release(facts, shell)
    ):
        return f"no wheel for torch {facts['torch']}, {facts['python']}; {FALLBACK}"
    if version := _proven(shell):
        return f"{version} installed and its kernel runs"
    shell.try_pip("uninstall", "-y", "flash-attn")
    return f"was installed, but its kernel does not run, so it was removed; {FALLBACK}"


def wheel_urls(facts: dict[str, str]) -> list[str]:
    """Where the project publishes the wheel for this torch, by its naming convention; newest first."""
    torch = ".".join(facts["torch"].partition("+")[0].split(".")[:2])
    cuda, abi = facts["cuda"].split(".")[0], "TRUE" if facts["abi"] else "FALSE"
    tag = f"cu{cuda}torch{torch}cxx11abi{abi}-{facts['python']}-{facts['python']}-linux_x86_64"
    return [f"{RELEASES}/v{version}/flash_attn-{version.partition('.post')[0]}%2B{tag}.whl" for version in VERSIONS]


def _from_release(facts: dict[str, str], shell: Shell) -> bool:
    for url in wheel_urls(facts):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
                pass
        except urllib.error.HTTPError:
            continue  # not published for this combination
        except OSError:
            return False  # the site cannot be reached
        if shell.try_pip("install", "--no-deps", url):
            return True
    return False


def _build(hardware: Hardware, cuda: str, shell: Shell) -> str | None:
    """Compile for the present chip only; returns what stood in the way, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not nvcc:
        return f"no nvcc (install the CUDA {cuda} toolkit, or set CUDA_HOME)"
    major, minor = hardware.gpus[0].compute_capability
    jobs = max(1, min(hardware.cores, int(hardware.memory_gib // GIB_PER_JOB)))
    architectures = {"FLASH_ATTN_CUDA_ARCHS": f"{major}{minor}", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    build = {"MAX_JOBS": str(jobs), "FLASH_ATTENTION_FORCE_BUILD": "TRUE", **architectures}
    shell.try_pip("install", "--no-deps", "ninja")  # without it the build uses one core
    arguments = [
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary=flash-attn",
        "--no-cache-dir",  # a wheel that pip built for another torch lies there under the same name
        f"flash-attn=={VERSIONS[-1]}",
    ]
    return None if shell.try_pip(*arguments, **build) else "the compiler failed, see the log"


def _proven(shell: Shell) -> str | None:
    found = _run(shell, PROVE)
    return found.strip().splitlines()[-1] if found else None


def _describe(shell: Shell) -> dict[str, str] | None:
    found = _run(shell, DESCRIBE)
    return json.loads(found) if found else None


def _run(shell: Shell, code: str) -> str | None:
    try:
        done = subprocess.run(
            [shell.python, "-c", code], capture_output=True, text=True, timeout=120, env=shell.environment, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
