"""Every merge method, by name: `METHODS["task_arithmetic"](base, mllm, math, math_weight=0.5)`.

Each method is a pure function on matrices, in the module of its family; `registry.py` describes how
functions are registered in `METHODS`. Importing the modules below registers them.
"""

# Defines the order of METHODS in tables and forms.
# isort: off
from ipmerge_core.methods.ip_merging import ip_merging
from ipmerge_core.methods.elementwise import layer_swap, linear, task_arithmetic
from ipmerge_core.methods.sign_election import sce, ties
from ipmerge_core.methods.dropout import breadcrumbs, dare_linear, dare_ties, della
from ipmerge_core.methods.data_aware import fisher, regmean
from ipmerge_core.methods.wudi import wudi
from ipmerge_core.methods.subspace import iso_c, iso_cts, knots_ties, tsv
from ipmerge_core.methods.coefficients import metagpt, nan
from ipmerge_core.methods.geodesic import karcher, model_stock, multislerp, nuslerp, slerp
from ipmerge_core.methods.overlap import ram
from ipmerge_core.methods.truncation import star

# isort: on
from ipmerge_core.methods.declarations import AffineUpdate, Statistic
from ipmerge_core.methods.registry import METHODS, MergeMethod, Parameter, find_method

__all__ = [
    "METHODS",
    "AffineUpdate",
    "MergeMethod",
    "Parameter",
    "Statistic",
    "breadcrumbs",
    "dare_linear",
    "dare_ties",
    "della",
    "find_method",
    "fisher",
    "ip_merging",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots_ties",
    "layer_swap",
    "linear",
    "metagpt",
    "model_stock",
    "multislerp",
    "nan",
    "nuslerp",
    "ram",
    "regmean",
    "sce",
    "slerp",
    "star",
    "task_arithmetic",
    "ties",
    "tsv",
    "wudi",
]
