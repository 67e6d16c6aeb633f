"""The set-up, on a tiny made-up stack of local wheels: no network, no real package."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fasttune.hardware import Gpu, Hardware

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "setup_h100.sh"

# The real set-up with another stack, the package as a wheel, and the verification told instead of run.
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import setup_env
from fasttune import hardware, stack
stack.STACK_DIR = Path({stacks!r})
stack.CPU_INDEX = "http://127.0.0.1:9/whl/cpu"  # nobody answers there
stack.DISK_NEEDED_GIB = {{"cpu": {disk_gib}}}
setup_env.detect = lambda path, hidden_too: hardware.Hardware("linux", "x86_64", "2.35", "3.12", "cpu", 2, 24.0, 64.0)
setup_env.Setup.install_package = lambda self: self.shell.pip_step("fasttune", "--no-deps", "fasttune")
setup_env.Setup.verify = lambda self, quick: print(f"VERIFY quick={{quick}}") or 0
if {stack_only}:
    setup_env.Setup.install_torch = setup_env.Setup.install_package = lambda self: None
sys.exit(setup_env.main(sys.argv[1:]))
"""


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str] | None = None, needs: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    made = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    requires = f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(made, "w") as wheel:
        for path, text in (files or {f"{name}_made_up.py": f"version = {version!r}\n"}).items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return made


def pin(wheel: Path) -> str:
    """The lines of a stack file for a wheel."""
    name, version, *_ = wheel.name.split("-")
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


class Place:
    """A folder with wheels, stack files and a way to run the set-up on them."""

    def __init__(self, folder: Path):
        self.folder, self.wheels, self.stacks, self.venv = folder, folder / "wheels", folder / "stacks", folder / "venv"

    def fill(self) -> "Place":
        make_wheel(self.wheels, "torch", "9.0+cpu", {"torch/version.py": "__version__ = '9.0+cpu'\n"})
        alpha, tool = make_wheel(self.wheels, "alpha", "1.0"), make_wheel(self.wheels, "tool", "1.0")
        make_wheel(self.wheels, "alpha", "2.0")
        make_wheel(self.wheels, "fasttune", "0.1")
        self.stacks.mkdir()
        beta = f'beta==1.0 ; python_version < "3.0" \\\n    --hash=sha256:{"b" * 64}\n'
        (self.stacks / "cpu.txt").write_text(f"# made up\ntorch==9.0\n{pin(alpha)}{beta}")
        (self.stacks / "dev.txt").write_text(pin(tool))
        return self

    def run(
        self, *arguments: str, disk_gib: float = 0, stack_only: bool = False, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """The set-up; with `stack_only` it takes torch and the package for done, which are three calls of pip."""
        values = {"scripts": str(ROOT / "scripts"), "stacks": str(self.stacks)}
        code = DRIVER.format(disk_gib=disk_gib, stack_only=stack_only, **values)
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "FASTTUNE_"))}
        environment = keep | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        command = [sys.executable, "-c", code, "--venv", str(self.venv), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment | {"no_proxy": "*"} | more, check=False
        )

    def versions(self) -> dict[str, str]:
        code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
        done = subprocess.run([self.venv / "bin/python", "-Ic", code], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def marker(self, **changes: str) -> dict[str, object]:
        """The marker file, written anew where something of it changes."""
        file = self.venv / "fasttune-setup.json"
        made = json.loads(file.read_text()) | changes
        if changes:
            file.write_text(json.dumps(made))
        return made


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in sorted(folder.rglob("*"))}


def refused(done: subprocess.CompletedProcess[str], words: str, code: int = 2) -> None:
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, len(lines)) == (code, 1), done.stderr
    assert words in lines[0]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, str]:
    """A place where a set-up was killed half way and has then run to its end, and what it printed."""
    place = Place(tmp_path_factory.mktemp("ready")).fill()
    (place.venv / "lib").mkdir(parents=True)
    for path, text in {"fasttune-setup.json": "{", "pyvenv.cfg": "", "lib/half-written": ""}.items():
        (place.venv / path).write_text(text)
    done = place.run()
    assert done.returncode == 0, done.stderr
    return place, done.stdout


@pytest.fixture
def place(ready: tuple[Place, str], tmp_path: Path) -> Place:
    """A copy of it, to be broken; packages are links, since pip and Python replace files and never write into them."""

    def copy(source: str, target: str) -> object:
        return os.link(source, target) if "/site-packages/" in source else shutil.copy2(source, target)

    shutil.copytree(ready[0].folder, tmp_path / "copy", symlinks=True, copy_function=copy)
    return Place(tmp_path / "copy")


@pytest.fixture
def bare(tmp_path: Path) -> Place:
    return Place(tmp_path).fill()


def test_a_set_up_that_was_killed_is_done_again_installs_the_stack_and_verifies_it(ready: tuple[Place, str]) -> None:
    place, said = ready
    assert "did not finish; made anew" in said
    assert not (place.venv / "lib/half-written").exists()
    versions = place.versions()
    assert {name: versions[name] for name in ("torch", "alpha", "fasttune")} == {
        "torch": "9.0+cpu",
        "alpha": "1.0",
        "fasttune": "0.1",
    }
    assert not {"tool", "beta"} & set(versions)
    assert place.marker()["state"] == "ok"
    assert "→ stack cpu … ok" in said
    assert "no GPU: not used" in said
    assert said.rstrip().endswith("VERIFY quick=False")


def test_a_good_environment_is_left_as_it_is(place: Place) -> None:
    place.run()  # the copy's bytecode is written here
    before = snapshot(place.folder)
    done = place.run()
    assert done.returncode == 0
    assert snapshot(place.folder) == before
    assert "left as it is" in done.stdout
    assert "flash-attn" not in done.stdout
    assert "VERIFY quick=True" in done.stdout


def test_flash_attn_that_is_asked_for_is_seen_to_in_a_good_environment_too(place: Place) -> None:
    done = place.run("--flash-attn", "build")
    assert done.returncode == 0, done.stderr
    assert "left as it is" in done.stdout
    assert "→ flash-attn … no GPU: not used" in done.stdout
    assert "VERIFY quick=False" in done.stdout
    assert "# flash-attn: auto" in place.run("--flash-attn", "auto", "--dry-run").stdout


def test_a_drifted_version_is_named_and_repaired_inside_the_environment_only(place: Place, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "evil").mkdir()
    leak = f"import sys\nif sys.prefix == {str(place.venv)!r}:\n    raise SystemExit('PYTHONPATH leaked')\n"
    (tmp_path / "evil" / "sitecustomize.py").write_text(leak)
    install = [place.venv / "bin/python", "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*install, "--find-links", place.wheels, "alpha==2.0"], check=True)
    bent = {"PIP_TARGET": str(elsewhere), "PIP_USER": "1", "PIP_CONSTRAINT": "/not/there"}
    done = place.run(stack_only=True, PYTHONPATH=str(tmp_path / "evil"), **bent)
    assert done.returncode == 0, done.stderr
    assert "alpha 2.0 (the stack pins 1.0); repaired" in done.stdout
    assert place.versions()["alpha"] == "1.0"
    assert not elsewhere.exists()
    again = place.run("--dry-run")
    assert "left as it is" in again.stdout


def test_dev_adds_the_tools_and_a_later_run_without_it_keeps_them(place: Place) -> None:
    assert "tools for tests are added" in place.run("--dev", stack_only=True).stdout
    assert place.versions()["tool"] == "1.0"
    assert "left as it is" in place.run().stdout


def test_killed_before_the_environment_had_its_pyvenv_cfg_is_not_refused(bare: Place) -> None:
    bare.venv.mkdir()
    (bare.venv / "fasttune-setup.json").write_text('{"state": "installing"}')
    (bare.venv / "setup.log").write_text("")
    done = bare.run("--dry-run")
    assert done.returncode == 0, done.stderr
    assert "did not finish" in done.stdout


def test_a_changed_stack_file_is_noticed(place: Place) -> None:
    with (place.stacks / "cpu.txt").open("a") as file:
        file.write("tool==1.0\n")
    assert "tool missing (the stack pins 1.0); repaired" in place.run("--dry-run").stdout


@pytest.mark.parametrize("existing", [False, True])
def test_a_dry_run_prints_the_commands_and_changes_nothing(place: Place, existing: bool) -> None:
    if existing:
        (place.venv / "fasttune-setup.json").write_text('{"state": "installing"}')
    else:
        shutil.rmtree(place.venv)
    before, checkout = snapshot(place.folder), snapshot(ROOT / "scripts")
    done = place.run("--dry-run", "--dev")
    assert done.returncode == 0, done.stderr
    assert (snapshot(place.folder), snapshot(ROOT / "scripts")) == (before, checkout)
    assert f"-m venv {place.venv}" in done.stdout
    assert f"--no-deps --require-hashes -r {place.stacks}/cpu.txt" in done.stdout
    assert f"--no-deps --require-hashes -r {place.stacks}/dev.txt" in done.stdout
    assert "fasttune.verify" in done.stdout or "VERIFY" in done.stdout


def test_a_cuda_build_never_comes_by_accident(place: Place) -> None:
    shutil.rmtree(next(place.venv.glob("lib/python*/site-packages/torch-9.0*.dist-info")))  # torch is to be installed
    (place.wheels / "torch-9.0+cpu-py3-none-any.whl").unlink()
    make_wheel(place.wheels, "torch", "9.0", needs="nvidia-cublas==13.1 ; sys_platform == 'linux'")
    refused(place.run(), "would come as a CUDA build")
    assert "torch" not in place.versions()


def test_a_file_that_is_not_the_locked_one_is_refused_in_one_line_that_says_what_to_do(place: Place) -> None:
    shutil.rmtree(next(place.venv.glob("lib/python*/site-packages/alpha-1.0.dist-info")))  # alpha is to be installed
    make_wheel(place.wheels, "alpha", "1.0", {"alpha_made_up.py": "repacked = True\n"})
    done = place.run(stack_only=True)
    refused(done, "alpha==1.0: the SHA-256 of file/…/alpha-1.0-py3-none-any.whl is not in the stack file", code=1)
    assert "PIP_INDEX_URL=https://pypi.org/simple" in done.stderr
    assert "alpha" not in place.versions()
    place.marker(state="ok")  # else all is made anew, and torch first
    done = place.run("--no-hashes", stack_only=True)
    assert done.returncode == 0, done.stderr
    assert place.versions()["alpha"] == "1.0"


def test_a_line_without_a_hash_is_not_installed(place: Place) -> None:
    (place.stacks / "dev.txt").write_text("tool==1.0\n")
    refused(place.run("--dev", stack_only=True), "Hashes are required", code=1)
    assert "tool" not in place.versions()


def test_a_failed_step_says_why_and_where_the_log_is(place: Place) -> None:
    with (place.stacks / "cpu.txt").open("a") as file:
        file.write(f"no-such-package==1.0 --hash=sha256:{'c' * 64}\n")
    done = place.run(stack_only=True)
    refused(done, "No matching distribution found for no-such-package==1.0", code=1)
    assert str(place.venv / "setup.log") in done.stderr
    assert place.marker()["state"] == "installing"


def test_a_folder_that_is_not_ours_is_refused(bare: Place) -> None:
    bare.venv.mkdir()
    (bare.venv / "precious").write_text("data")
    before = snapshot(bare.folder)
    refused(bare.run(), "is no virtual environment")
    refused(bare.run("--recreate"), "is no virtual environment")
    (bare.venv / "pyvenv.cfg").write_text("home = /usr/bin\n")
    refused(bare.run(), "was not made by this script")
    (bare.venv / "pyvenv.cfg").unlink()
    assert set(snapshot(bare.folder)) == set(before)


def test_two_set_ups_at_once_are_refused(bare: Place) -> None:
    bare.venv.mkdir()
    descriptor = os.open(bare.venv, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        refused(bare.run(), "another set-up is at work")
    finally:
        os.close(descriptor)


def test_too_little_disk_is_said_before_anything_is_written(bare: Place) -> None:
    refused(bare.run(disk_gib=1000), "64.0 GiB free, the stack cpu needs 1000 GiB")
    assert not bare.venv.exists()


def test_wrong_options_are_one_line(bare: Place) -> None:
    refused(bare.run("--stack", "cu999"), "choose from")
    refused(bare.run("--flash-attn=maybe"), "--flash-attn")


def test_no_fitting_python_is_one_line() -> None:
    done = subprocess.run(["bash", SCRIPT, "--python", "/bin/false"], capture_output=True, text=True, check=False)
    refused(done, "no Python 3.11 to 3.13 (tried /bin/false); install one")


def test_nothing_in_the_current_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("venv", "ensurepip", "json", "pip", "platform"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    command = ["bash", SCRIPT, "--python", sys.executable, "--dry-run", "--stack", "cpu", "--venv", tmp_path / "new"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and not (tmp_path / "ran").exists(), done.stderr
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import shell

    bent = {"PYTHONPATH": "x", "PYTHONSTARTUP": "x", "PYTHONUNBUFFERED": "1"}
    for name, value in bent.items():
        monkeypatch.setenv(name, value)
    clean = shell.Shell(Path(sys.executable), tmp_path / "log", tmp_path, dry_run=True).environment
    assert clean["PYTHONSAFEPATH"] == "1" and clean.keys() & bent.keys() == {"PYTHONUNBUFFERED"}


FACTS = {"torch": "2.11.0+cu130", "cuda": "13.0", "abi": True, "python": "cp312"}


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import flash_attention

    return flash_attention


@pytest.mark.parametrize("mode", ["auto", "build"])
def test_a_flash_attn_that_does_not_run_is_removed_before_another_is_looked_for(
    flash_attention: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """pip would take it for the one that is wanted, or a wheel that it built once for another torch."""
    there, asked = {"flash-attn"}, []

    class Shell:
        def try_pip(self, verb: str, *arguments: str, **_: str) -> bool:
            asked.append((verb, *arguments))
            there.discard("flash-attn") if verb == "uninstall" else None
            return "flash-attn" in there or arguments == ("--no-deps", "ninja")

    answers = {flash_attention.PROVE: None, flash_attention.DESCRIBE: json.dumps(FACTS)}
    monkeypatch.setattr(flash_attention, "_run", lambda shell, code: answers.get(code, "2.8.3\n" if there else None))
    monkeypatch.setattr(flash_attention, "_from_release", lambda facts, shell: False)
    monkeypatch.setattr(flash_attention.shutil, "which", lambda name, path=None: name)
    machine = Hardware("linux", "x86_64", "2.35", "3.12", "", 2, 24.0, 64.0, (Gpu("NVIDIA H200", (9, 0), 140.0),))
    said = flash_attention.install(mode, machine, Shell())
    assert said.startswith("2.8.3 did not run and was removed; ") and said.endswith(flash_attention.FALLBACK)
    assert asked[0] == ("uninstall", "-y", "flash-attn")
    assert [verb for verb, *_ in asked[1:]] == ["install"] * len(asked[1:]) and len(asked) > 1
    assert ("--no-cache-dir" in asked[-1]) == (mode == "build")


def test_the_flash_attn_wheel_is_named_as_the_project_names_it(flash_attention: Any) -> None:
    urls = flash_attention.wheel_urls(FACTS)
    assert urls[-1] == (
        "https://github.com/Dao-AILab/flash-attention/releases/download/v2.8.3/"
        "flash_attn-2.8.3%2Bcu13torch2.11cxx11abiTRUE-cp312-cp312-linux_x86_64.whl"
    )
