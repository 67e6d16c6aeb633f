"""What makes a CPU fast; nobody with a GPU runs it. Here: the sizes of its kernels, and how tensors get their memory.

No torch: the memory forecast imports the sizes, and one switch must be set before torch starts. Figures: docs/LOG.md.
"""

import ctypes
import os

BLOCK = 64  # queries that rows_attention computes at once
KEPT = 512  # rows longer than this recompute their probabilities in backward: kept, they would take T² of memory
RANK_MULTIPLE = 16  # fused_lora fills a rank up to it: at rank 8 the BLAS takes three times as long as at 16

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = 2**31 - 1


def ask_for_huge_pages() -> None:
    """Tensors of 2 MiB and more in huge pages; torch reads this when it starts.

    Source: https://github.com/pytorch/pytorch/blob/main/c10/core/impl/alloc_cpu.cpp
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let glibc give freed tensors to the next step, not back to the kernel, which clears every page. Else nothing.

    Source: https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER)
