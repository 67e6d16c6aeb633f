"""Foreign configs and data files end as they should: tests/fuzz/run.py says what must hold of each."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("cases", [50, pytest.param(2000, marks=pytest.mark.nightly)])
def test_mutated_configs_and_rows(cases: int) -> None:
    command = [sys.executable, "tests/fuzz/run.py", "--cases", str(cases), "--first", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
