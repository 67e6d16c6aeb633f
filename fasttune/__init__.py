"""fasttune: fine-tune an open model on one GPU as fast as the chip allows, with a report behind every number."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  said before anything is read that an older Python cannot parse
    found = ".".join(str(part) for part in sys.version_info[:2])
    print(f"fasttune: needs Python 3.11 to 3.13, this is {found}: bash scripts/setup_h100.sh", file=sys.stderr)
    sys.exit(2)

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # `python -m fasttune.verify`, in a folder with a json.py
    del sys.path[0]

__version__ = "0.1.0"
__all__ = ["load_config", "train"]

TYPE_CHECKING = False  # true for type checkers; typing is not there yet where child_process.py imports this
if TYPE_CHECKING:
    from fasttune.api import load_config, train


def __getattr__(name: str) -> object:
    """What is for notebooks is imported when it is asked for: every command imports this file."""
    if name in __all__:
        from fasttune import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
