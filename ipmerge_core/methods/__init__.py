"""Every merge method, by name: `METHODS["task_arithmetic"](base, mllm, math, math_weight=0.5)`.

Each method is a pure function on matrices in the file of its family; `registry.py` explains how
one becomes an entry of `METHODS`. Importing the family files here is what registers them.
"""

from ipmerge_core.methods.elementwise import task_arithmetic
from ipmerge_core.methods.ip_merging import ip_merging
from ipmerge_core.methods.registry import METHODS, MergeMethod, Parameter, find_method

__all__ = [
    "METHODS",
    "MergeMethod",
    "Parameter",
    "find_method",
    "ip_merging",
    "task_arithmetic",
]
