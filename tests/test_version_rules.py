"""The version rules, on made-up machines and versions."""

import pytest

from fasttune import stack
from fasttune.hardware import Gpu, Hardware
from fasttune.verify import PIP, version_rules


def machine(gpu: str | None = None, capability: tuple[int, int] = (9, 0), driver: str | None = None) -> Hardware:
    gpus = (Gpu(gpu, capability, 79.6),) if gpu else ()
    return Hardware("linux", "x86_64", "2.35", "3.12.3", "cpu", 16, 128.0, 64.0, gpus, driver)


H100 = "NVIDIA H100 80GB HBM3"
CPU_MACHINE = machine()
RULES = {rule.name: rule for rule in version_rules.rules()}

# name, what is installed, the machine, and whether the rule speaks up
CASES: list[tuple[str, dict[str, str], Hardware, bool]] = [
    ("llama-3.1-transformers", {"transformers": "4.41.2"}, CPU_MACHINE, True),
    ("llama-3.1-transformers", {"transformers": "4.43.0"}, CPU_MACHINE, False),
    ("numpy-abi", {"numpy": "2.1.0", "torch": "2.2.2"}, CPU_MACHINE, True),
    ("numpy-abi", {"numpy": "2.1.0", "pandas": "2.2.1"}, CPU_MACHINE, True),
    ("numpy-abi", {"numpy": "1.26.4", "torch": "2.2.2"}, CPU_MACHINE, False),
    ("flash-attn-torch", {"flash-attn": "2.8.3+cu12torch2.8cxx11abitrue", "torch": "2.11.0+cu128"}, CPU_MACHINE, True),
    ("flash-attn-torch", {"flash-attn": "2.8.3+cu12torch2.11cxx11abitrue", "torch": "2.11.0+cu130"}, CPU_MACHINE, True),
    ("flash-attn-torch", {"flash-attn": "2.8.3+cu12torch2.8cxx11abifalse", "torch": "2.8.0+cu128"}, CPU_MACHINE, True),
    ("flash-attn-torch", {"flash-attn": "2.8.3+cu12torch2.8cxx11abitrue", "torch": "2.8.0+cu128"}, CPU_MACHINE, False),
    ("torch-cpu-build", {"torch": "2.13.0+cpu"}, machine(H100, driver="580.1"), True),
    ("torch-cpu-build", {"torch": "2.13.0+cpu"}, CPU_MACHINE, False),
    ("torch-cpu-build", {"torch": "2.11.0+cu130"}, machine(H100, driver="580.1"), False),
    ("driver-cuda-13", {"torch": "2.11.0+cu130"}, machine(H100, driver="550.54"), True),
    ("driver-cuda-13", {"torch": "2.11.0+cu128"}, machine(H100, driver="550.54"), False),
    ("driver-cuda-13", {"torch": "2.11.0+cu130"}, machine(H100, driver="580.1"), False),
    ("driver-cuda-13", {"torch": "2.11.0+cu130"}, machine(H100, driver="470.1"), False),  # CUDA 12 would not help
    ("cuda-11-hopper", {"torch": "2.3.1+cu118"}, machine(H100, driver="580.1"), True),
    ("cuda-11-hopper", {"torch": "2.3.1+cu118"}, machine("NVIDIA A100", (8, 0), "580.1"), False),
    ("unsloth-cpu", {"unsloth": "2024.7"}, CPU_MACHINE, True),
    ("unsloth-cpu", {"unsloth": "2026.10.9"}, CPU_MACHINE, False),
]


@pytest.mark.parametrize(("name", "versions", "hardware", "speaks"), CASES)
def test_rule(name: str, versions: dict[str, str], hardware: Hardware, speaks: bool) -> None:
    assert (RULES[name].problem(versions, hardware) is not None) == speaks


# What packages declare, and an installed version that is outside it
DECLARED = [
    ("unsloth-limits", "unsloth", "trl!=0.19.0,<=1.15.0", "trl", "1.16.0", "1.15.0"),
    ("unsloth-limits", "unsloth", "datasets!=4.4.*,<5.0.0", "datasets", "4.4.1", "4.8.5"),
    ("unsloth-limits", "unsloth-zoo", "torch<2.15.0", "torch", "2.15.0+cu130", "2.11.0+cu130"),
    ("torchvision-torch", "torchvision", "torch==2.11.0", "torch", "2.10.0+cu130", "2.11.0+cu130"),
    ("triton-torch", "torch", "triton==3.6.0", "triton", "3.7.1", "3.6.0"),
    ("numpy-abi", "pandas", "numpy>=2.0.2", "numpy", "1.26.4", "2.4.6"),
    ("hugging-face-limits", "transformers", "tokenizers<0.24,>=0.23", "tokenizers", "0.21.0", "0.23.2"),
]


@pytest.mark.parametrize(("name", "package", "line", "other", "bad", "good"), DECLARED)
def test_declared_limits_are_read_from_the_installed_metadata(
    name: str, package: str, line: str, other: str, bad: str, good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version_rules, "requires", lambda asked: [line, 'x ; extra == "y"'] if asked == package else [])
    problem, versions = RULES[name].problem, {package: "3.1.1", other: bad}
    assert f"{package} 3.1.1 needs" in (problem(versions, CPU_MACHINE) or "")
    assert problem(versions | {other: good}, CPU_MACHINE) is None
    assert problem({package: "3.1.1"}, CPU_MACHINE) is None  # left out on purpose


def test_the_fix_of_a_rule_puts_right_what_differs_and_removes_what_the_stack_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = stack.read_pins("cpu") | {"transformers": "4.41.2", "torchvision": "0.25.0"}
    monkeypatch.setattr(stack, "installed", lambda: here)
    fixes = {name: rule.fix("cpu", here) for name, rule in RULES.items()}
    assert fixes["llama-3.1-transformers"] == stack.fix_command(["transformers"], "cpu")
    assert fixes["torchvision-torch"] == f"{PIP} uninstall -y torchvision"
    assert fixes["numpy-abi"] == version_rules.RECREATE  # the stack is right, and this is not of it


def test_every_rule_has_a_source_and_a_test() -> None:
    assert all(rule.source.startswith("https://") for rule in version_rules.rules())
    assert {case[0] for case in CASES} | {case[0] for case in DECLARED} == set(RULES)
