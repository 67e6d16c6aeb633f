"""How a CPU's tensors get their memory: in huge pages, and from what earlier steps have freed.

Standard library only: the first has to be said before torch is imported. Figures are in docs/LOG.md.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = 2**31 - 1


def ask_for_huge_pages() -> None:
    """Tensors of 2 MiB and more in huge pages; read by torch when it starts.

    Source: https://github.com/pytorch/pytorch/blob/main/c10/core/impl/alloc_cpu.cpp
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed() -> bool:
    """Let glibc hand freed tensors to the next step, not to the kernel, which clears every page. False: not glibc.

    Source: https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
