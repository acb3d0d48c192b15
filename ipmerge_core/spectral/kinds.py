"""Names of similarities, anchors and updates, and default values, for code without torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

Anchor: TypeAlias = Literal["two_base", "root", "inject", "interp"]

SIMILARITIES = ("first", "max", "weighted")  # defined in `similarity.similarity_of`
TEMPERATURE = 32.0  # the public snapshot's constant; with 1 the update all but vanishes
ENERGY_SHARES = tuple(step / 20 for step in range(1, 21))  # at which complements are previewed
ENERGY = 0.8  # share that a complement leaves out by default, ours
KEPT_SHARES = ENERGY_SHARES[:-1]  # of the expert's energy, at which truncations are previewed
WANTED_ENERGY = 0.9  # share of the expert's energy whose directions `protect` lets pass


def complement_at(share: float) -> str:
    """Return the name of the complement that leaves out the directions of a share of the energy.

    >>> complement_at(0.45)
    'complement_45'
    """
    return f"complement_{round(100 * share)}"


def truncation_at(share: float) -> str:
    """Return the name of an expert's change truncated to the directions of a share of its energy.

    >>> truncation_at(0.9)
    'truncated_90'
    """
    return f"truncated_{round(100 * share)}"


COMPLEMENTS = tuple(complement_at(share) for share in ENERGY_SHARES)
TRUNCATIONS = tuple(truncation_at(share) for share in KEPT_SHARES)
