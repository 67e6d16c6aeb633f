#!/usr/bin/env python3
"""Preflight, .venv, pinned stack, package, verify. Called by scripts/setup_h100.sh; needs a bare Python only.

Everything happens inside the environment's folder. A marker file in it says `installing` until all is there, so a
set-up that was killed is seen and done again; a good environment is left as it is and only verified.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.dont_write_bytecode = True  # --dry-run leaves nothing behind

import flash_attention  # noqa: E402  scripts/flash_attention.py
from shell import ROOT, Shell, reachable  # noqa: E402  scripts/shell.py

from fasttune import stack  # noqa: E402
from fasttune.errors import FasttuneError, RunFailed  # noqa: E402
from fasttune.gpus import triton_lacks  # noqa: E402
from fasttune.hardware import Hardware, detect  # noqa: E402

LOG_FILE = "setup.log"
KEPT = {stack.MARKER_FILE, LOG_FILE, "pyvenv.cfg"}  # deleted last, or not at all, when an environment is rebuilt
LEAST_GLIBC = (2, 28)  # torch's wheels are manylinux_2_28


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FasttuneError(f"{message} (see --help)")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="setup_h100.sh", description="From a bare machine to a checked environment.")
    default = os.environ.get("FASTTUNE_VENV") or str(ROOT / ".venv")
    parser.add_argument("--stack", choices=stack.stack_names(), help="default: the one that fits this machine")
    parser.add_argument("--venv", default=default, metavar="DIR", help="the environment's folder (default: .venv)")
    parser.add_argument("--python", metavar="PATH", help="a Python 3.11 to 3.13 (default: the first one, or one by uv)")
    parser.add_argument("--dev", action="store_true", help="also the tools of scripts/test.sh")
    parser.add_argument("--dry-run", action="store_true", help="print every command, change nothing")
    parser.add_argument("--recreate", action="store_true", help="build the environment again from nothing")
    parser.add_argument(
        "--no-hashes", action="store_true", help="take other files than PyPI's (an index that re-packs wheels)"
    )
    parser.add_argument(
        "--flash-attn", choices=("auto", "build", "skip"), help="default: auto where something is installed"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  a terminal without UTF-8
    try:
        return Setup(parse(argv)).run()
    except FasttuneError as error:
        print(f"setup: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a folder that cannot be written, a full disk, a closed pipe
        print(f"setup: {error.filename or 'output'}: {error.strerror} (fix it and run this again)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsetup: interrupted (run it again to finish)", file=sys.stderr)
        return 130


def preflight(asked: str | None, hardware: Hardware) -> tuple[str, str]:
    """The stack and the reason for it; raises for a machine that cannot take it."""
    glibc = tuple(int(part) for part in (hardware.glibc or "0").split(".")[:2])
    if hardware.os != "linux" or hardware.arch != "x86_64" or glibc < LEAST_GLIBC:
        have = f"{hardware.os} {hardware.arch}, glibc {hardware.glibc or 'none'}"
        raise FasttuneError(
            f"this is {have}; needed is x86-64 Linux with glibc 2.28 or newer (Ubuntu 20.04, Debian 11)"
        )
    chosen = (asked, "asked for") if asked else stack.choose_stack(hardware)
    if hardware.gpus and chosen[0] != "cpu" and (lacks := triton_lacks()):
        raise FasttuneError(f"Triton, which compiles kernels for the GPU, needs {lacks[0]} ({lacks[1]})")
    return chosen


class Setup:
    """One set-up of one folder; `run` is the straight line."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.venv = Path(options.venv).expanduser().absolute()
        self.python, self.marker = self.venv / "bin" / "python", self.venv / stack.MARKER_FILE
        self.hardware = detect(self.venv, hidden_too=True)
        self.stack, self.reason = preflight(options.stack, self.hardware)
        self.shell = Shell(self.python, self.venv / LOG_FILE, options.dry_run)

    def run(self) -> int:
        machine, gpu = self.hardware, self.hardware.gpus[0].name if self.hardware.gpus else "no GPU"
        memory = f"{machine.memory_gib:.0f} GiB memory, {machine.disk_free_gib:.0f} GiB disk free"
        print(f"Python {platform.python_version()}, {machine.cores} cores, {memory}, {gpu}")
        print(f"stack {self.stack}: {self.reason}")
        plan, why = self.judge()
        idle = plan == "keep" and self.options.flash_attn in (None, "skip")
        if idle or self.options.dry_run:
            self.work(plan, why)
        else:
            self.venv.mkdir(parents=True, exist_ok=True)
            with locked(self.venv):
                self.work(*self.judge())  # again, now that nobody else is at work in it
        return self.verify(quick=idle)

    # -- what is there -------------------------------------------------------------------------------------------

    def judge(self) -> tuple[str, str]:
        """`create`, `rebuild`, `repair` or `keep`, and why; raises where the folder is not ours to touch."""
        if not self.venv.exists() or (self.venv.is_dir() and not any(self.venv.iterdir())):
            self.need_disk()
            return "create", "new"
        ours, is_venv = self.marker.is_file(), (self.venv / "pyvenv.cfg").is_file()
        if not is_venv and not (ours and {path.name for path in self.venv.iterdir()} <= KEPT):
            raise FasttuneError(f"--venv {self.venv}: exists and is no virtual environment (name another folder)")
        if not ours and not self.options.recreate:
            raise FasttuneError(
                f"--venv {self.venv}: was not made by this script (name another folder, or replace it with --recreate)"
            )
        made, asked = self.read_marker(), self.options.python and platform.python_version()
        if self.options.recreate:
            return "rebuild", "rebuilt, as asked"
        if made.get("state") != "ok":
            return "rebuild", "an earlier set-up did not finish; rebuilt"
        if made.get("stack") != self.stack:
            return "rebuild", f"holds the stack {made.get('stack')}; rebuilt for {self.stack}"
        if asked and made.get("python") != asked:
            return "rebuild", f"holds Python {made.get('python')}; rebuilt for {asked}"
        versions = self.installed()
        if versions is None:
            return "rebuild", "its Python does not start; rebuilt"
        return self.compare(made, versions)

    def compare(self, made: dict, versions: dict[str, str]) -> tuple[str, str]:
        python = tuple(int(part) for part in made["python"].split(".")[:2])
        pins = stack.read_pins(self.stack, python)
        pins |= stack.read_pin_file(stack.STACK_DIR / "dev.txt", python) if made.get("dev") else {}
        drifted = stack.compare(pins, versions)
        if "fasttune" not in versions:
            drifted.append(stack.Mismatch("fasttune", "this checkout", None))
        if drifted:
            more = f" and {len(drifted) - 3} more" if len(drifted) > 3 else ""
            return "repair", f"{', '.join(map(str, drifted[:3]))}{more}; repaired"
        if self.options.dev and not made.get("dev"):
            return "repair", "good; the tools for tests are added"
        if made.get("fingerprint") != self.fingerprint(made.get("dev", False)):
            return "repair", "the stack's or the package's files changed; brought up to date"
        return "keep", f"good ({len(versions)} packages as pinned), left as it is"

    def read_marker(self) -> dict:
        try:
            made = json.loads(self.marker.read_text())
        except (OSError, ValueError):
            return {}
        return made if isinstance(made, dict) else {}

    def installed(self) -> dict[str, str] | None:
        code = f"import sys, json; sys.path.insert(0, {str(ROOT)!r}); from fasttune import stack"
        command = [self.python, "-Bc", f"{code}; print(json.dumps(stack.installed()))"]
        environment = self.shell.environment
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return None
        return json.loads(done.stdout)

    def files(self, dev: bool) -> list[Path]:
        tools = ["setup", "dev"] if dev else ["setup"]
        return [stack.stack_file(self.stack), *(stack.STACK_DIR / f"{name}.txt" for name in tools)]

    def fingerprint(self, dev: bool) -> str:
        files = [*self.files(dev), ROOT / "pyproject.toml"]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def need_disk(self) -> None:
        needed, free = stack.DISK_NEEDED_GIB[self.stack], self.hardware.disk_free_gib
        if free < needed:
            raise FasttuneError(
                f"--venv {self.venv}: {free:.1f} GiB free, the stack {self.stack} needs {needed} GiB"
                " (free some, or name a folder on another disk with --venv)"
            )

    # -- what is done --------------------------------------------------------------------------------------------

    def work(self, plan: str, why: str) -> None:
        print(f"environment {self.venv}: {why}")
        if plan != "keep":
            self.install(plan)
        elif self.options.flash_attn:
            self.install_flash_attn(self.options.flash_attn)

    def install(self, plan: str) -> None:
        made = self.read_marker() if plan == "repair" else {}
        dev = self.options.dev or made.get("dev", False)
        facts = {"stack": self.stack, "python": made.get("python", platform.python_version()), "dev": dev}
        self.mark("installing", facts)
        if not self.options.dry_run:
            self.shell.log.write_text("")
        if plan == "rebuild":
            self.clear()
        if plan != "repair":
            make = ["venv", "--allow-existing", "--python", sys.executable, str(self.venv)]
            self.shell.step("virtual environment", [self.shell.uv, *make])
        self.install_torch()
        hashes = "--no-verify-hashes" if self.options.no_hashes else "--require-hashes"
        files = [word for file in self.files(dev) for word in ("-r", str(file))]
        self.shell.install(f"stack {self.stack}{' and tools for tests' if dev else ''}", hashes, *files)
        self.install_package()
        self.install_flash_attn(self.options.flash_attn or "auto")
        self.mark("ok", facts | {"fingerprint": self.fingerprint(dev)})

    def mark(self, state: str, facts: dict) -> None:
        if self.options.dry_run:
            return
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        temporary = self.marker.with_suffix(".tmp")
        temporary.write_text(json.dumps({"state": state, **facts, "date": date}, indent=1) + "\n")
        temporary.replace(self.marker)

    def clear(self) -> None:
        """Empty the folder, the marks that it is ours last, so that a kill in between can be continued."""
        if self.options.dry_run:
            print(f"rm -r {shlex.quote(str(self.venv))}/*")
            return
        for path in self.venv.iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def install_torch(self) -> None:
        """Where it is another build than PyPI's. No index has a CUDA build under `+cpu`: none comes by accident."""
        if self.stack not in stack.TORCH:
            return
        build = stack.TORCH[self.stack]
        wanted = [f"{name}=={version}" for name, version in build.versions.items()]
        index = ["--default-index", build.index] if self.stack != "cpu" or reachable(f"{build.index}/torch/") else []
        try:
            self.shell.install(f"torch, {self.stack} build", *index, *wanted)
        except RunFailed as error:
            raise RunFailed(
                f"{error}; {wanted[0]} comes from {build.index}: make it reachable, or put the wheel into a folder and"
                " set PIP_FIND_LINKS to it"
            ) from None

    def install_package(self) -> None:
        self.shell.install("fasttune", "--no-build-isolation", "--editable", str(ROOT))

    def install_flash_attn(self, mode: str) -> None:
        if mode == "skip":
            return
        if self.options.dry_run:
            print(f"# flash-attn: {mode}, decided by the installed torch")
            return
        print(f"→ flash-attn … {flash_attention.install(mode, self.hardware, self.shell)}")

    def verify(self, quick: bool) -> int:
        command = [str(self.python), "-m", "fasttune.verify", *(["--quick"] if quick else [])]
        if self.options.dry_run:
            print(shlex.join(command))
            return 0
        if not quick:
            print(f"→ verify … (the full log of the installation: {self.shell.log})", flush=True)
        code = subprocess.run(command, cwd=ROOT, env=self.shell.environment).returncode
        said = "ready" if code == 0 else "verify failed, see above"
        print(f"{said}: source {self.venv / 'bin' / 'activate'}   log: {self.shell.log}")
        return code


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One set-up at a time in a folder; the folder itself is locked, so nothing is left behind."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FasttuneError(f"another set-up is at work in {folder} (wait for it to end)") from None
        yield
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
