"""The hub of models and data sets: whether it answers, asked once, before its libraries ask it again and again.

    hub.look()                  # by whoever is about to read something of the hub
    if why := hub.away(): …     # for the person: what was tried, and what came of it

A file of a hub that cannot be reached costs its library 23 s of waiting, and a line for each try (huggingface_hub
1.33, utils/_http.py: 1 + 2 + 4 + 8 + 8 s). Here such a hub costs 1 s where the connection is refused, 7 s where nothing
answers; then the libraries are told to be offline, and take what is in their cache.
"""

import os
import sys
import time

ENDPOINT = "https://huggingface.co"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE = ("1", "ON", "YES", "TRUE")  # huggingface_hub/constants.py
AWAY = "FASTTUNE_HUB_AWAY"  # why it is; in the environment, so that the processes of a command know it too
TIMEOUT_S, PAUSE_S = 3.0, 1.0  # of each of two tries, and between them

_answered = False


def quiet() -> None:
    """No line for each try of a library: of every command, before it imports one. What the user has set stays."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")


def look() -> None:
    """Ask the hub for an answer, whatever it is; where none comes, its libraries are offline from now on.

    Not where the user has set HF_HUB_OFFLINE, nor again once it has answered.
    """
    global _answered
    offline = any(os.environ.get(name, "").upper() in TRUE for name in OFFLINE)
    if _answered or (offline and not away()):
        return
    why = _tried() and _tried(PAUSE_S)
    _answered = why is None
    if why is not None:
        os.environ[AWAY] = why
        _be_offline(True)
    elif away():
        del os.environ[AWAY]
        _be_offline(False)


def away() -> str | None:
    """Why the hub cannot be reached, in a few words; None where it can, or where nobody has looked."""
    return os.environ.get(AWAY)


def _tried(after_s: float = 0.0) -> str | None:
    """What went wrong in asking it, with the proxies and certificates that its own library uses."""
    import httpx

    time.sleep(after_s)
    endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
    try:
        httpx.head(endpoint, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())[:80] or type(error).__name__
        return f"{endpoint[:60]}: {said}"
    return None


def _be_offline(now: bool) -> None:
    """For what is imported from now on, and for what has been."""
    os.environ.pop("HF_HUB_OFFLINE", None)
    if now:
        os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if module := sys.modules.get(name):
            module.HF_HUB_OFFLINE = now  # type: ignore[attr-defined]
