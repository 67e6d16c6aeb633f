"""A hub that does not answer is asked twice and not waited for; no try of a library is anybody's to read."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from fasttune import hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As a user's shell is: nothing has been asked, nothing is said about being offline."""
    import datasets.config
    import huggingface_hub.constants

    for name in (*hub.OFFLINE, hub.AWAY, "HF_ENDPOINT"):
        monkeypatch.setenv(name, "")  # what the test leaves in it is put back
        monkeypatch.delenv(name)
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answered", False)
    monkeypatch.setattr(hub, "PAUSE_S", 0.01)
    yield monkeypatch


@pytest.fixture
def closed() -> Iterator[str]:
    """An address that refuses: its port is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(401)  # an answer all the same
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_what_is_imported_and_what_will_be_is_offline_until_the_hub_answers(
    online: pytest.MonkeyPatch, closed: str, answering: tuple[str, list[str]]
) -> None:
    import datasets.config
    import huggingface_hub

    online.setenv("HF_ENDPOINT", closed)
    hub.look()
    assert closed in (hub.away() or "") and os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    endpoint, asked = answering
    online.setenv("HF_ENDPOINT", endpoint)
    hub.look()  # the network is back, in a notebook
    assert hub.away() is None and "HF_HUB_OFFLINE" not in os.environ
    assert not huggingface_hub.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE
    hub.look()
    assert asked == ["/"], "asked once"


def test_a_user_who_is_offline_is_not_online_for_that(online: pytest.MonkeyPatch, closed: str) -> None:
    online.setenv("HF_ENDPOINT", closed)
    online.setenv("HF_HUB_OFFLINE", "1")
    hub.look()
    assert hub.away() is None


LIBRARIES = """
from fasttune import hub
hub.quiet()
import logging
import huggingface_hub, datasets
for name in ("huggingface_hub.utils._http", "datasets.utils.file_utils"):
    logging.getLogger(name).warning("Retrying in 1s [Retry 1/5].")
    logging.getLogger(name).error("an error of " + name)
"""


def test_no_try_of_a_library_is_printed() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=True)
    assert "Retrying" not in done.stderr + done.stdout and done.stderr.count("an error of") == 2, done.stderr
