"""Settings of the C library's allocator for repeated large tensors."""

from __future__ import annotations

import numpy as np

_BLOCK = 31 << 20  # bytes; glibc adapts to freed blocks of up to 32 MiB


def keep_freed_memory() -> None:
    """Let glibc keep up to 62 MiB of freed memory per thread instead of returning it at once.

    The activations of each layer otherwise cause page faults, about a tenth of the processor time
    of small models. Freeing a block that was mapped sets both thresholds of glibc: see
    M_MMAP_THRESHOLD in the manual page of `mallopt`. Other C libraries ignore it.
    """
    block = np.empty(_BLOCK, dtype=np.uint8)
    del block
