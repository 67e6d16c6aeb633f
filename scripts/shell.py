"""How the set-up runs things: a clean environment, one line a step, everything else into the log, one at a time."""

import contextlib
import fcntl
import os
import re
import shlex
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fasttune.errors import FasttuneError, RunFailed

# Settings of the caller that would install elsewhere or bend the pins; indexes, proxies and certificates stay.
UNWANTED = ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME")
UNWANTED += ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_CONSTRAINT", "PIP_REQUIREMENT")


class Shell:
    """Runs commands for one environment; with `dry_run` it prints them and changes nothing."""

    def __init__(self, python: Path, log: Path, folder: Path, dry_run: bool):
        self.python, self.log, self.folder, self.dry_run = python, log, folder, dry_run
        self.environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
        self.environment |= {"PYTHONSAFEPATH": "1"}  # nothing in the current folder is imported
        self.environment |= {"PYTHONNOUSERSITE": "1", "PIP_USER": "0", "PIP_NO_INPUT": "1"}

    def pip(self, *arguments: str) -> list[str]:
        return [str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments]

    def pip_step(self, what: str, *arguments: str) -> None:
        self.step(what, self.pip("install", *arguments))

    def try_pip(self, *arguments: str, **more_environment: str) -> bool:
        """Run pip into the log; says whether it worked instead of raising."""
        return self._run(self.pip(*arguments), self.environment | more_environment).returncode == 0

    def step(self, what: str, command: list[str], capture: bool = False) -> str:
        """Run a command and say how long it took; its stdout with `capture`. RunFailed says in one line what failed."""
        if self.dry_run:
            print(shlex.join(command))
            return ""
        print(f"→ {what} … ", end="", flush=True)
        start = time.monotonic()
        done = self._run(command, self.environment, capture)
        if done.returncode != 0:
            print("failed", flush=True)
            raise RunFailed(f"{what}: {telling_line(self.log)} (the full log: {self.log}; mend it and run this again)")
        print(f"ok {time.monotonic() - start:.1f} s", flush=True)
        return done.stdout or ""

    def _run(
        self, command: list[str], environment: dict[str, str], capture: bool = False
    ) -> subprocess.CompletedProcess[str]:
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            stdout = subprocess.PIPE if capture else log
            return subprocess.run(
                command, stdout=stdout, stderr=log, text=True, env=environment, cwd=self.folder, check=False
            )


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
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


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3):
            return True
    except (OSError, ValueError):
        return False


def telling_line(log: Path) -> str:
    """The line of the last command in a log that says what went wrong: its last error, else its last line."""
    last = log.read_text(errors="replace").rpartition("\n$ ")[2].splitlines()[1:]
    lines = [line.strip() for line in last if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|[Ee]rror|OSError)\b", line)]
    return wrong_hash(lines) or (errors or lines or ["no output"])[-1]


def wrong_hash(lines: list[str]) -> str | None:
    """What to do about a file that is not the one the stack was locked with, where that is what pip says."""
    at = next((number for number, line in enumerate(lines) if "DO NOT MATCH THE HASHES" in line), None)
    if at is None:
        return None
    package, _, url = lines[at + 1].partition(" from ")
    place = urllib.parse.urlsplit(url.partition(" (from ")[0])
    file = f"{place.hostname or place.scheme}/…/{place.path.rpartition('/')[2]}"
    return (
        f"{package}: the SHA-256 of {file} is not in the stack file, so it was not installed: the file was changed or"
        " re-packed on its way; take PyPI's (PIP_INDEX_URL=https://pypi.org/simple), or, if you"
        " trust an index that re-packs, add --no-hashes"
    )
