"""The notebook's shell cells, executed as they stand: with the tiny model, in this environment."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fasttune import stack

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "fasttune_colab.ipynb"
SMALL = "model.name=builtin:tiny model.max_length=256 data.max_rows=16 train.max_steps=2 eval.problems=0 samples=1"


def cells() -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def test_every_cell_is_shell_or_python_that_compiles_and_holds_no_output() -> None:
    for cell in cells():
        if not cell.startswith("%%bash\n"):
            compile(cell, "cell", "exec")
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])


def test_without_the_project_s_address_it_says_so_in_one_line(tmp_path: Path) -> None:
    (cell,) = [cell for cell in cells() if "git clone" in cell]
    script = re.sub(
        r"(?m)^REPOSITORY=.*$", "REPOSITORY=https://github.com/OWNER/fasttune", cell.removeprefix("%%bash\n")
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.fullmatch("REPOSITORY is not set: .+\n", done.stderr)
    (tmp_path / "fasttune").mkdir()
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), "a checkout that is there is taken"


@pytest.mark.nightly  # a minute, and each of its commands has tests of its own
def test_set_up_train_compare_and_merge_run(tmp_path: Path) -> None:
    (tmp_path / "fasttune").symlink_to(ROOT)  # instead of a clone
    runs = tmp_path / "runs"
    environment = os.environ | {"FASTTUNE_VENV": sys.prefix, "FASTTUNE_TRY": SMALL}
    said = []
    made_by_set_up = (Path(sys.prefix) / stack.MARKER_FILE).is_file()  # it refuses environments that it did not make
    for cell in cells():
        if cell.startswith("%%bash\n") and (made_by_set_up or "setup_h100.sh" not in cell):
            script = "set -e\n" + cell.removeprefix("%%bash\n").replace("runs/colab", f"{runs}/colab")
            done = subprocess.run(
                ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-2000:]
            said.append(done.stdout)
    result = json.loads((runs / "colab" / "run.json").read_text())
    assert (result["status"], result["steps"]) == ("completed", 2)
    compared = next(text for text in said if "---" in text)
    assert f"--- {runs}/colab" in compared and "--- builtin:tiny" in compared
    assert (runs / "colab-merged" / "model.safetensors").is_file()
    (page,) = [cell for cell in cells() if "IFrame" in cell]
    assert "fasttune/runs/colab/report.html" in page and (runs / "colab" / "report.html").is_file()
