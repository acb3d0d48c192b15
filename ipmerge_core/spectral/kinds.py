"""The kinds of similarity and the default temperature, for code that must not load torch."""

from __future__ import annotations

SIMILARITIES = ("first", "max", "weighted")  # defined in `similarity.similarity_of`
TEMPERATURE = 32.0  # the public snapshot's constant; with 1 the update all but vanishes
