"""`fasttune merge`: compared before it appears, a card of what was measured, uploaded only when asked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import goldens
import pytest

from fasttune import cli
from fasttune.errors import FasttuneError, RunFailed
from fasttune.tools import generate, merge, merge_check, merged_weights, trained_model

pytestmark = pytest.mark.usefixtures("unsloth")

PROMPTS = [f"What is {7 * i % 31} {'+-*'[i % 3]} {5 * i % 23 + 1}? " + "Think. " * (i % 4) for i in range(20)]


@pytest.fixture(scope="module")
def out(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged by the real command, its check in a process of its own."""
    folder = tmp_path_factory.mktemp("merge") / "merged"
    assert cli.main(["merge", str(finished_run), "--out", str(folder)]) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}
    return folder


def test_a_merged_model_says_the_same_as_base_and_adapter(out: Path, finished_run: Path) -> None:
    assert "## Merge" in (out / "README.md").read_text()
    found = []
    for name in (str(finished_run), str(out), "builtin:tiny"):
        speaker = generate.load(trained_model.open_run(name), "float32", generate.Sampling(max_new_tokens=16), print)
        prompts = [speaker.prompt([{"role": "user", "content": text}]) for text in PROMPTS]
        found.append([answer.text for answer in speaker.batch(prompts)])
    assert found[0] == found[1]
    assert all(one != base for one, base in zip(found[0], found[2], strict=True)) and len(set(found[0])) > 10


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check in this process: a new one takes seconds to import torch."""

    def compare(made: Path, finished: Any) -> merge_check.Comparison:
        from fasttune.core import pretrained

        return merge_check.compare(
            str(made), str(pretrained.builtin("builtin:tiny")), None, str(finished.adapter), trust_remote_code=False
        )

    monkeypatch.setattr(merge, "compare", compare)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_merge_is_found(
    finished_run: Path, tmp_path: Path, here: None, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = merged_weights._read
    doubled = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    wrong = lambda adapter, name: real(adapter, name) * (30 if name == doubled else 1)  # noqa: E731
    monkeypatch.setattr(merged_weights, "_read", wrong)
    assert cli.main(["merge", str(finished_run), "--out", str(tmp_path / "m"), "--dtype", dtype, "--json"]) == 1
    said = capsys.readouterr()
    goldens.contract("merge --json", json.loads(said.out))
    assert json.loads(said.out)["verified"] is False and "does not answer as base + adapter does" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["m.unverified"]
    (tmp_path / "m.unverified" / "mine").touch()
    assert cli.main(["merge", str(finished_run), "--out", str(tmp_path / "m"), "--dtype", dtype]) == 2
    assert "m.unverified exists" in capsys.readouterr().err and (tmp_path / "m.unverified" / "mine").exists()


def test_what_cannot_be_compared_or_written(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import safetensors.torch

    def killed(*_: Any) -> None:
        raise RunFailed("could not be compared")

    monkeypatch.setattr(merge, "compare", killed)
    arguments = ["merge", str(finished_run), "--out", str(tmp_path / "m"), "--overwrite"]
    for _ in range(2):  # the second replaces the first, as asked for
        assert cli.main(arguments) == 1
        assert "it is kept as " in capsys.readouterr().err.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == ["m.unverified"]
        assert (tmp_path / "m.unverified" / "model.safetensors").is_file()

    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert cli.main(arguments) == 2
    assert "m was not written (SafetensorError: I/O error: No space" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.unverified"]


def test_a_model_larger_than_the_gpu_is_compared_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, where in [(1200, ("cpu", "float32")), (2500, ("cuda", "bfloat16")), (2700, ("cuda", "float32"))]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        assert merge_check._where(str(tmp_path), "bfloat16") == where


def test_an_interrupted_merge_leaves_nothing(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "compare", interrupted)
    assert cli.main(["merge", str(finished_run), "--out", str(tmp_path / "m")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_when_asked_and_only_a_model(
    finished_run: Path, tmp_path: Path, here: None, capsys: Any
) -> None:
    def merge(*more: str) -> tuple[int, str]:
        code = cli.main(["merge", str(finished_run), "--out", str(tmp_path / "m"), *more])
        return code, capsys.readouterr().err

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    assert merge()[0] == 2
    code, told = merge("--overwrite")
    assert code == 2 and "no model folder" in told and told.count("\n") == 1
    (tmp_path / "m" / "config.json").write_text("{}")
    assert merge("--overwrite")[0] == 0
    assert not (tmp_path / "m" / "notes.txt").exists() and (tmp_path / "m" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_no_room_on_the_disk_is_told_first(finished_run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1 << 20))
    assert cli.main(["merge", str(finished_run), "--out", str(tmp_path / "m")]) == 2
    assert "GiB free" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_model_without_adapter_has_nothing_to_merge(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["merge", "builtin:tiny", "--out", str(tmp_path / "m")]) == 2
    assert "nothing to merge" in capsys.readouterr().err


def test_the_hub_is_asked_without_torch() -> None:
    """As the command does it: nothing has imported huggingface_hub's parts before."""
    code = "from fasttune.tools import merge\ntry: merge.check_hub('name')\nexcept Exception as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "--push-to-hub name: write owner/name\n"


def test_the_hub_is_asked_before_the_work_and_only_when_asked_for(
    finished_run: Path, tmp_path: Path, here: None, monkeypatch: Any, capsys: Any
) -> None:
    import httpx
    import huggingface_hub

    with pytest.raises(FasttuneError, match="owner/name"):
        merge.check_hub("name")
    arguments = ["merge", str(finished_run), "--out", str(tmp_path / "m"), "--push-to-hub", "owner/name"]
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert cli.main(arguments) == 2  # tests are offline
    said = capsys.readouterr().err
    assert "--push-to-hub: the hub cannot be reached" in said and "hf_canary" not in said
    assert not (tmp_path / "m").exists()
    calls: list[Any] = []

    class Api:
        def whoami(self) -> None:
            if not calls:
                calls.append("down")
                raise httpx.ConnectError("no route")
            calls.append("whoami")

        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> str:
            calls.append(("create", repo, private))
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, folder_path: str, repo_id: str, commit_message: str) -> None:
            calls.append(("upload", folder_path, repo_id))
            if len(calls) > 4:
                raise httpx.ReadError("503 Server Error")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert cli.main(arguments) == 2 and "cannot be reached" in capsys.readouterr().err
    calls.pop()
    calls.append("up")
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == "https://huggingface.co/owner/name"
    assert calls == ["up", "whoami", ("create", "owner/name", True), ("upload", str(tmp_path / "m"), "owner/name")]
    assert cli.main([*arguments, "--overwrite"]) == 1
    assert "was not uploaded (ReadError: 503" in capsys.readouterr().err and (tmp_path / "m").is_dir()
