"""Names of the precisions in which a model is loaded, for code without torch."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["auto", "stored", "bf16", "fp16", "8bit", "4bit"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTISED: tuple[Precision, ...] = ("8bit", "4bit")
