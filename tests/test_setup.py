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

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The real set-up with another stack, the package as a wheel, and the verification told instead of run.
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import setup_env
from fasttune import hardware, stack
stack.STACK_DIR = Path({stacks!r})
stack.TORCH = {{"cpu": stack.Build("http://127.0.0.1:9/whl/cpu", {{"torch": "9.0+cpu"}})}}  # nobody answers there
stack.DISK_NEEDED_GIB = {{"cpu": {disk_gib}}}
setup_env.detect = lambda path, hidden_too: hardware.Hardware("linux", "x86_64", "2.35", "3.12", "cpu", 2, 24.0, 64.0)
setup_env.Setup.install_package = lambda self: self.shell.install("fasttune", "fasttune")
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
        (self.stacks / "cpu.txt").write_text(f"# made up\n{pin(alpha)}{beta}")
        (self.stacks / "dev.txt").write_text(pin(tool))
        (self.stacks / "setup.txt").write_text("")
        return self

    def run(
        self, *arguments: str, disk_gib: float = 0, stack_only: bool = False, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """The set-up, told by pip's settings where to look; `stack_only`: torch and the package are taken for done."""
        values = {"scripts": str(ROOT / "scripts"), "stacks": str(self.stacks)}
        code = DRIVER.format(disk_gib=disk_gib, stack_only=stack_only, **values)
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "FASTTUNE_"))}
        environment = keep | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        environment |= {"UV_CACHE_DIR": str(self.folder / "cache")}
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


@pytest.fixture(scope="module", autouse=True)
def uv() -> str:
    """The set-up's uv, brought where it is missing."""
    return subprocess.run(["bash", ROOT / "scripts/uv.sh"], capture_output=True, text=True, check=True).stdout.strip()


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
    assert "did not finish; rebuilt" in said
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


def test_a_drifted_version_is_named_and_repaired_inside_the_environment_only(
    place: Place, tmp_path: Path, uv: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "evil").mkdir()
    leak = f"import sys\nif sys.prefix == {str(place.venv)!r}:\n    raise SystemExit('PYTHONPATH leaked')\n"
    (tmp_path / "evil" / "sitecustomize.py").write_text(leak)
    install = [uv, "pip", "install", "-q", "--no-index", "--no-deps", "--python", place.venv]
    subprocess.run([*install, "--find-links", place.wheels, "alpha==2.0"], check=True)
    bent = {
        "PIP_TARGET": str(elsewhere),
        "PIP_USER": "1",
        "PIP_CONSTRAINT": "/not/there",
        "UV_CONSTRAINT": "/not/there",
    }
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
    assert f"uv=$(bash {ROOT}/scripts/uv.sh)" in done.stdout
    assert f'"$uv" venv --allow-existing --python {sys.executable} {place.venv}' in done.stdout
    files = " ".join(f"-r {place.stacks}/{name}.txt" for name in ("cpu", "setup", "dev"))
    assert f'"$uv" pip install --python {place.venv}/bin/python --no-deps --require-hashes {files}' in done.stdout
    assert "fasttune.verify" in done.stdout or "VERIFY" in done.stdout


def test_a_cuda_build_never_comes_by_accident(place: Place) -> None:
    shutil.rmtree(next(place.venv.glob("lib/python*/site-packages/torch-9.0*.dist-info")))  # torch is to be installed
    (place.wheels / "torch-9.0+cpu-py3-none-any.whl").unlink()
    make_wheel(place.wheels, "torch", "9.0", needs="nvidia-cublas==13.1 ; sys_platform == 'linux'")
    refused(place.run(), "torch==9.0+cpu comes from http://127.0.0.1:9/whl/cpu: make it reachable", code=1)
    assert "torch" not in place.versions()


def test_a_file_that_is_not_the_locked_one_is_refused_in_one_line_that_says_what_to_do(place: Place) -> None:
    shutil.rmtree(next(place.venv.glob("lib/python*/site-packages/alpha-1.0.dist-info")))  # alpha is to be installed
    make_wheel(place.wheels, "alpha", "1.0", {"alpha_made_up.py": "repacked = True\n"})
    done = place.run(stack_only=True)
    refused(done, "alpha==1.0: the SHA-256 of what the index gives is not in the stack file", code=1)
    assert "PIP_INDEX_URL=https://pypi.org/simple" in done.stderr
    assert "alpha" not in place.versions()
    place.marker(state="ok")  # else all is made anew, and torch first
    done = place.run("--no-hashes", stack_only=True)
    assert done.returncode == 0, done.stderr
    assert place.versions()["alpha"] == "1.0"


def test_a_line_without_a_hash_is_not_installed(place: Place) -> None:
    (place.stacks / "dev.txt").write_text("tool==1.0\n")
    refused(place.run("--dev", stack_only=True), "all requirements must have a hash", code=1)
    assert "tool" not in place.versions()


def test_a_failed_step_says_why_and_where_the_log_is(place: Place) -> None:
    with (place.stacks / "cpu.txt").open("a") as file:
        file.write(f"no-such-package==1.0 --hash=sha256:{'c' * 64}\n")
    done = place.run(stack_only=True)
    refused(done, "No solution found when resolving dependencies: Because no-such-package was not found", code=1)
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
