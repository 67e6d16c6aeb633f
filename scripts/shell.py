"""How the set-up runs things: uv with pip's settings in a clean environment, one line a step, the rest into the log."""

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from fasttune.errors import RunFailed

ROOT = Path(__file__).resolve().parent.parent
# Settings of the caller that would bend what is installed; indexes, proxies and certificates stay.
UNWANTED = ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "FORCE_COLOR")
# Without compiled files every command would compile torch and its like anew, for 16 seconds: verify leaves them.
UNWANTED += ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
UNWANTED += ("UV_CONSTRAINT", "UV_OVERRIDE", "UV_EXCLUDE", "UV_NO_VERIFY_HASHES", "UV_TORCH_BACKEND")
CLEAN = {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}  # nothing in the current folder is imported, nor in ~/.local
# What pip calls it → what uv calls it: https://docs.astral.sh/uv/reference/environment/
OF_PIP = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "no-cache-dir": "UV_NO_CACHE",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}


def uv_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """pip's settings of indexes, wheels and certificates as environment variables of uv; uv's own ones win."""
    listed = ""
    for python in (sys.executable, "python3"):  # Debian's may come without pip
        command = [python, "-m", "pip", "config", "list"]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(environment), cwd=ROOT, check=False)
        if done.returncode == 0:
            listed = done.stdout
            break
    found = re.findall(r"^(global|install)\.([\w-]+)=(.*)$", listed, re.M)  # `install` comes last, and wins
    settings = {option: str(ast.literal_eval(value)) for _, option, value in found}
    settings |= {name[4:].lower().replace("_", "-"): value for name, value in environment.items() if name[:4] == "PIP_"}
    translated = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # as pip does: the best version of all indexes
    for option, name in OF_PIP.items():
        words = settings.get(option, "").split()  # pip separates by blanks or lines, uv folders by commas
        if words and not (option.startswith("no-") and words[0].lower() in ("0", "false", "no", "off")):
            text = (",".join if name == "UV_FIND_LINKS" else " ".join)(words)
            translated[name] = "1" if option.startswith("no-") else text
    return {name: value for name, value in translated.items() if name not in environment}


class Shell:
    """Runs commands for one environment; with `dry_run` it prints them and changes nothing."""

    def __init__(self, python: Path, log: Path, dry_run: bool):
        self.python, self.log, self.dry_run = python, log, dry_run
        self.environment = {name: value for name, value in os.environ.items() if name not in UNWANTED} | CLEAN

    @functools.cached_property
    def uv(self) -> str:
        """The path of uv, which is brought where there is none."""
        self.environment |= uv_settings(self.environment)
        script = ["bash", str(ROOT / "scripts" / "uv.sh")]
        if self.dry_run:
            print(f"uv=$({shlex.join(script)})  # it takes pip's indexes and folders of wheels")
            return "$uv"
        return self.step("uv", script).strip()

    def install(self, what: str, *arguments: str) -> None:
        self.step(what, [self.uv, "pip", "install", "--python", str(self.python), "--no-deps", *arguments])

    def try_uv(self, verb: str, *arguments: str, **more: str) -> bool:
        """`uv pip`, which says whether it worked instead of raising."""
        return self._run([self.uv, "pip", verb, "--python", str(self.python), *arguments], more)[0] == 0

    def step(self, what: str, command: list[str]) -> str:
        """Run a command and say how long it took; returns its stdout. RunFailed says in one line what failed."""
        if self.dry_run:
            print(shlex.join(command).replace("'$uv'", '"$uv"'))
            return ""
        print(f"→ {what} … ", end="", flush=True)
        start = time.monotonic()
        code, output = self._run(command, {})
        if code != 0:
            print("failed", flush=True)
            raise RunFailed(f"{what}: {reason(self.log)} (the full log: {self.log}; fix it and run this again)")
        print(f"ok {time.monotonic() - start:.1f} s", flush=True)
        return output

    def _run(self, command: list[str], more: dict[str, str]) -> tuple[int, str]:
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            environment = self.environment | more
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT, check=False
            )
            log.write(done.stdout)
        return done.returncode, done.stdout


def reason(log: Path) -> str:
    """What the last command in a log says went wrong: its error with the causes, else its last line."""
    said = log.read_text(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
    if match := re.search(r"Hash mismatch for `([^`]+)`", said):
        return (
            f"{match[1]}: the SHA-256 of what the index gives is not in the stack file, so it was not installed: the"
            " file was changed or re-packed on its way; take PyPI's (PIP_INDEX_URL=https://pypi.org/simple), or, if you"
            " trust an index that re-packs, add --no-hashes"
        )
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    errors = [
        line.removeprefix("error: ").removeprefix("cause: ")
        for line in lines
        if re.match(r"(error|cause|ERROR):", line)
    ]
    return ": ".join(errors) or (lines or ["no output"])[-1]


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3):
            return True
    except (OSError, ValueError):
        return False
