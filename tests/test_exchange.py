"""`fasttune verify --gpus N`: the processes really exchange, and what keeps them from it is explained."""

import sys

import pytest

from fasttune.verify import exchange

LATE = """
import time
import torch.distributed as dist
tell = dist.TCPStore.set
def late(store, key, value):
    tell(store, key, value)
    time.sleep(1.5 * (key == "done/1"))
dist.TCPStore.set = late
from fasttune.verify import exchange
raise SystemExit(exchange.main())
"""


def test_it_does_not_matter_which_process_ends_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 holds the store by which they meet: the others once found it gone."""
    monkeypatch.setattr(exchange.child_process, "command", lambda module: [sys.executable, "-c", LATE])
    (result,) = exchange.check(2)
    assert (result.name, result.status) == ("exchange:gloo", "pass") and "1 pairs of 2 ranks" in result.detail


def test_processes_that_do_not_reach_each_other_are_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    (result,) = exchange.check(2)
    assert result.status == "fail" and "GLOO_SOCKET_IFNAME=" in result.fix
