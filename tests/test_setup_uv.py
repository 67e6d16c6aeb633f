"""How the set-up gets uv and a Python on bare machines of stand-ins, and what it hands to uv."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "setup_h100.sh"


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert words in done.stderr


def test_a_named_python_that_does_not_fit_is_one_line() -> None:
    done = subprocess.run(["bash", SCRIPT, "--python", "/bin/false"], capture_output=True, text=True, check=False)
    refused(done, "--python /bin/false: is no Python 3.11 to 3.13 (name another, or none: uv brings one)")


UV = """#!/bin/sh
case "$1 $2" in
    "--version ") echo "uv {version} (made up)" ;;
    "python install") echo "$0 $*" >>{calls}; exit {fails} ;;
    "python find") echo {python} ;;
esac
"""
# Ubuntu 22.04's Python: too old for the stacks, with a pip or without
OLD_PYTHON = """#!/bin/sh
case "$*" in
    "-m pip --version") exit {without_pip} ;;
    *"install --quiet --no-deps --require-hashes --target "*) mkdir "$9/bin" && cp {uv} "$9/bin/uv" ;;
    *) exit 1 ;;
esac
"""
INSTALLER = (
    '#!/bin/sh\necho "$*" >>{calls}\necho \'mkdir "$UV_UNMANAGED_INSTALL" && cp {uv} "$UV_UNMANAGED_INSTALL/uv"\'\n'
)


@pytest.mark.parametrize("brought_by", ["PATH", "pip", "curl", "wget", "nothing", "PATH, in vain"])
def test_where_no_python_fits_uv_is_brought_and_brings_one(tmp_path: Path, brought_by: str) -> None:
    """A bare Ubuntu 22.04 of stand-ins; what is shown at the end is the help of scripts/setup_env.py."""
    tools, calls = tmp_path / "tools", tmp_path / "calls"
    tools.mkdir()
    for name in "bash sh dirname sed sort head mkdir mktemp mv rm cp".split():
        (tools / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    values = {"calls": calls, "python": sys.executable, "uv": tmp_path / "uv", "without_pip": int(brought_by != "pip")}
    values |= {"fails": int("vain" in brought_by)}
    scripts = {tmp_path / "uv": UV.format(version="0.13.9", **values), tools / "python3": OLD_PYTHON.format(**values)}
    scripts[tools / "uv"] = UV.format(version="0.13.9" if "PATH" in brought_by else "0.9.9", **values)  # else too old
    if brought_by in ("curl", "wget"):
        scripts[tools / brought_by] = INSTALLER.format(**values)
    for path, text in scripts.items():
        path.write_text(text)
        path.chmod(0o755)
    environment = {"PATH": str(tools), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(argument: str) -> subprocess.CompletedProcess[str]:
        command = [tools / "bash", SCRIPT, argument]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    planned = run("--dry-run")
    assert planned.returncode == 0 and not calls.exists() and not (tmp_path / "cache").exists(), planned.stderr
    assert "python install 3.12" in planned.stdout
    done = run("--help")
    if brought_by == "nothing":
        return refused(done, "pip, curl or wget is needed to bring uv (apt-get install -y curl")
    if "vain" in brought_by:
        return refused(done, "uv cannot bring a Python (see above); install one, e.g. apt-get install python3.12")
    assert done.returncode == 0 and "usage: setup_h100.sh" in done.stdout, done.stderr
    said = calls.read_text().splitlines()
    assert said[-1].endswith("python install 3.12")
    assert ("https://astral.sh/uv/" in said[0]) == (brought_by in ("curl", "wget"))
    left = [path.name for path in (tmp_path / "cache").glob("fasttune/*")]
    assert left == ([] if brought_by == "PATH" else ["uv-0.13.9"])
    return None


def test_pips_settings_are_handed_to_uv_and_those_of_uv_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import shell

    (tmp_path / "pip.conf").write_text(
        "[global]\nextra-index-url = https://a/simple\n  https://b/simple\nno-cache-dir = false\nfind-links = /no\n"
        "trusted-host = a\n[install]\nfind-links = /wheels /more\n"
    )
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
        "PIP_INDEX_URL": "https://c/simple",
        "PIP_NO_INDEX": "0",
    }
    environment |= {"PIP_CERT": "/cert.pem", "PIP_TIMEOUT": "7", "UV_INSECURE_HOST": "mine"}
    settings = shell.uv_settings(environment)
    assert settings == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_DEFAULT_INDEX": "https://c/simple",
        "UV_INDEX": "https://a/simple https://b/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/cert.pem",
        "UV_HTTP_TIMEOUT": "7",
    }


def test_nothing_in_the_current_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("venv", "ensurepip", "json", "pip", "platform"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    command = ["bash", SCRIPT, "--python", sys.executable, "--dry-run", "--stack", "cpu", "--venv", tmp_path / "new"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import shell

    bent = {"PYTHONPATH": "x", "PYTHONSTARTUP": "x", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    for name, value in bent.items():
        monkeypatch.setenv(name, value)
    clean = shell.Shell(Path(sys.executable), tmp_path / "log", dry_run=True).environment
    assert clean["PYTHONSAFEPATH"] == "1" and clean.keys() & bent.keys() == {"PYTHONUNBUFFERED"}
