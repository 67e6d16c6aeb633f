#!/usr/bin/env python3
"""Known vulnerabilities of the pinned packages:  python scripts/audit.py

Asks https://osv.dev once for all pins of stacks/*.txt. Exit code 0: none, 1: some, each printed with its page, 3: the
source cannot be reached. pip-audit would do it too, and bring more packages than the tools of the tests have.
"""

import json
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fasttune import stack  # noqa: E402

URL = "https://api.osv.dev/v1/querybatch"  # https://google.github.io/osv.dev/post-v1-querybatch/
TIMEOUT_S = 5
UNREACHABLE = 3  # exit code
PYTHONS = ((3, 11), (3, 12), (3, 13))
ACCEPTED: Mapping[str, str] = {}  # advisory → why it does not reach a user of fasttune; each leaves with the next pins

Pin = tuple[str, str]  # name, version


@dataclass(frozen=True)
class Finding:
    package: str
    version: str
    advisory: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}: {self.advisory} (https://osv.dev/vulnerability/{self.advisory})"


def all_pins() -> list[Pin]:
    """What any stack installs on any Python, and the tools of the tests."""
    pins = [stack.read_pins(name, python) for name in stack.stack_names() for python in PYTHONS]
    pins += [stack.read_pin_file(stack.STACK_DIR / f"{name}.txt") for name in ("dev", "setup")]
    return sorted({(name, version.partition("+")[0]) for each in pins for name, version in each.items()})


def ask(pins: list[Pin]) -> Any:
    """The source's answer, an entry a pin. Raises OSError where there is none and ValueError where it is no JSON."""
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in pins]
    body = json.dumps({"queries": queries}).encode()
    request = urllib.request.Request(URL, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def findings(pins: list[Pin], answer: Any) -> list[Finding]:
    """The advisories of an answer, without the accepted ones. Raises ValueError for an answer that is none."""
    try:
        found = [[vulnerability["id"] for vulnerability in entry.get("vulns", ())] for entry in answer["results"]]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"an answer of another form ({error!r})") from error
    if len(found) != len(pins):
        raise ValueError(f"{len(found)} entries for {len(pins)} pins")
    pairs = zip(pins, found, strict=True)
    return [Finding(*pin, advisory) for pin, ids in pairs for advisory in ids if advisory not in ACCEPTED]


def main() -> int:
    pins = all_pins()
    try:
        found = findings(pins, ask(pins))
    except (OSError, ValueError) as error:
        print(f"audit: not done, {URL} does not answer: {error} (allow it, or run this on a machine that reaches it)")
        return UNREACHABLE
    for finding in found:
        print(finding)
    print(f"audit: {len(pins)} pinned packages, {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
