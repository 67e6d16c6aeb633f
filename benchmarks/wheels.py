#!/usr/bin/env python3
"""The wheels that a GPU machine without a network needs beside its own torch:  python benchmarks/wheels.py --out wheels

Versions are the pins of stacks/cu130.txt, for Python 3.12 on x86-64 Linux; torch, transformers, peft, accelerate and
what they need must be there. bitsandbytes, which Unsloth imports at every load on a GPU, keeps its CUDA 13.0 library.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

from fasttune import stack

PYTHON = (3, 12)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
# Left out: torchao, diffusers and lm-eval, not used.
TRAINING = ("unsloth", "unsloth-zoo", "trl", "datasets", "dill", "multiprocess", "bitsandbytes", "liger-kernel")
CONFIG = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")
IMPORTED = ("cut-cross-entropy", "docstring-parser", "hf-transfer", "json5", "msgspec", "nest-asyncio", "structlog")
IMPORTED += ("typeguard", "tyro")  # by unsloth on a CPU; whether on a GPU was not seen
KEPT_LIBRARIES = ("libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    folder = parser.parse_args(argv).out
    folder.mkdir(parents=True, exist_ok=True)
    pins = stack.read_pins("cu130", PYTHON)
    wanted = [f"{name}=={pins[name]}" for name in (*TRAINING, *CONFIG, *IMPORTED)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--python-version", "{}.{}".format(*PYTHON), "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *wanted], check=True)
    for wheel in folder.glob("bitsandbytes-*.whl"):
        trim(wheel)
    sizes = {wheel.name: wheel.stat().st_size / 1e6 for wheel in sorted(folder.glob("*.whl"))}
    for name, size_mb in sizes.items():
        print(f"{size_mb:7.1f} MB  {name}")
    print(f"{sum(sizes.values()):7.1f} MB  {len(sizes)} wheels")
    return 0


def trim(wheel: Path) -> None:
    """Rewrite a bitsandbytes wheel without the libraries of other accelerators, in its RECORD too."""
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
        dropped = {name for name in old.namelist() if name.endswith(".so") and not name.endswith(KEPT_LIBRARIES)}
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.partition(",")[0] not in dropped).encode()
            if entry.filename not in dropped:
                new.writestr(entry, content)
    smaller.replace(wheel)


if __name__ == "__main__":
    sys.exit(main())
