"""Known vulnerabilities of what is pinned: asked for where the source can be reached, said where it cannot."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "audit.py"
PINS = [("attrs", "26.1.0"), ("jinja2", "2.4.1"), ("yarl", "1.25.1")]
ANSWER = {  # of the form of https://google.github.io/osv.dev/post-v1-querybatch/
    "results": [
        {},
        {"vulns": [{"id": "GHSA-462w-v97r-4m45", "modified": "2024-09-24T20:53:23Z"}, {"id": "PYSEC-2019-217"}]},
        {"vulns": []},
    ]
}


@pytest.fixture
def audit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds the checkout
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "audit", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_no_pinned_package_has_a_known_vulnerability() -> None:
    """Skipped, with the reason, where the source cannot be reached: `pytest -rs`."""
    try:
        done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("the audit had no answer in 20 s")
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_vulnerable_package_is_found_and_named(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "all_pins", lambda: PINS)
    monkeypatch.setattr(audit, "ask", lambda pins: ANSWER)
    assert audit.main() == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == "jinja2 2.4.1: GHSA-462w-v97r-4m45 (https://osv.dev/vulnerability/GHSA-462w-v97r-4m45)"
    assert "PYSEC-2019-217" in second and "2 known vulnerabilities" in last
    monkeypatch.setattr(audit, "ACCEPTED", {"GHSA-462w-v97r-4m45": "why", "PYSEC-2019-217": "why"})
    assert audit.main() == 0


@pytest.mark.parametrize(
    "answer", [{}, [], {"results": [{}]}, {"results": [{"vulns": [{}]}, {}, {}]}, OSError("no way")]
)
def test_no_answer_is_said_and_never_taken_for_a_clean_one(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: object
) -> None:
    def ask(pins: object) -> object:
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(audit, "all_pins", lambda: PINS)
    monkeypatch.setattr(audit, "ask", ask)
    assert audit.main() == audit.UNREACHABLE == 3
    assert "not done" in capsys.readouterr().out


def test_every_pin_of_every_stack_is_asked_for(audit: ModuleType) -> None:
    pins = audit.all_pins()
    assert {("torch", "2.13.0"), ("torch", "2.11.0"), ("numpy", "2.5.2")} <= set(pins)
    assert "pytest" in dict(pins) and len(pins) == len(set(pins)) > 120
