"""`python -m fasttune.verify`: the real command, and proof that each of its checks can fail."""

import dataclasses
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import goldens
import pytest
from rich.console import Console

from fasttune import stack
from fasttune.hardware import Gpu, Hardware
from fasttune.verify import PIP, Result, facts, main, parity, runner
from fasttune.verify.version_rules import rules

ROOT = Path(__file__).resolve().parents[1]
MACHINE = Hardware("linux", "x86_64", "2.36", "3.12.3", "cpu", 2, 23.5, 70.0)
H100 = dataclasses.replace(MACHINE, gpus=(Gpu("NVIDIA H100", (9, 0), 80.0),), driver="580.65")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fasttune.verify", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---- the real command


def test_quick_names_facts_pins_and_rules_without_torch() -> None:
    code = "import sys; from fasttune.verify.main import main; main(['--quick', '--json'])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    document, torch_imported = done.stdout.splitlines()
    seen = json.loads(document)
    names = {check["name"] for check in seen["checks"]}
    assert {"python", "os", "driver", "gpu", "memory", "disk", "pins"} <= names
    assert {f"rule:{rule.name}" for rule in rules()} <= names
    goldens.contract("verify --json", seen)
    assert torch_imported == "False"


def test_without_rich_the_answer_is_still_given() -> None:
    code = "import sys; sys.modules['rich.console'] = None; from fasttune.verify.main import main; main(['--quick'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "  pins  " in done.stdout


@pytest.mark.nightly  # a minute of both cores; the set-up ends in the same checks
def test_everything_passes_here_and_leaves_nothing(tmp_path: Path) -> None:
    done = command("--json", TMPDIR=str(tmp_path), OMP_NUM_THREADS="1")
    seen = json.loads(done.stdout.splitlines()[-1])
    failed = [check for check in seen["checks"] if check["status"] == "fail"]
    assert not failed
    assert (done.returncode, seen["ok"]) == (0, True)
    status = {check["name"]: check["status"] for check in seen["checks"]}
    executed = ["matmul-bf16", "attention:sdpa-math", "attention:sdpa-math-packed", "attention:sdpa-flash"]
    executed += ["attention:sdpa-flash-packed", "rope-llama31", "import:unsloth", "unsloth-parity", "train-two-steps"]
    executed += ["privacy-statistics", "privacy-network", "privacy-token", "privacy-folder"]
    assert {name: status[name] for name in executed} == dict.fromkeys(executed, "pass")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_it_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "fasttune.verify"]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while len(list(tmp_path.glob("*/report"))) + len(list(tmp_path.glob("*/printed"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.decode().strip().splitlines()[-1] == "fasttune verify: interrupted, nothing is left running"
    assert list(tmp_path.iterdir()) == []
    assert (
        str(tmp_path) not in subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
    )


# ---- child processes that go wrong

BROKEN = """
import os, signal, sys, time
from fasttune.verify import Result

def fine(): yield Result("fine", "pass", "ok")
def crash():
    yield Result("crash-first-half", "pass", "ok")
    os.kill(os.getpid(), signal.SIGSEGV)
def hang(): yield time.sleep(60)
def leave(): os._exit(3)
def symbol(): raise ImportError("x.so: undefined symbol: _ZN3c10") from None
def prints():
    print("x.so: undefined symbol: _ZN3c10", file=sys.stderr)
    yield Result("prints", "pass", "ok")
CHECKS = {f.__name__: f for f in (fine, crash, hang, leave, symbol, prints)}
"""


def test_a_dead_child_is_a_result_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_checks.py").write_text(BROKEN)
    (tmp_path / "tmp").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    names = ("crash", "leave", "symbol", "prints", "hang", "fine")
    job = runner.CheckJob("broken_checks", names, limit_s=3)
    said: list[str] = []
    results = {result.name: result for result in runner.run_jobs((job,), said.append)}
    assert said[-1] == "" and all(re.fullmatch(r"running crash … [1-9]\d* s", text) for text in said[:-1])
    assert len(said) > 2, "each second while something runs: one of them hangs for three"
    assert {name: result.status for name, result in results.items()} == {
        "crash-first-half": "pass",
        "crash": "fail",
        "leave": "fail",
        "symbol": "fail",
        "prints": "fail",
        "hang": "fail",
        "fine": "pass",
    }
    assert "SIGSEGV" in results["crash"].detail
    assert "exit code 3" in results["leave"].detail
    assert "built against another version" in results["symbol"].detail
    assert "built against another version" in results["prints"].detail
    assert "within 3 s" in results["hang"].detail
    assert list((tmp_path / "tmp").iterdir()) == []


def status_of(hardware: Hardware) -> dict[str, str]:
    checks = [facts.operating_system, facts.driver, facts.gpu, facts.memory, facts.disk]
    return {result.name: result.status for result in (check(hardware) for check in checks)}


def test_facts_fail_where_the_machine_cannot_do_it() -> None:
    good = status_of(H100)
    assert (good["os"], good["gpu"], good["driver"], good["memory"], good["disk"]) == ("pass",) * 5
    turing = dataclasses.replace(H100, gpus=(Gpu("Tesla T4", (7, 5), 16.0),))
    assert status_of(turing)["gpu"] == "fail"
    assert status_of(dataclasses.replace(MACHINE, silent_gpu=True))["driver"] == "fail"
    assert status_of(dataclasses.replace(MACHINE, arch="aarch64"))["os"] == "fail"
    assert status_of(dataclasses.replace(MACHINE, glibc="2.17"))["os"] == "fail"
    assert status_of(dataclasses.replace(MACHINE, disk_free_gib=0.5))["disk"] == "fail"
    assert status_of(dataclasses.replace(MACHINE, disk_free_gib=5))["disk"] == "warn"
    assert status_of(dataclasses.replace(MACHINE, memory_gib=4))["memory"] == "warn"
    assert status_of(dataclasses.replace(MACHINE, memory_gib=5.5))["memory"] == "pass"


def test_a_gpu_that_is_hidden_or_held_back_is_said() -> None:
    hidden = dataclasses.replace(H100, gpus=())
    assert facts.driver(hidden).status == "pass" and facts.gpu(hidden).status == "skip"
    assert "CUDA_VISIBLE_DEVICES hides it: everything runs on the CPU" in facts.gpu(hidden).detail
    capped = dataclasses.replace(H100.gpus[0], power_limit_w=500.0, default_power_limit_w=700.0)
    said = facts.gpu(dataclasses.replace(H100, gpus=(capped,)))
    assert said.status == "pass" and "power cap 500 W of 700 W" in said.detail


def test_a_wrong_or_missing_package_fails_with_the_command_that_pins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = stack.read_pins("cpu")
    assert facts.pins("cpu", dict(pinned)).status == "pass"
    seen = facts.pins("cpu", {**pinned, "transformers": "4.41.0"} | {"numpy": "1.26.4"})
    assert seen.status == "fail"
    assert f"transformers 4.41.0 (pinned {pinned['transformers']})" in seen.detail
    assert f"{sys.executable} -m pip install --no-deps" in seen.fix
    assert f"transformers=={pinned['transformers']}" in seen.fix
    assert f"numpy=={pinned['numpy']}" in seen.fix
    del pinned["peft"]
    missing = facts.pins("cpu", pinned)
    assert "peft missing" in missing.detail and "--force-reinstall" in missing.fix, "pip may take it for installed"
    torch_fix = facts.pins("cpu", {**stack.read_pins("cpu"), "torch": "2.12.0+cpu"}).fix
    assert "https://download.pytorch.org/whl/cpu" in torch_fix


def test_an_unexplained_failure_points_at_the_pins_and_pip_comes_after_what_it_cannot_fix() -> None:
    def fixes(site_packages: str) -> list[str]:
        results = [
            Result("site-packages", "fail" if site_packages else "pass", "", site_packages),
            Result("pins", "fail", "", f"{PIP} install pins"),
            Result("no cause known", "fail", ""),
            Result("own fix", "fail", "", "reboot"),
        ]
        main.complete_fixes(results)
        return [result.fix for result in results[1:]]

    assert fixes("") == [f"{PIP} install pins", f"{PIP} install pins", "reboot"]
    assert fixes("unset PYTHONPATH") == ["unset PYTHONPATH", "unset PYTHONPATH", "reboot"]


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_and_a_fix_is_one_line_after_all_else(width: int) -> None:
    fix = "python -m pip install " + "package==1.0 " * 20
    results = [Result("pins", "fail", "bad " * 60, fix), Result("gpu", "skip", "none"), Result("rule:a", "pass", "why")]
    out = io.StringIO()
    main.show_table(results, "cpu", Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert f"  {fix.strip()}" in [line.rstrip() for line in lines]
    assert all(len(line) <= width for line in lines if fix.strip() not in line)
    order = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert order.index("skip") < order.index("pass") < order.index("fail")


# ---- arithmetic checks can fail


@pytest.fixture(scope="module")
def attention() -> Any:
    pytest.importorskip("torch")
    from fasttune.verify import attention

    return attention


def test_right_attention_passes(attention: Any) -> None:
    for lengths in (None, attention.PACKED):
        assert attention.measure(attention.reference, lengths).ok


@pytest.mark.parametrize("fault", ["full", "layout", "heads", "shifted", "scale", "leak", "one value"])
def test_wrong_attention_is_caught(attention: Any, fault: str) -> None:
    import torch
    import torch.nn.functional as F

    def wrong(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        group = q.shape[2] // k.shape[2]
        if fault == "leak":  # sequences of a packed row see each other
            return attention.reference(q, k, v, None)
        if fault == "scale":
            return attention.reference(q * 1.001, k, v, lengths)
        if fault == "one value":
            out = attention.reference(q, k, v, lengths)
            bump = torch.zeros_like(out)
            bump[0, -1, -1, -1] = 0.05 * float(out.detach().abs().max())
            return out + bump
        if fault == "layout":  # (B, T, H, D) given where (B, H, T, D) is wanted
            keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        if fault == "heads":  # key/value heads tiled 0 1 0 1 instead of 0 0 1 1
            return attention.reference(q, k.repeat(1, 1, group, 1), v.repeat(1, 1, group, 1), lengths)
        tokens = q.shape[1]
        mask = torch.ones(tokens, tokens, device=q.device).tril(1 if fault == "shifted" else tokens).bool()
        q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    assert not attention.measure(wrong, attention.PACKED if fault == "leak" else None).ok


def test_another_kernel_than_the_one_asked_for_fails(attention: Any) -> None:
    name = "attention:sdpa-math"
    results = list(attention.check_backend(name, attention.BACKENDS[name][0], "flash_attention"))
    assert [result.status for result in results] == ["fail", "fail"]
    assert "asked for flash_attention" in results[0].detail


def test_flash_attention_3_is_known_by_the_name_of_its_operator(attention: Any) -> None:
    names = ["flash_attn_3::fwd", "flash_attn_3::bwd", "aten::_flash_attention_forward", "aten::mm"]
    assert attention.attention_kernels(names) == ["_flash_attention_forward", "flash_attn_3::fwd"]


@pytest.mark.parametrize(
    ("name", "fix"),
    [("flash-attn", "uninstall -y flash-attn && bash scripts/setup_h100.sh --flash-attn auto"),
     ("flash-attn-3", "uninstall -y flash-attn-3")],
)  # fmt: skip
def test_a_wrong_flash_attn_is_not_fixed_by_the_pins_which_have_none(attention: Any, name: str, fix: str) -> None:
    seen = next(attention.check_backend(f"attention:{name}", attention.reference, "a kernel that does not run"))
    assert (seen.status, seen.fix) == ("fail", f"{sys.executable} -m pip {fix}")


def test_matmul_and_rope_can_fail(unsloth: None, attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert attention.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) > 1e9
    assert attention.relative_error(torch.tensor([1.0, 1.1]), torch.ones(2)) == pytest.approx(0.1)
    right = torch.Tensor.__matmul__

    def worse(a: Any, b: Any) -> Any:
        return right(a, b) * (1.01 if a.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", worse)
    assert [result.status for result in attention.matmul()] == ["fail"]

    def unscaled(head_dim: int) -> list[float]:
        return [5e5 ** (-i / head_dim) for i in range(0, head_dim, 2)]

    monkeypatch.setattr(attention, "llama31_frequencies", unscaled)
    assert [result.status for result in attention.rope()] == ["fail"]


def test_parity_can_fail() -> None:
    torch = pytest.importorskip("torch")
    right = {
        "loss": torch.ones(1),
        "logits": torch.randn(4, 4),
        "adapter.a": torch.ones(2),
        "gradient.a": torch.randn(8),
    }
    assert parity.judge_parity(parity.compare(right, right), None, 0, 2).status == "pass"
    for key in ("loss", "logits", "gradient.a"):
        wrong = right | {key: right[key] * 1.001}
        assert parity.judge_parity(parity.compare(wrong, right), None, 0, 2).status == "fail"
    with pytest.raises(KeyError):
        parity.compare({key: right[key] for key in ("loss", "logits")}, right)
    rounding = dict.fromkeys(("loss", "logits", "gradient"), 0.01)
    assert parity.judge_parity(rounding, rounding, 2, 2).status == "pass"
    assert (
        parity.judge_parity(rounding, rounding, 0, 2).status == "fail"
    )  # on a GPU Unsloth must have patched every layer
    assert parity.judge_parity({**rounding, "gradient": 0.03}, rounding, 2, 2).status == "fail"


# Unsloth's own functions, read from its source (its GPU side imports on a GPU only) and run under the guard.
STATISTICS = """
import ast, functools, os, pathlib, psutil, socket, sys, types
source = pathlib.Path(sys.argv[1]).read_text()
wanted = ("has_internet", "_statistics_environment", "_download_statistics", "get_statistics")
tree = ast.parse(source)
tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
gpu = types.SimpleNamespace(total_memory=80 * 2**30)
torch = types.SimpleNamespace(cuda=types.SimpleNamespace(get_device_properties=lambda index: gpu))
names = dict(functools=functools, os=os, psutil=psutil, socket=socket, torch=torch, DEVICE_TYPE="cuda", DEVICE_COUNT=1)
exec(compile(tree, sys.argv[1], "exec"), names)
child = sys.modules["unsloth_zoo.rl_environments"] = types.ModuleType("unsloth_zoo.rl_environments")
child.execute_with_time_limit = None
from fasttune.verify import parity, smoke_train
smoke_train.block_network(parity.connections)
parity.imported.append("it is there")
for allowed in (False, True):
    os.environ.pop("UNSLOTH_DISABLE_STATISTICS", None) if allowed else os.environ.update(UNSLOTH_DISABLE_STATISTICS="1")
    names["get_statistics"]()
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    print(*((result.status, result.detail) for result in parity.statistics()))
"""


def test_statistics_that_unsloth_would_send_are_seen() -> None:
    spec = importlib.util.find_spec("unsloth")
    if spec is None or spec.origin is None:
        pytest.skip("unsloth is not installed")
    file = Path(spec.origin).parent / "models/_utils.py"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    arguments = [sys.executable, "-c", STATISTICS, str(file)]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    switched_off, allowed = done.stdout.splitlines()
    assert "pass" in switched_off and "no connection tried" in switched_off
    assert "fail" in allowed and "connections tried: 8.8.8.8" in allowed


def test_statistics_fail_where_the_switch_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "imported", ["2026.1"])
    monkeypatch.setattr(parity, "connections", [])
    monkeypatch.delenv("UNSLOTH_DISABLE_STATISTICS", raising=False)
    assert [result.status for result in parity.statistics()] == ["fail"]
