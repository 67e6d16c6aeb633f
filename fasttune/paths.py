"""Files, some of them of strangers: nothing is written or copied through a link, no pipe is waited for, and what is
written appears whole and as readable as the umask says.
"""

import errno
import os
import tempfile
from pathlib import Path
from typing import TextIO, cast

from fasttune.errors import ModelError

TEMPLATES = "additional_chat_templates"


def read_text(path: Path, errors: str = "strict") -> str:
    """UTF-8. Raises OSError, also for what is no file: a read of a pipe may never end."""
    if not_a_file(path):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path.read_text(encoding="utf-8", errors=errors)


def not_a_file(path: Path) -> bool:
    """Whether a pipe, a device or a socket is there."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def write(path: Path, content: bytes) -> None:
    """The whole content or the old file, on the disk when this returns; a link is replaced. Raises OSError."""
    number, temporary = tempfile.mkstemp(".tmp", f".{path.name[:60]}.", path.parent)  # a new file, of a random name
    try:
        with open(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(number)
            os.fchmod(number, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def open_text(path: Path, mode: str) -> TextIO:
    """UTF-8, to write by the line. Raises OSError, also for a link, and for a pipe, which a write might wait for."""
    return cast(TextIO, open(path, mode, 1, "utf-8", "backslashreplace", opener=_no_link))


def _no_link(path: str, flags: int) -> int:
    try:
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        known = {errno.ELOOP: "it is a link, and nothing is written through one", errno.ENXIO: "it is a pipe"}
        raise OSError(error.errno, known.get(error.errno or 0, error.strerror), path) from None
    if not_a_file(Path(path)):
        os.close(number)
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", path)
    return number


def readable(folder: Path) -> None:
    """Everything in a new folder as readable as the umask says: libraries write weights for the owner alone."""
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())


def check_model(folder: Path, weights_too: bool = False) -> None:
    """Raise ModelError for a pipe in a model's or adapter's folder, and for a link that leads out of it: what is behind
    it (a template, say) would be copied into what is saved. Weights are only read, unless they are to be merged.
    """
    root = folder.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root  # the hub's cache: all files are links in it
    for path in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")):
        if not_a_file(path):
            raise ModelError(f"{path} is a pipe or a device, not a file: remove it, or get the model again")
        copied = path.name == TEMPLATES or (path.is_file() and (weights_too or path.suffix != ".safetensors"))
        if copied and path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ModelError(
                f"{path} is a link out of its folder, to {path.resolve()}, and nothing is copied through one: put the "
                "file itself there"
            )


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
