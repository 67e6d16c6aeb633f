"""Why a run ends before its last step; and what its ranks tell each other of themselves, where each step ends."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fasttune.core.ranks import Ranks
from fasttune.metrics import Stopped

REASONS = list(Stopped)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_S = 5.0  # a scheduler and torchrun both pass a signal on: what comes so soon after the first is the same one


class Stops:
    """asked: what this rank was asked for, by a signal or the clock; agreed: what ends the run, the same on every rank.

    straggler: of the last step, see metrics.StepMetrics. peaks_gib, busy: memory and GPU use of each rank, of several.
    """

    def __init__(self, ranks: Ranks, ends_at: float) -> None:
        self.ranks, self.ends_at = ranks, ends_at  # perf_counter()
        self.asked: Stopped | None = None
        self.agreed: Stopped | None = None
        self.straggler: float | None = None
        self.peaks_gib: list[float] = []
        self.busy: list[float] = []
        self._asked_s = 0.0

    def signal(self, number: int, _frame: Any) -> None:
        """Signal handler: the first one ends the run after this step, a second one at once."""
        now = time.monotonic()
        if self.asked is not None and (self.ranks.alone or now - self._asked_s > ECHO_S):
            raise KeyboardInterrupt
        self._asked_s = now
        self.asked = Stopped.SIGINT if number == signal.SIGINT else Stopped.SIGTERM

    def after_step(self, computing_s: float, peak_gib: float, last: bool) -> bool:
        """Whether the run ends here."""
        if self.asked is None and time.perf_counter() >= self.ends_at and not last:
            self.asked = Stopped.MAX_HOURS
        seen = self.ranks.everyone([self._asked(), computing_s, peak_gib], "between two steps")
        self._agree([each[0] for each in seen])
        if len(seen) > 1:
            seconds, peaks = ([each[at] for each in seen] for at in (1, 2))
            self.straggler = max(seconds) / statistics.mean(seconds)
            self.peaks_gib = list(map(max, self.peaks_gib or peaks, peaks))
        return self.agreed is not None

    def agree(self) -> Stopped | None:
        """What ends the run, if anything: what any rank was asked for ends all of them."""
        self._agree([each[0] for each in self.ranks.everyone([self._asked()], "the end")])
        return self.agreed

    def end_of_steps(self, busy: float | None) -> None:
        """busy: share of the time in which this rank's GPU ran kernels."""
        seen = self.ranks.everyone([math.nan if busy is None else busy], "the end of the steps")
        self.busy = [share for (share,) in seen if math.isfinite(share)]

    def _asked(self) -> float:
        return REASONS.index(self.asked) + 1 if self.asked else 0

    def _agree(self, asked: list[float]) -> None:
        if first := next((int(each) for each in asked if each), 0):
            self.agreed = self.asked = REASONS[first - 1]


def at_once(number: int, _frame: Any) -> None:
    """A signal handler."""
    raise KeyboardInterrupt(number)


@contextmanager
def signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler` meanwhile."""
    old = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
