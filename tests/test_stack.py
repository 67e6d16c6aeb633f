"""Stacks and the choice between them, on made-up machines and versions."""

import re
import sys
from pathlib import Path

import pytest

from fasttune import stack
from fasttune.errors import FasttuneError
from fasttune.hardware import Gpu, Hardware


def machine(gpu: str | None = None, capability: tuple[int, int] = (9, 0), driver: str | None = None) -> Hardware:
    gpus = (Gpu(gpu, capability, 79.6),) if gpu else ()
    return Hardware("linux", "x86_64", "2.35", "3.12.3", "cpu", 16, 128.0, 64.0, gpus, driver)


H100 = "NVIDIA H100 80GB HBM3"
CPU_MACHINE = machine()


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        (machine(), "cpu"),
        (machine(H100, driver="580.65.06"), "cu130"),
        (machine("NVIDIA H200", driver="610.10"), "cu130"),
        (machine(H100, driver="579.99"), "cu12"),
        (machine("NVIDIA A100-SXM4-80GB", (8, 0), "525.60.13"), "cu12"),
        (machine("NVIDIA B200", (10, 0), "580.95.05"), "cu130"),
    ],
)
def test_the_machine_chooses_its_stack(hardware: Hardware, name: str) -> None:
    chosen, reason = stack.choose_stack(hardware)
    assert chosen == name
    assert reason


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        (machine(H100, driver="470.223.02"), r"driver 470.* 525 is needed .*https://"),
        (machine(H100, driver="524.99"), r"driver 524.* 525 is needed"),
        (machine("Tesla T4", (7, 5), "580.65"), r"T4: compute capability 7\.5 .*8\.0 is needed .*--stack cpu"),
    ],
)
def test_an_unfit_gpu_is_one_line_with_the_remedy(hardware: Hardware, words: str) -> None:
    with pytest.raises(FasttuneError, match=words) as caught:
        stack.choose_stack(hardware)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_gpu_without_driver_is_said() -> None:
    hardware = Hardware("linux", "x86_64", "2.35", "3.12", "cpu", 2, 24.0, 64.0, silent_gpu=True)
    chosen, reason = stack.choose_stack(hardware)
    assert chosen == "cpu"
    assert "no driver answers" in reason


@pytest.mark.parametrize("python", [(3, 11), (3, 12), (3, 13)])
@pytest.mark.parametrize("name", ["cpu", "cu130", "cu12"])
def test_the_committed_pins_hold_what_the_project_needs(name: str, python: tuple[int, int]) -> None:
    pins = stack.read_pins(name, python)
    for package in ("torch", "triton", "transformers", "trl", "peft", "unsloth", "unsloth-zoo", "setuptools", "wheel"):
        assert package in pins
    assert pins["transformers"] == "5.17.0"
    assert not {"llm", "llama-cpp-python", "diskcache", "xformers"} & set(pins)
    if name == "cpu":
        assert pins["torch"] == "2.13.0+cpu"
        assert not {"torchvision", "bitsandbytes"} & set(pins)
        assert not any(stack.CUDA_WHEEL.match(package) for package in pins)
    else:
        assert pins["numpy"] == ("2.4.6" if python == (3, 11) else "2.5.2")
        assert pins["torch"] == ("2.11.0" if name == "cu130" else "2.11.0+cu128")
        generations = {package.rpartition("-")[2] for package in pins if re.search(r"-cu1\d$", package)}
        assert generations == {"cu13" if name == "cu130" else "cu12"}
        assert pins["cuda-toolkit"] == ("13.0.2" if name == "cu130" else "12.8.1")


@pytest.mark.parametrize("name", ["cpu", "cu130", "cu12", "dev", "setup"])
def test_a_stack_file_says_what_it_is_for_when_and_how_it_was_made(name: str) -> None:
    header = [line for line in (stack.STACK_DIR / f"{name}.txt").read_text().splitlines() if line.startswith("#")]
    assert re.search(rf"^# {name}: \S.*\n# Made \d{{4}}-\d\d-\d\d by stacks/regenerate.py", "\n".join(header))


def test_a_line_that_is_no_pin_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("# header\ntorch==2.0\nnumpy>=1\n")
    with pytest.raises(FasttuneError, match=r"x\.txt: not a pin .*numpy>=1"):
        stack.read_pin_file(file)
    with pytest.raises(FasttuneError, match="cannot read the pins"):
        stack.read_pin_file(tmp_path / "missing.txt")


def test_an_unknown_stack_names_the_known_ones() -> None:
    with pytest.raises(FasttuneError, match="choose one of cpu, cu130, cu12"):
        stack.read_pins("cu999")


def test_compare_accepts_a_build_of_the_pinned_version_and_nothing_else() -> None:
    pins = {"torch": "2.13.0", "numpy": "2.4.6", "trl": "1.15.0"}
    assert stack.compare(pins, {"torch": "2.13.0+cpu", "numpy": "2.4.6", "trl": "1.15.0"}) == []
    wrong = stack.compare(pins, {"torch": "2.13.1", "numpy": "2.4.6"})
    assert [(item.name, item.installed) for item in wrong] == [("torch", "2.13.1"), ("trl", None)]
    assert stack.compare({"torch": "2.11.0+cu128"}, {"torch": "2.11.0+cu130"})


def test_every_pin_carries_hashes_and_torch_of_another_build_than_pypis_is_in_no_file() -> None:
    for name in (*stack.stack_names(), "dev", "setup"):
        text = (stack.STACK_DIR / f"{name}.txt").read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(re.search(r" --hash=sha256:[0-9a-f]{64}$", line) for line in lines)
        assert ("torch" in stack.read_pin_file(stack.STACK_DIR / f"{name}.txt")) == (name == "cu130")
    for name, build in stack.TORCH.items():
        asked = (stack.STACK_DIR / f"{name}.in").read_text()
        assert all(f"{package}=={version.partition('+')[0]}\n" in asked for package, version in build.versions.items())


def test_pins_are_read_with_and_without_hashes_over_several_lines(tmp_path: Path) -> None:
    one, two = "sha256:" + "1" * 64, "sha256:" + "2" * 64
    file = tmp_path / "x.txt"
    file.write_text(
        f'# header\ntorch==2.0\nNumPy==1.0 ; python_version < "3.12" \\\n    --hash={one} \\\n    --hash={two}\n'
        f'numpy==2.0 ; python_version >= "3.12" --hash={one}  # why\n'
    )
    assert stack.read_pin_file(file, (3, 11)) == {"torch": "2.0", "numpy": "1.0"}
    assert stack.read_pin_file(file, (3, 12)) == {"torch": "2.0", "numpy": "2.0"}
    file.write_text(f"a==1 \\\n    --hash={one}\nb==1 \\\n    --hash=md5:abc\n")
    with pytest.raises(FasttuneError, match=r"x\.txt: not a pin .*b==1"):
        stack.read_pin_file(file)


def test_the_fix_uses_this_interpreter_and_the_pins() -> None:
    install = f"{sys.executable} -m pip install --no-deps"
    assert stack.fix_command(["transformers"], "cpu") == f"{install} transformers==5.17.0"
    both = stack.fix_command(["torch", "transformers"], "cpu")
    assert both == f"{install} --extra-index-url {stack.TORCH['cpu'].index} torch==2.13.0+cpu transformers==5.17.0"
    assert stack.fix_command(["torch"], "cu130") == f"{install} torch==2.11.0"
    assert stack.fix_command(["no-such-package"], "cpu") == "bash scripts/setup_h100.sh"


def test_what_belongs_to_torch_is_mended_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = stack.read_pins("cu130")
    cuda = {name for name in pins if stack.CUDA_WHEEL.match(name)}
    present = {name: version for name, version in pins.items() if name not in cuda}
    monkeypatch.setattr(stack, "installed", lambda: present | {"torch": "2.3.1+cu118", "trl": "0.8"})
    fix = stack.repair_command(["torch"], "cu130")
    assert {word.partition("==")[0] for word in fix.split() if "==" in word} == {"torch", *cuda}
    pins = stack.read_pins("cu12")
    cuda = {name for name in pins if stack.CUDA_WHEEL.match(name)}
    for fix in (stack.repair_command(["torch"], "cu12"), stack.fix_command(["torch", "torchvision"], "cu12")):
        assert {word.partition("==")[0] for word in fix.split() if "==" in word} == {"torch", "torchvision", *cuda}
        assert f"--no-deps --extra-index-url {stack.TORCH['cu12'].index} torch==2.11.0+cu128" in fix


def test_what_is_as_pinned_and_does_not_work_is_put_there_anew_once_all_else_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pins = stack.read_pins("cpu")
    pip = f"{sys.executable} -m pip install"
    monkeypatch.setattr(stack, "installed", lambda: pins)
    assert stack.repair_command(["trl"], "cpu") == f"{pip} --force-reinstall --no-deps trl=={pins['trl']}"
    monkeypatch.setattr(stack, "installed", lambda: pins | {"numpy": "1.26.4"})
    assert stack.repair_command(["trl"], "cpu") == f"{pip} --no-deps numpy=={pins['numpy']}"


def test_installed_tells_a_cuda_build_that_its_metadata_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "torch-2.11.0.dist-info"  # PyPI's CUDA wheel: the metadata says 2.11.0
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0+cu130'\n")
    monkeypatch.syspath_prepend(tmp_path)
    versions = stack.installed()
    assert versions["torch"] == "2.11.0+cu130"
    assert versions["pytest"] == pytest.__version__


def test_the_active_stack_is_that_of_the_set_up_else_that_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(stack, "detect", lambda **_: machine(H100, driver="580.1"))
    marker = tmp_path / stack.MARKER_FILE
    assert stack.active_stack() == "cu130"
    for text, name in (('{"stack": "cpu"}', "cpu"), ('{"stack": "cu12"}', "cu12"), ("{", "cu130"), ("[]", "cu130")):
        marker.write_text(text)
        assert stack.active_stack() == name
    marker.unlink()
    monkeypatch.setattr(stack, "detect", lambda **_: machine("Tesla T4", (7, 5), "580.1"))
    assert stack.active_stack() == "cpu"  # no stack fits: verify says why
    monkeypatch.setattr(stack, "detect", lambda **_: machine(H100, driver="470.1"))
    assert stack.active_stack() == "cu130"  # the driver is to be updated, not the GPU given up
