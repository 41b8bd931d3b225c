"""The C library's handling of freed memory, which affects the speed on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
KEEP, DEFAULT = (2**31 - 1, 0), (128 * 1024, 65536)


def keep_freed_memory(keep=True):
    """Make the process keep large blocks of memory when they are freed.

    By default, glibc requests new memory from the kernel for every large tensor, and the kernel
    clears each page. With layers of hundreds of megabytes, this takes a tenth to a third of a
    training step. Without glibc, the function does nothing.

    Args:
        keep: False restores glibc's defaults.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        for option, value in zip(
            (M_TRIM_THRESHOLD, M_MMAP_MAX), KEEP if keep else DEFAULT, strict=True
        ):
            library.mallopt(option, value)
        if not keep:
            library.malloc_trim(0)
