"""Broken environments, built from fault_cases.py: what the real commands say of each, and that the fix helps.

A fix by pip is run, against stub wheels; a remedy in words is done to the environment and looked at again; a set-up is
asked for its plan.
"""

import dataclasses
import fnmatch
import importlib.metadata
import re
import shlex
from pathlib import Path

import pytest
from fault_cases import CASES, REQUIRES, Case
from fault_environment import ROOT, Environment, make_wheels, shared_libraries
from fault_table import render
from packaging.requirements import Requirement

from fasttune import stack


def expected_fix(case: Case) -> str:
    """What the pip command must name, from what the case says is at fault and the stack's pins."""
    pins = stack.read_pins(case.pins_of or case.stack)
    named = [name for name in pins if any(fnmatch.fnmatch(name, pattern) for pattern in case.pinned)]
    return " ".join(sorted(f"{name}=={pins[name]}" for name in named) + list(case.uninstalled))


def named_in(fix: str) -> str:
    """The packages of a pip command, sorted; nothing else may be installed or removed."""
    words = shlex.split(fix)
    wanted = [word for word in words if re.fullmatch(r"[\w.-]+==\S+", word)]
    return " ".join(sorted(wanted) + (words[words.index("-y") + 1 :] if "-y" in words else []))


def words(case: Case) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: stack.read_pins(case.stack)[match[1]], case.says)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_libraries(tmp_path_factory.mktemp("shared"))


EXAMINED = [case for case in CASES if case.check != "setup"]
PARAMETERS = [pytest.param(case, case.applied and not case.nightly, id=case.name) for case in EXAMINED]
PARAMETERS += [
    pytest.param(case, True, id=f"{case.name}-applied", marks=pytest.mark.nightly) for case in EXAMINED if case.nightly
]


@pytest.mark.parametrize(("case", "applied"), PARAMETERS)
def test_what_is_said_and_that_the_fix_helps(case: Case, applied: bool, tmp_path: Path, shared: Path) -> None:
    place = Environment(tmp_path / "env", case, shared)
    code, seen = place.verify()
    said = seen[case.check]
    assert (said["status"], code) == (case.status, {"stderr": 2}.get(case.check, code)), said
    if case.check != "stderr":
        assert code == any(check["status"] == "fail" for check in seen.values())
    assert words(case) in said["detail"]
    assert "\n" not in said["detail"]
    if case.pinned or case.uninstalled:
        assert said["fix"].startswith(f"{place.python} -m pip ")
        assert named_in(said["fix"]) == expected_fix(case)
        if not applied:
            return
        wanted = dict(word.split("==") for word in named_in(said["fix"]).split() if "==" in word)
        make_wheels(tmp_path / "wheels", wanted, case.pins_of or case.stack, code=not case.real)
        assert place.apply(said["fix"], tmp_path / "wheels") == ""
    else:
        assert case.remedy in said["fix"] if case.remedy else not said["fix"]
        if case.fixed:
            place = Environment(tmp_path / "fixed", dataclasses.replace(case, **case.fixed), shared)
    if case.leads_to:
        asked = ["--recreate"] * ("--recreate" in said["fix"])
        folder = place.folder if asked else tmp_path / "new"
        done = place.setup(*asked, "--venv", str(folder))
        assert (done.returncode, f"stack {case.leads_to}: " in done.stdout) == (0, True), done.stderr
    elif case.status != "pass":
        place.case = dataclasses.replace(place.case, check=case.after or case.check)
        again = place.verify()[1][place.case.check]
        assert again["status"] in ("pass", "skip"), again


@pytest.mark.parametrize("case", [case for case in CASES if case.check == "setup"], ids=lambda case: case.name)
def test_the_set_up_refuses_in_one_line(case: Case, tmp_path: Path, shared: Path) -> None:
    place, new = Environment(tmp_path / "env", case, shared), tmp_path / "new"
    done = place.setup("--venv", str(new))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert case.says in done.stderr
    assert case.remedy in done.stderr
    assert not new.exists()
    if case.fixed:
        place = Environment(tmp_path / "fixed", dataclasses.replace(case, **case.fixed), shared)
        assert place.setup("--venv", str(new)).returncode == 0


def test_an_environment_without_a_fault_passes(tmp_path: Path, shared: Path) -> None:
    """Both stacks, so that what the cases see is their fault alone."""
    healthy = Case("healthy", "", "", "pins", "", "pass")
    on_gpu = dataclasses.replace(healthy, stack="cu130", gpus=("NVIDIA H200, 9.0, 143771, 580.65.06",))
    for number, case in enumerate((healthy, on_gpu)):
        code, seen = Environment(tmp_path / str(number), case, shared).verify()
        wrong = [check for check in seen.values() if check["status"] not in ("pass", "skip")]
        assert (code, [check for check in wrong if check["name"] != "disk" and check["name"] != "memory"]) == (0, [])


@pytest.mark.parametrize(("package", "version"), REQUIRES)
def test_the_limits_of_the_cases_are_those_of_the_packages(package: str, version: str) -> None:
    try:
        declared = importlib.metadata.requires(package) or []
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    if installed != version:
        pytest.skip(f"{package} {installed} is installed, not the pinned one")
    limits = {(stack.canonical(need.name), str(part)) for need in map(Requirement, declared) for part in need.specifier}
    for need in map(Requirement, REQUIRES[package, version]):
        assert {(stack.canonical(need.name), str(part)) for part in need.specifier} <= limits


def test_the_table_in_the_documentation_is_that_of_the_cases() -> None:
    page = (ROOT / "docs/compatibility.md").read_text()
    assert render(page) == page, "run: python tests/faults/fault_table.py"


def test_the_cases_differ_and_ten_fixes_by_pip_are_run() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(case.applied and not case.nightly for case in CASES if case.pinned or case.uninstalled) == 10
