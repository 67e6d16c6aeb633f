"""What people are told to type, read by bash: the commands of README, docs, configs, help texts and scripts.

Bash does the reading, so that quotes, comments, continued lines, redirections and patterns are what they are when
somebody pastes the line. It finds no program at all: each command only notes its words.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fasttune import config, options

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    if path.name not in ("CHANGELOG.md", "LOG.md")  # they say what was typed once
)
# failglob: a pattern that fits no file is an error, as it is in zsh; unquoted, [a,b] is one.
LISTENING = r"""
set -eu
shopt -s failglob
command_not_found_handle() { printf '%s\0' $# "$@" >> "$HEARD"; }
cd() { :; }
source() { :; }
"""
STANDIN = """#!/bin/sh
printf '%s\\0' $(($# + 1)) "$0" "$@" >> "$HEARD"
"""
BLOCK = re.compile(r"^```(?:bash|fish)\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
INLINE = re.compile(r"(\w+=\S+ )?((\.venv/bin/)?fasttune [a-z]+|bash (scripts|benchmarks)/\S+|python [\w/]+\.py) \S")
IN_CONFIG = re.compile(r"(?:[A-Z]\w*=\S+ )?\.venv/bin/\w+ [^;)\n]+|bash scripts/\w+\.sh")
OF_OTHERS = ("checkpoint.save_consolidated=final",)  # a setting of NeMo Automodel
USAGE = re.compile(r":  ?((?:python|bash) (?:scripts|benchmarks|stacks|tests)/[^\n]+)")


@dataclass(frozen=True)
class Command:
    """words: as the program gets them, its name first; where: the page and the line."""

    words: tuple[str, ...]
    where: str

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)}"


def commands() -> list[Command]:
    """Each command once, with the first place that has it."""
    found: dict[tuple[str, ...], Command] = {}
    for where, text in _texts():
        for words in heard(text, where):
            found.setdefault(words, Command(words, where))
    return list(found.values())


def _texts() -> list[tuple[str, str]]:
    texts = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            texts.append((_where(page, text, match.start(1)), match[1]))
        spans = list(SPAN.finditer(BLOCK.sub(lambda block: re.sub("[^\n]", " ", block[0]), text)))
        # `(see settings)`: a measurement's command was shortened, its whole one is in its row
        texts += [(_where(page, text, s.start()), s[1]) for s in spans if INLINE.match(s[1]) and "(see" not in s[1]]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        comment = path.read_text().partition("\nname:")[0]
        texts += [(_where(path, comment, match.start()), match[0]) for match in IN_CONFIG.finditer(comment)]
    scripts = [path for folder in ("scripts", "benchmarks", "stacks") for path in (ROOT / folder).glob("*.*")]
    for path in sorted(path for path in scripts if path.suffix in (".py", ".sh")):
        head = path.read_text()[:1500]
        for match in USAGE.finditer(head):
            usage = re.sub(r"[\[\]…]", "", match[1]).replace("|", " ").rstrip(".")
            texts.append((_where(path, head, match.start()), usage))
    texts += [("fasttune --help", line) for line in options.EXAMPLES.splitlines()[1:]]
    return texts


def _where(path: Path, text: str, position: int) -> str:
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, position) + 1}"


def settings() -> list[tuple[str, str]]:
    """(text, where) of each `section.name=value` in running text, as it would be pasted behind a config; once."""
    known, found = set(config.known_keys()), {}
    for page in PAGES:
        text = page.read_text()
        for match in SPAN.finditer(text):
            key = match[1].lstrip("'").partition("=")
            dotted = re.fullmatch(r"(model|data|lora|train|eval|checkpoint)\.\w+", key[0])
            if key[1] and (dotted or key[0] in known) and match[1] not in OF_OTHERS:
                found.setdefault(match[1], _where(page, text, match.start()))
    return list(found.items())


@cache
def heard(script: str, where: str) -> list[tuple[str, ...]]:
    """The words of each command of a script, in the order in which bash would run them.

    Raises AssertionError where bash itself finds fault with it, which names the place.
    """
    with tempfile.TemporaryDirectory() as folder:
        place, heard = Path(folder), Path(folder, "heard")
        (place / "nothing").mkdir()
        (place / ".venv" / "bin").mkdir(parents=True)
        for name in ("fasttune", "python", "pytest", "hf"):
            standin = place / ".venv" / "bin" / name
            standin.write_text(STANDIN)
            standin.chmod(0o755)
        environment = {"PATH": str(place / "nothing"), "HEARD": str(heard), "LC_ALL": "C.UTF-8"}
        bash = ["/bin/bash", "--norc", "-c", LISTENING + script]
        done = subprocess.run(bash, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), f"{where}: bash says: {done.stderr}"
        parts = heard.read_text().split("\0")[:-1] if heard.exists() else []
    found = []
    while parts:
        count = int(parts[0])
        found.append((os.path.basename(parts[1]), *parts[2 : count + 1]))
        parts = parts[count + 1 :]
    return found
