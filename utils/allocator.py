"""What the C library does with large blocks of memory, which on a CPU decides much of the speed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
KEPT, USUAL = (2**31 - 1, 0), (128 * 1024, 65536)


def keep_freed_memory(keep=True):
    """Let this process keep large blocks when they are freed (`keep`), or go back to the C
    library's defaults.

    By default glibc asks the kernel for every large tensor anew, and the kernel clears it page by
    page: with layers of hundreds of megabytes that is a tenth to a third of a training step. Does
    nothing where there is no glibc.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        for option, value in zip(
            (M_TRIM_THRESHOLD, M_MMAP_MAX), KEPT if keep else USUAL, strict=True
        ):
            library.mallopt(option, value)
        if not keep:
            library.malloc_trim(0)
