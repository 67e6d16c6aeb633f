"""Commands with secrets in their environment, every attempt to reach a network refused and written down."""

import os
from pathlib import Path

CANARY = "hf_canary0123456789abcdefghijklmnop"
SECRETS = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), CANARY)
# Loaded by every Python that a command starts: refuses all sockets but local ones, and writes down who was asked for.
GUARD = """
import os, socket, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if arguments[0].family == socket.AF_UNIX:
            return
        asked = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        asked = arguments[0]
    else:
        return
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{event} {asked}\\n")
    raise OSError(f"no network in this test: {asked}")
sys.addaudithook(hook)
"""


def environment(folder: Path) -> tuple[dict[str, str], Path]:
    """What to add to a command's environment, and the file that then holds each attempt to reach a network."""
    (folder / "sitecustomize.py").write_text(GUARD)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "ATTEMPTS": str(folder / "attempts")}, folder / "attempts"


def leaks(texts: dict[str, bytes]) -> list[str]:
    return [where for where, text in texts.items() if CANARY.encode() in text]


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
