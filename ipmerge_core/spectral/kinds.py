"""Names of similarities and anchors and the default temperature, for code without torch."""

from __future__ import annotations

from typing import Literal, TypeAlias

Anchor: TypeAlias = Literal["two_base", "root", "inject", "interp"]

SIMILARITIES = ("first", "max", "weighted")  # defined in `similarity.similarity_of`
TEMPERATURE = 32.0  # the public snapshot's constant; with 1 the update all but vanishes
