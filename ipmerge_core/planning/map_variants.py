"""The updates of IP-Merging that the layer map draws, by name.

In: nothing. Out: for each name, the parameters of `ip_merging` that differ from their defaults.
Records of an analysis hold the inner products of each, so that the map previews them exactly.
Imports neither torch nor a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ipmerge_core.spectral.kinds import COMPLEMENTS, ENERGY_SHARES, KEPT_SHARES, TRUNCATIONS

VARIANTS: Mapping[str, Mapping[str, str | float]] = MappingProxyType(
    {
        "sum": {},
        "max": {"gamma_norm": "max"},
        "rescale_only": {"ablation": "rescale_only"},
        "select_only": {"ablation": "select_only"},
        "protect": {"projector": "protect"},
        **{
            name: {"projector": "complement", "energy": share}
            for name, share in zip(COMPLEMENTS, ENERGY_SHARES, strict=True)
        },
        **{
            name: {"ablation": "select_only", "math_energy": share}
            for name, share in zip(TRUNCATIONS, KEPT_SHARES, strict=True)
        },
    }
)
LARGEST_LAMBDA = 32.0  # upper end of the slider
LARGEST_BUDGET = 1.0
SET_BY_VARIANTS = frozenset(name for values in VARIANTS.values() for name in values)


def variant_with(parameters: Mapping[str, Any]) -> str | None:
    """Return the update with exactly these parameters; None if the map draws none.

    >>> variant_with({"gamma_norm": "max"}), variant_with({"projector": "top_k"})
    ('max', None)
    """
    given = dict(parameters)
    return next((name for name, values in VARIANTS.items() if dict(values) == given), None)
