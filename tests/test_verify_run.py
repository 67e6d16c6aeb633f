"""What verify says of a finished run, of leaks and of the hub: each check is shown to fail."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy

from fasttune.verify import main, runner, smoke_train

ROOT = Path(__file__).resolve().parents[1]


# ---- what a run wrote


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The traces of a good two-step run, as smoke_train.run leaves them."""
    (tmp_path / "cwd").mkdir()
    adapter = tmp_path / "run/adapter"
    adapter.mkdir(parents=True)
    safetensors.numpy.save_file({"layers.0.lora_A.weight": numpy.ones(2)}, adapter / "adapter_model.safetensors")
    (tmp_path / "run/run.json").write_text(json.dumps({"status": "completed", "backend": {"library": "unsloth"}}))
    (tmp_path / "run/metrics.jsonl").write_text('{"loss": 5.5}\n{"loss": 5.4}\n')
    write_seen(tmp_path)
    return tmp_path


def write_seen(root: Path, **changes: Any) -> None:
    good = {"connections": [], "trainable": ["a"], "changed": ["a"], "parameters": 3}
    (root / "seen.json").write_text(json.dumps(good | changes))


def test_a_good_run_passes(finished: Path) -> None:
    assert smoke_train.judge_training(finished, 0, "").status == "pass"
    assert smoke_train.judge_connections(finished).status == "pass"
    assert smoke_train.judge_token(finished, "hf_secret", "").status == "pass"
    assert smoke_train.judge_current_folder(finished).status == "pass"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"changed": []}, "1 of 1 adapter tensors did not change"),
        ({"changed": ["a", "frozen"]}, "1 frozen tensors changed, frozen first"),
        ({"trainable": [], "changed": []}, "0 of 0 adapter tensors"),
    ],
)
def test_wrong_changes_of_weights_fail(finished: Path, changes: dict[str, Any], complaint: str) -> None:
    write_seen(finished, **changes)
    seen = smoke_train.judge_training(finished, 0, "")
    assert (seen.status, complaint in seen.detail) == ("fail", True)


def test_which_weights_change_is_seen(unsloth: None) -> None:
    import torch
    from transformers import trainer

    seen: dict[str, Any] = {}
    smoke_train.watch_weights(seen)
    watcher: Any = trainer.DEFAULT_CALLBACKS.pop()()
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    watcher.on_train_begin(None, None, None, model=model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    watcher.on_train_end(None, None, None, model=model)
    assert seen == {"trainable": ["weight"], "changed": ["weight"], "parameters": 2}


def test_bad_runs_fail(finished: Path) -> None:
    metrics = finished / "run/metrics.jsonl"
    metrics.write_text('{"loss": 5.5}\n{"loss": NaN}\n')
    assert "not finite" in smoke_train.judge_training(finished, 0, "").detail
    metrics.write_text('{"loss": 5.5}\n')
    assert "after 1 of 2 steps" in smoke_train.judge_training(finished, 0, "").detail
    metrics.unlink()
    assert "incomplete output folder" in smoke_train.judge_training(finished, 0, "").detail
    seen = smoke_train.judge_training(finished, 1, "ImportError: x.so: undefined symbol: abc")
    assert (seen.status, "built against" in seen.detail) == ("fail", True)


def test_an_adapter_that_holds_more_or_is_cut_short_fails(finished: Path) -> None:
    adapter = finished / "run/adapter/adapter_model.safetensors"
    safetensors.numpy.save_file({"lora_A": numpy.ones(2), "embed_tokens": numpy.ones(2)}, adapter)
    assert "does not hold exactly the LoRA weights" in smoke_train.judge_training(finished, 0, "").detail
    adapter.write_bytes(adapter.read_bytes()[:-4])
    assert "incomplete output folder" in smoke_train.judge_training(finished, 0, "").detail


def test_leaks_fail(finished: Path) -> None:
    assert smoke_train.judge_token(finished, "hf_secret", "token hf_secret").status == "fail"
    (finished / "run/config.yaml").write_text("token: hf_secret")
    assert "run/config.yaml" in smoke_train.judge_token(finished, "hf_secret", "").detail
    (finished / "cwd/unsloth_compiled_cache").mkdir()
    assert "unsloth_compiled_cache" in smoke_train.judge_current_folder(finished).detail
    write_seen(finished, connections=["huggingface.co"])
    assert "huggingface.co" in smoke_train.judge_connections(finished).detail


GUARDED = """
import socket, threading, urllib.request
from fasttune.verify.smoke_train import block_network
attempts = []
block_network(attempts)
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
for url in ("http://example.org/", "http://192.0.2.1/"):
    try:
        urllib.request.urlopen(url, timeout=5)
    except OSError as error:
        assert "blocks the network" in str(error), error
print(attempts)
"""


def test_connections_beyond_this_machine_are_blocked_and_recorded() -> None:
    arguments = [sys.executable, "-c", GUARDED]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "['example.org', '192.0.2.1']"


# ---- --online, against a hub of our own


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, int]]]:
    """A hub on this machine; `answers` maps a path to its status (200 for all others)."""
    answers: dict[str, int] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answers.get(self.path, 200))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b'{"name": "someone", "type": "user"}')

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("refused", "status"), [({}, "pass"), ({"/api/whoami-v2": 401}, "fail")])
def test_online_checks_the_token_and_never_prints_it(
    hub: Any, refused: dict[str, int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, answers = hub
    answers |= refused
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
    results = runner.run_jobs(main.ONLINE, lambda text: None)
    seen = {result.name: result for result in results}
    assert seen["online:hub"].status == "pass"
    assert seen["online:token"].status == status, seen["online:token"].detail
    assert "hf_averysecrettoken" not in repr(results)


def test_online_says_that_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nothing listens
    monkeypatch.delenv("HF_TOKEN", raising=False)
    seen = {result.name: result for result in runner.run_jobs(main.ONLINE, lambda text: None)}
    assert seen["online:hub"].status == "fail"
    assert seen["online:token"].status == "warn"
