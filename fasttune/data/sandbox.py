"""A chat template is a program that came with somebody's model: it runs here, bounded in time and memory.

Compiled as transformers compiles it; tests compare the two. Importing that here would cost every worker seconds.
"""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from fasttune.errors import ModelError

MOST_SECONDS = 5.0  # of this thread's own computing, for a conversation; a long one takes milliseconds
MEAN_SECONDS = 0.25  # for each that follows it
LOOK_S = 0.5  # seconds of the process, all threads together
MOST_BYTES = 1 << 30  # beyond what the process has when it begins
MOST_BITS = 2048  # of a whole number: arithmetic on long ones is C code, which no timer ends

_began = 0  # how many conversations; 0 outside of `bounded`


class _TooLong(BaseException):
    """Not an Exception, so that nothing on its way takes it for one of its own."""


@contextmanager
def bounded() -> Iterator[None]:
    """What is inside gets MOST_BYTES and, in the main thread, MOST_SECONDS: else ModelError.

    Inside of itself it begins the next conversation, with MEAN_SECONDS more; the system is asked only once.
    """
    global _began
    _began += 1
    if _began > 1:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MOST_BYTES
    timed = threading.current_thread() is threading.main_thread()
    began = time.thread_time()

    def look(*_: Any) -> None:  # the timer counts all threads, this clock only ours
        if time.thread_time() - began > MOST_SECONDS + MEAN_SECONDS * (_began - 1):
            raise _TooLong

    before = signal.signal(signal.SIGPROF, look) if timed else None
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
        if timed:
            signal.setitimer(signal.ITIMER_PROF, LOOK_S, LOOK_S)
        yield
    except (MemoryError, _TooLong) as error:
        what = f"{MOST_BYTES >> 30} GiB" if isinstance(error, MemoryError) else f"{MOST_SECONDS:.0f} s"
        raise ModelError(
            f"model.name: its chat template needs over {what} for one conversation and was ended: it is broken, or "
            "made to do harm; set one you trust (data.chat_template), or use another model"
        ) from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _began = 0


class Bounded:
    """A compiled template as transformers' own code calls it."""

    def __init__(self, source: str):
        self.source = source

    def render(self, **given: Any) -> str:
        with bounded():
            return compiled(self.source).render(**given)


@lru_cache
def compiled(source: str) -> Any:
    """A jinja2 template. Raises whatever jinja2 raises for a wrong one."""
    import json
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks answers in some templates: nothing but what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Long whole numbers are refused, and what makes them: a power of them takes hours."""

        intercepted_binops = frozenset({"*", "**", "//", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            small(left), small(right)
            if operator == "**" and not abs(right) <= 64:
                refuse("an exponent over 64")
            return small(super().call_binop(context, operator, left, right))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return not isinstance(obj, int | float | bytes) and super().is_safe_attribute(obj, attr, value)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def small(value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            refuse("a whole number of thousands of digits")
        return value

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    whole, rounded = environment.filters["int"], environment.filters["round"]
    environment.filters |= {
        "tojson": lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options}),
        "int": lambda value, default=0, base=10: small(whole(value, default, base)),
        "round": lambda value, precision=0, method="common": rounded(value, max(-64, min(precision, 64)), method),
    }
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)
