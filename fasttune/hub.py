"""Asking the Hugging Face hub: again while it is busy, not at all when it is switched off."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from fasttune.errors import first_line

PAUSES_S = (2, 5, 15)  # before the hub is asked again
AGAIN = {429, 500, 502, 503, 504}  # HTTP: busy, or a fault of its own

Answer = TypeVar("Answer")


def is_offline() -> bool:
    """https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables"""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def patiently(ask: Callable[[], Answer]) -> Answer:
    """`ask()`, and again after each of PAUSES_S while the hub is too slow or too busy to answer.

    Raises TimeoutError when it still is, and at once whatever else `ask` raises.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return ask()
        except Exception as error:
            if is_offline() or not _is_passing(error):
                raise
            if pause_s is None:
                raise TimeoutError(
                    f"the hub did not answer {len(PAUSES_S) + 1} times in {sum(PAUSES_S)} s ({first_line(error)})"
                ) from error
            print(f"the hub does not answer ({type(error).__name__}): asking again in {pause_s} s")  # into library.log
        time.sleep(pause_s)
    raise AssertionError("the last pause is None")


def _is_passing(error: BaseException | None) -> bool:
    """A time-out or an answer of AGAIN, at any depth: libraries wrap what the hub's library raises."""
    while error is not None:
        if "Timeout" in type(error).__name__ or getattr(getattr(error, "response", None), "status_code", None) in AGAIN:
            return True
        error = error.__cause__ or error.__context__
    return False
