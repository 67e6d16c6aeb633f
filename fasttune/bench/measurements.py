"""measurements.jsonl: what was measured of one job, by one revision, on one machine, so that a benchmark can go on.

The first line says what it is of, and the date it was begun; a line follows as each measurement ends.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttune import metrics, report, system
from fasttune.bench.arms import WHAT
from fasttune.bench.result import Arm, Limit, Repeat
from fasttune.errors import OutputError
from fasttune.metrics import Backend

TOLD = 3  # differences that are named, of all


class Measurements:
    """`identity`: all that two measurements must have in common to be compared, as JSON takes it.

    Raises OutputError for a folder that cannot be written, or holds measurements of another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], date: str):
        self.path = folder / "measurements.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = system.read_text(self.path, "replace") if self.path.exists() else ""
        except OSError as error:
            raise OutputError(f"output: {folder} cannot be written ({error.strerror}); name another folder") from error
        first, *self.lines = self._read(text) or [identity | {"date": date}]
        if differ := list(differences(first, identity)):
            more = f" and {len(differ) - TOLD} more" if len(differ) > TOLD else ""
            raise OutputError(
                f"output: {folder} holds measurements of another job: {', '.join(differ[:TOLD])}{more}; "
                "name another folder with --output, or remove this one"
            )
        self.date: str = first["date"]
        whole = "".join(json.dumps(line) + "\n" for line in [first, *self.lines])
        if whole != text:
            report.write_bytes(self.path, whole.encode())

    def _read(self, text: str) -> list[dict[str, Any]]:
        """All lines; the last one only if it is whole: the end of a process, or of a machine, may have torn it."""
        found, lines = [], text.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except ValueError:
                if number < len(lines):
                    raise OutputError(
                        f"output: {self.path} line {number} is no valid JSON; name another folder with --output"
                    ) from None
        return found

    def get(self, arm: str, number: int) -> dict[str, Any] | None:
        return next((line for line in self.lines if (line["arm"], line["repeat"]) == (arm, number)), None)

    def failed(self, arm: str) -> str | None:
        """Why an arm cannot do the job: it is not tried again in the same benchmark."""
        return next((line["failure"] for line in self.lines if line["arm"] == arm and "failure" in line), None)

    def add(self, arm: str, number: int, result: dict[str, Any], objections: list[str]) -> None:
        """`objections`: what was wrong with the machine meanwhile."""
        line = {"arm": arm, "repeat": number, **result, "objections": objections}
        self.lines.append(line)
        with system.open_text(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def objections(self) -> list[str]:
        """Of all measurements, also of those that an earlier process made."""
        return [text for line in self.lines for text in line["objections"]]

    def arm(self, name: str, repeats: int) -> Arm:
        lines = [line for number in range(repeats) if (line := self.get(name, number)) and "failure" not in line]
        fields = Repeat.__dataclass_fields__
        found = [
            Repeat(
                **{key: line[key] for key in fields if key in line and key != "backend"},
                backend=Backend(**line["backend"]),
            )
            for line in lines
        ]
        return Arm(name, WHAT[name], found, self.failed(name))

    def limit(self, repeats: int) -> Limit | None:
        """The best of the measured matmul rates: other work on the machine only ever lowers it."""
        rates = [line for number in range(repeats) if (line := self.get("limit", number)) and "failure" not in line]
        # The most of any arm: one that computes a shared beginning once has less to do.
        counted = max((known for line in self.lines if (known := line.get("flops_per_token"))), default=None)
        if not rates or counted is None:
            return None
        best = max(rates, key=lambda line: line["tflops"])
        return Limit(best["tflops"], counted, best["tflops"] * 1e12 / counted, metrics.FLOPS_FORMULA, best["shapes"])


def differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """What is not what it was, by its dotted name: "git was 1a2b3c4, is 5d6e7f8"."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            if name or key in now:  # what the first line tells beside the identity is compared with nothing
                yield from differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        yield f"{name.removeprefix('config.')} was {then}, is {now}"
