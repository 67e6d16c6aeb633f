"""The Dockerfile without docker: hadolint reads it, and its set-up is planned in a folder of what the image gets.

Building it needs a registry, which is not asked for here.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fasttune import stack

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.mark.skipif(not HADOLINT.exists(), reason="no hadolint here: scripts/setup_h100.sh --dev brings it")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([HADOLINT, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_its_set_up_works_with_what_the_image_gets(tmp_path: Path) -> None:
    """.dockerignore names what is copied; the set-up, as the Dockerfile calls it, finds all it needs there."""
    ignore = (ROOT / ".dockerignore").read_text().split("\n")
    taken = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore and "\nCOPY . .\n" in DOCKERFILE, "nothing else is copied"
    for name in taken:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (arguments,) = re.findall(r"bash scripts/setup_h100\.sh (.+) \\\n", DOCKERFILE)
    (default,) = re.findall(r"^ARG STACK=(\w+)$", DOCKERFILE, re.M)
    for name in {default, *re.findall(r"STACK=(\w+)", DOCKERFILE)}:
        command = f"bash scripts/setup_h100.sh {arguments} --dry-run"
        environment = os.environ | {"STACK": name, "XDG_CACHE_HOME": str(tmp_path / "cache"), "FASTTUNE_VENV": ""}
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"--require-hashes -r {tmp_path}/stacks/{name}.txt" in done.stdout
        assert f"environment {tmp_path}/.venv: new" in done.stdout, "where PATH looks"
        assert "flash-attn" not in done.stdout
    assert default in stack.stack_names() and default != "cpu"


def test_nobody_is_root_in_it_and_no_cache_is_left() -> None:
    last_user = re.findall(r"^USER (.+)$", DOCKERFILE, re.M)[-1]
    assert last_user not in ("root", "0") and not DOCKERFILE.rstrip().endswith(last_user)
    assert "XDG_CACHE_HOME=/tmp/" in DOCKERFILE and "rm -rf /tmp/*" in DOCKERFILE
    assert 'ENTRYPOINT ["fasttune"]' in DOCKERFILE and "PATH=/opt/fasttune/.venv/bin:" in DOCKERFILE
