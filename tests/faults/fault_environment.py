"""Builds a case: a virtual environment of stub packages with real metadata, the machine's tools faked on PATH.

Nothing of the tests' own environment is seen from inside but `packaging` (the rules read versions with it), `pip` (it
applies the fixes) and, where a case asks for it, the real packages behind the stubs.
"""

import fnmatch
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fault_cases import REQUIRES, Case

from fasttune import stack
from fasttune.verify import facts, main

ROOT = Path(__file__).resolve().parents[2]
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
# A package that loads and has whatever it is asked for.
STUB = "import sys\n__version__ = {version!r}\ndef __getattr__(name):\n    return sys.modules[__name__]\n"
# `python -m fasttune.verify --json`, the executed checks cut down to one job
ONE_JOB = """
import sys
from fasttune.verify import main as verify
verify.JOBS = tuple(job for job in verify.JOBS if sys.argv[1] in job.names)
sys.exit(verify.main(["--json"]))
"""
NVIDIA_SMI = "#!/bin/sh\n{lines}\n"
BROKEN_SMI = "#!/bin/sh\necho {said!r}\nexit 18\n"
MODULES = {stack.canonical(module): module for module in facts.MODULES}


def build_of(name: str, version: str, stack_name: str) -> str:
    """What torch/version.py says of a pinned torch: the build that its metadata hides."""
    return version if "+" in version or name != "torch" else version + {"cpu": "+cpu"}.get(stack_name, "+cu130")


def code_of(name: str, version: str, stack_name: str) -> dict[str, str]:
    """The files of a healthy stub package: modules for those that verify imports, none for the others."""
    module = MODULES.get(name)
    files = {f"{module}/__init__.py": STUB.format(version=version)} if module else {}
    if name == "torch":
        files["torch/version.py"] = f"__version__ = {build_of(name, version, stack_name)!r}\n"
    return files


def metadata(name: str, version: str, requires: Iterable[str] = ()) -> str:
    lines = [f"Requires-Dist: {line}" for line in requires]
    return "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""])


def shared_libraries(folder: Path) -> Path:
    """A folder with `packaging` and `pip` of this Python and nothing else, not even their metadata."""
    for name in ("packaging", "pip"):
        found = importlib.util.find_spec(name)
        assert found and found.origin
        (folder / name).symlink_to(Path(found.origin).parent)
    return folder


class Environment:
    """One case, built in `folder`, with the libraries and the bytecode that all of them share."""

    def __init__(self, folder: Path, case: Case, shared: Path):
        self.folder, self.case, self.shared, self.tools = folder, case, shared, folder / "tools"
        self.site = folder / "lib" / PYTHON / "site-packages"
        self.python = folder / "bin/python"
        self.pins = stack.read_pins(case.stack)
        self.site.mkdir(parents=True)
        (folder / "bin").mkdir()
        base = Path(sys._base_executable)  # type: ignore[attr-defined]
        self.python.symlink_to(base)
        (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
        marker = {"state": "ok", "stack": case.stack, "python": sys.version.split()[0], "dev": False}
        (folder / stack.MARKER_FILE).write_text(json.dumps(marker))
        (self.site / "shared.pth").write_text(f"{shared}\n" + f"{folder / 'real'}\n" * case.real)
        self.fill()
        self.fake_tools()

    def fill(self) -> None:
        """The pins of the stack as the case changes them, then the files of the case."""
        versions: dict[str, str | None] = dict(self.pins)
        for pattern, version in self.case.versions.items():
            versions |= dict.fromkeys(fnmatch.filter(versions, pattern) or [pattern], version)
        for name, version in versions.items():
            if version is not None:
                code = {} if self.case.real else code_of(name, version, self.case.stack)
                module = MODULES.get(name, name)
                code |= {path: text for path, text in self.case.files.items() if path.startswith(f"{module}/")}
                self.distribution(self.site, name, version, code)
        if self.case.real:
            self.link_real([name for name, version in versions.items() if version is None])
        for path, text in self.case.files.items():
            target = self.site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        for path in self.case.removed_files:
            target = self.site / path.format(**self.pins)
            shutil.rmtree(target) if target.is_dir() else target.unlink()

    def link_real(self, without: list[str]) -> None:
        """The packages of the tests' own environment, to stand behind the stubs."""
        (self.folder / "real").mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if stack.canonical(path.name.split("-")[0]) not in without:
                (self.folder / "real" / path.name).symlink_to(path)

    def distribution(self, place: Path, name: str, version: str, code: Mapping[str, str]) -> None:
        requires = self.case.requires.get(name, REQUIRES.get((name, version), ()))
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        files = {**code, f"{info}/METADATA": metadata(name, version, requires), f"{info}/INSTALLER": "pip\n"}
        files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
        for path, text in files.items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(text)

    def fake_tools(self) -> None:
        """PATH holds nothing but what is here: bash, dirname, gcc for the set-up, nvidia-smi."""
        self.tools.mkdir()
        for name in ("bash", "dirname"):
            (self.tools / name).symlink_to(shutil.which(name) or f"/bin/{name}")
        if self.case.compiler:  # no real one: it is only looked for
            self.script("gcc", "#!/bin/sh\n")
        if self.case.gpus:
            more = ", Disabled, 700.00, 700.00, 700.00"  # what is asked beyond the four: id, MIG, power limits
            lines = [f"echo '{gpu}, GPU-{number}{more}'" for number, gpu in enumerate(self.case.gpus)]
            self.script("nvidia-smi", NVIDIA_SMI.format(lines="\n".join(lines)))
        elif self.case.nvidia_smi:
            self.script("nvidia-smi", BROKEN_SMI.format(said=self.case.nvidia_smi))

    def script(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    # -- what is run in it

    def run(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        unwanted = ("PYTHON", "PIP_", "LD_", "VIRTUAL_ENV", "FASTTUNE_VENV", "CUDA_VISIBLE_DEVICES", "CC")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        environment |= {name: value.format(site=self.site) for name, value in self.case.environ.items()}
        # one place for all bytecode, so that pip is compiled once and not for every case
        environment |= {"PATH": str(self.tools), "PYTHONPYCACHEPREFIX": str(self.shared / "bytecode")} | more
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)

    def verify(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Exit code and results by name of the real command; with an executed check, of its job only."""
        jobs = [job for job in main.JOBS if self.case.check in job.names]
        command = [str(self.python)]
        command += ["-c", ONE_JOB, self.case.check] if jobs else ["-m", "fasttune.verify", "--quick", "--json"]
        compiled = {"PYTHONPYCACHEPREFIX": "", "PYTHONDONTWRITEBYTECODE": "1"}  # the real packages have theirs
        done = self.run(command, **compiled if self.case.real else {})
        if not done.stdout.startswith("{"):
            return done.returncode, {"stderr": {"status": "fail", "detail": done.stderr.strip(), "fix": done.stderr}}
        document = json.loads(done.stdout.splitlines()[-1])
        return done.returncode, {check["name"]: check for check in document["checks"]}

    def setup(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        own = self.case.check == "setup"  # its faults are those of the Python that runs it
        python = str(self.python if own else self.python.resolve())
        script = str(ROOT / "scripts/setup_h100.sh")
        return self.run([str(self.tools / "bash"), script, "--dry-run", "--python", python, *arguments])

    def apply(self, fix: str, wheels: Path) -> str:
        """Run the fix itself; pip finds stub wheels instead of an index. Returns what failed, or nothing."""
        links = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
        done = self.run(["/bin/sh", "-c", fix], PIP_NO_COMPILE="1", PIP_DISABLE_PIP_VERSION_CHECK="1", **links)
        return done.stderr if done.returncode else ""


def make_wheels(folder: Path, wanted: Mapping[str, str], stack_name: str, code: bool) -> None:
    """Stub wheels name → version, as an index would give them."""
    folder.mkdir(exist_ok=True)
    for name, version in wanted.items():
        module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
        files = {f"{module}/__init__.py": STUB.format(version=version)} if code and name not in MODULES else {}
        files |= code_of(name, version, stack_name) if code else {}
        files[f"{info}/METADATA"] = metadata(name, version, REQUIRES.get((name, version), ()))
        files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
            for path, text in {**files, f"{info}/RECORD": ""}.items():
                wheel.writestr(path, text)
