"""Secrets stay in the environment, nothing is sent, a hub that does not answer is one line, no input runs code."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import guarded
import pytest
import yaml
from guarded import SECRETS, leaks, written

from fasttune import cli, config
from fasttune.core import checkpoint, pretrained, remedies, resume
from fasttune.data import sources
from fasttune.errors import ConfigError, DataError, ModelError
from fasttune.settings import ModelConfig

TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "builtin:tiny", "max_length": 256},
    "data": {"train": "builtin:arithmetic", "max_rows": 16},
    "train": {"batch_rows": 8, "max_steps": 2},
    "checkpoint": {"every": "1 steps"},
}
ENDINGS: dict[str, tuple[list[str], int]] = {
    "failed": (["train.max_grad_norm=1e30", "train.max_bad_steps=0"], 1),
    "no such model": (["model.name=nobody/nothing"], 2),
    "no such data": (["data.train=nobody/nothing"], 2),
    "with a traceback": (["--debug", "model.name=nobody/nothing"], 1),
}
# Every ending of `fasttune train` in a process of its own, forked from one that has made the imports: they are slow.
SEVERAL = """
import gc, json, os, sys
import matplotlib.figure, fasttune.core.resume, fasttune.core.trainer, fasttune.tools.card, fasttune.tools.estimate
from fasttune import cli
from fasttune.core import trainer
gc.freeze()
build = trainer.build
def diverging(*arguments, **more):
    built = build(*arguments, **more)
    built.args.learning_rate = 1e30  # which no config may ask for
    return built
for folder, arguments in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        os.chdir(folder)
        trainer.build = diverging if folder == "failed" else build
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.exit(cli.main(["train", "../run.yaml", "output_dir=out", *arguments]))
    with open(f"{folder}/code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.fixture
def guard(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    return guarded.environment(tmp_path_factory.mktemp("guard"))


def test_tokens_appear_nowhere_and_nothing_is_asked_for_offline(
    tmp_path: Path, guard: tuple[dict[str, str], Path]
) -> None:
    environment, attempts = guard
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TREE))
    for ending in ENDINGS:
        (tmp_path / ending).mkdir()
    arguments = json.dumps({ending: ["--json", *settings] for ending, (settings, _) in ENDINGS.items()})
    offline = os.environ | SECRETS | environment | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SEVERAL, arguments]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=offline, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert not attempts.exists(), attempts.read_text()
    assert not leaks(written(tmp_path) | {"stdout": done.stdout, "stderr": done.stderr})
    for ending, (_, code) in ENDINGS.items():
        files = written(tmp_path / ending)
        errors = files["stderr"].decode()
        assert int(files["code"]) == code, (ending, errors)
        assert ("out/library.log" in files) == ("out/run.json" in files) == (ending == "failed")
        assert ("Traceback" in errors) == (ending == "with a traceback")
        if code == 2:
            line = errors.splitlines()[-1]
            assert line.startswith("fasttune: ") and "nobody/nothing" in line and "HF_HUB_OFFLINE is set" in line
            assert not (tmp_path / ending / "out").exists()


def test_the_guard_sees_an_attempt(guard: tuple[dict[str, str], Path]) -> None:
    environment, attempts = guard
    code = "import urllib.request; urllib.request.urlopen('https://huggingface.co')"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, env=os.environ | environment, check=False).returncode == 1
    assert "huggingface.co" in attempts.read_text()


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Its own library asks it again while it is busy; what that logs is nobody's to read."""
    import datasets
    import huggingface_hub

    def load_dataset(name: str, *_: object, **__: object) -> object:
        huggingface_hub.utils.logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError(f"Couldn't reach {name}\n(ReadTimeout)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    with pytest.raises(DataError, match="owner/name cannot be loaded.*Couldn't reach.*try again later") as caught:
        list(sources.read("owner/name", "train"))
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_a_model_that_the_hub_does_not_give_in_time_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    error = remedies.explain("owner/name", TimeoutError("The read operation timed out"))
    assert "the hub cannot be reached" in str(error) and "try again later" in str(error)


def test_a_gated_model_says_where_and_the_two_commands() -> None:
    name = "meta-llama/Llama-3.1-8B-Instruct"
    error = str(remedies.explain(name, OSError("401 Client Error: gated repo")))
    assert f"https://huggingface.co/{name}" in error and "\n" not in error
    assert "`hf auth login`" in error and f"`hf download {name} config.json`" in error
    folder = "/data/run-403/model"  # whose number is no answer of the hub
    assert "gated" not in str(remedies.explain(folder, ValueError(f"{folder}: trust_remote_code is needed")))


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of 79.19 GiB of which 403.19 MiB is "
    "free. Process 401 has 78.79 GiB memory in use. Of the allocated memory 404.00 MiB is connected."
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (OUT_OF_MEMORY, "does not fit into the memory that is free"),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4030 bytes", "does not fit"),
        ("403 Forbidden: Please enable access to public gated repositories.\nCannot access content at: x", "is gated"),
        ("401 Client Error. (Request ID: 1)\n\nCannot access gated repo for url https://x/resolve/y", "is gated"),
        ("401 Client Error: Unauthorized for url: https://huggingface.co/x", "is gated"),
        ("You are trying to access a gated repo.\nMake sure to have access to it at x.", "is gated"),
        (
            "401 Client Error. (Request ID: 1)\n\nRepository Not Found for url: https://huggingface.co/api/models/x.\n"
            "If you are trying to access a private or gated repo, make sure you are authenticated",
            "check the spelling",
        ),
        ("404 Client Error: Not Found for url: https://huggingface.co/x/resolve/main/y", "check the spelling"),
        ("Unrecognized model in models/connect-4. Should have a `model_type` key", "check the spelling"),
        ("We couldn't connect to 'https://huggingface.co' to load the files", "the hub cannot be reached"),
        ("Cannot reach https://huggingface.co/x: offline mode is enabled.", "the hub cannot be reached"),
        ("x is of an unknown kind: 401 layers, 403 heads, disconnected", "cannot be loaded: x is of an unknown kind"),
    ],
)
def test_what_a_load_says_is_read_as_it_is_meant(monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    line = str(remedies.explain("owner/name", RuntimeError(text)))
    assert told in line and "\n" not in line


@pytest.fixture
def tiny_folder(unsloth: None, tmp_path: Path) -> Path:
    """A copy of builtin:tiny, to be spoiled."""
    return Path(shutil.copytree(pretrained.builtin("builtin:tiny"), tmp_path / "tiny"))


@pytest.mark.parametrize("kind", ["architecture", "tokenizer"])
def test_code_of_a_model_is_not_run_unless_asked_for(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    assert ModelConfig(name="x").trust_remote_code is False
    (tiny_folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    file = tiny_folder / ("config.json" if kind == "architecture" else "tokenizer_config.json")
    ours: dict[str, Any] = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    if kind == "tokenizer":
        ours = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | ours))
    read = pretrained.read_architecture if kind == "architecture" else pretrained.read_tokenizer
    with pytest.raises(
        ModelError, match="comes with code of its own.*read that code, then add model.trust_remote_code=true to"
    ):
        read(ModelConfig(name=str(tiny_folder)))
    assert not (tmp_path / "ran").exists()


def test_no_file_switches_code_on_but_the_command_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(TREE | {"model": {"name": "builtin:tiny", "trust_remote_code": True}}))
    for command in ("train", "plan", "data", "bench"):
        assert cli.main([command, str(file)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.trust_remote_code is not taken from a file" in line
        assert "add model.trust_remote_code=true to the command" in line
    for said in (True, False):
        asked = config.load(file, [f"model.trust_remote_code={said}"])
        assert asked.model.trust_remote_code is said
    file.write_text(config.dump(config.load(file, ["model.trust_remote_code=true"])))
    assert config.load(file, ours=True).model.trust_remote_code, "what a command tells its own processes"


def test_a_run_does_not_switch_on_the_code_that_it_brings(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fasttune.tools import trained_model

    run, ran = tmp_path / "run", tmp_path / "ran"
    run.mkdir()
    brought = tiny_folder.rename(run / "model")
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Evil(LlamaConfig): ...\n"
    (brought / "evil.py").write_text(code)  # of its own: transformers marks what it loads for the whole process
    said = json.loads((brought / "config.json").read_text())
    said |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (brought / "config.json").write_text(json.dumps(said))
    tree = TREE | {"model": {"name": "x", "trust_remote_code": True}, "train": {"method": "full"}}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    out = str(tmp_path / "out")
    for command in (["generate", "--prompt", "x"], ["merge", "--dtype", "bf16", "--out", out]):
        for name in (run, brought):
            assert cli.main([command[0], str(name), *command[1:]]) == 2
            assert "(eval, generate, merge: --trust-remote-code)" in capsys.readouterr().err.splitlines()[-1]
    assert not ran.exists() and not Path(out).exists()
    assert cli.main(["eval", str(run), "--limit", "1", "--out", out]) == 2 and not ran.exists()
    pretrained.read_architecture(trained_model.open_run(str(run), trust_remote_code=True).base)
    assert ran.exists()


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_weights_as_a_pickle_are_refused_unread(tiny_folder: Path, tmp_path: Path) -> None:
    from fasttune.core import model

    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Touch(tmp_path / "ran")}))
    with pytest.raises(ModelError, match=r"a pickle \(pytorch_model\.bin\).*convert them to safetensors") as caught:
        pretrained.locate(ModelConfig(name=str(tiny_folder)))
    assert "\n" not in str(caught.value)
    with pytest.MonkeyPatch.context() as patch:  # as a hub's model: nobody looks into its folder before it is loaded
        patch.setattr(pretrained, "locate", lambda config: config.name)
        with pytest.raises(ModelError, match="has its weights as a pickle"):
            model.load(ModelConfig(name=str(tiny_folder), max_length=64), "float32", "none", False, 0)
    assert not (tmp_path / "ran").exists()
    (tiny_folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(model\.safetensors\)"):
        model.load(ModelConfig(name=str(tiny_folder), max_length=64), "float32", "none", False, 0)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("model: !!python/object/apply:os.system ['touch ran']", [], "the tag !!python"),
        (
            "model: {name: builtin:tiny}\ndata: {train: x}",
            ["name=!!python/object/apply:os.system ['touch ran']"],
            "name",
        ),
        ("model: {name: builtin:tiny}\ndata: {train: x}", ["name=../../x"], "name"),
        ("model: {name: builtin:tiny}\ndata: {train: x}", ["name=a/b"], "name"),
        ("name: /etc/x\nmodel: {name: builtin:tiny}\ndata: {train: x}", [], "name"),
    ],
)
def test_a_config_runs_no_code_and_names_no_folder_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, overrides: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        config.load("run.yaml", overrides)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_command_in_a_setting_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: {name: builtin:tiny}\ndata: {train: x}")
    for value in ("$(touch ran)", "`touch ran`", "x; touch ran", "${HOME}"):
        read = config.load("run.yaml", [f"model.name={value}", f"data.train={value}"])
        assert (read.model.name, read.data.train) == (value, value)
        with pytest.raises(DataError, match="no file"):
            sources.check_source(value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_name_that_steers_a_terminal_is_one_plain_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: {name: builtin:tiny}\ndata: {train: x}")
    assert cli.main(["train", "run.yaml", "data.train=./a\x1b[2J\nb.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "./a [2J b.jsonl" in line and "\x1b" not in line


@pytest.mark.parametrize("kind", ["parent", "absolute", "dots", "link"])
def test_a_checkpoint_names_no_file_outside_of_it(tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    folder = checkpoint.save(tmp_path / "run", 2, {}, {"step": 2})
    assert resume.broken(folder) is None
    name = {"parent": "../../../secret", "absolute": str(secret), "dots": "..", "link": "linked"}[kind]
    if kind == "link":
        (folder / name).symlink_to(secret)
    files = json.loads((folder / checkpoint.MANIFEST).read_text())
    files[name] = {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(files))
    assert resume.broken(folder) and resume.newest(tmp_path / "run")[0] is None
    checkpoint.prune(tmp_path / "run", 0)
    assert secret.read_text() == "mine"
