"""Freed memory is kept for the next tensor of a similar size."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

REPEATED = textwrap.dedent(
    """
    import platform, resource
    import numpy as np
    from ipmerge_core.runtime.allocator import keep_freed_memory

    def faults():
        layers = lambda: [np.ones(5 << 20, dtype=np.uint8) for _ in range(8)]
        layers()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            layers()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    print(platform.libc_ver()[0], faults())
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_repeated_tensors_cause_no_page_faults() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPEATED], capture_output=True, text=True, check=True
    )
    library, faults = done.stdout.split()
    if library != "glibc":
        pytest.skip(f"the C library is {library}")
    assert int(faults) < 2000, "160 arrays of 1280 pages"
