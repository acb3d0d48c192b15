"""Matrices exact in bf16 whose merges were computed independently in float64, and comparisons."""

from __future__ import annotations

import torch

from ipmerge_core.methods import METHODS


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


# Exact in bf16, so that storing them changes nothing.
W0 = f64([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])
W_V = f64([[1.0, -1.25, 2.125], [1.125, 0.3125, 0.0]])
W_E = f64([[0.375, -0.375, 2.3125], [1.75, 0.0625, -0.8125]])


def close(merged, expected, tolerance=1e-12):
    return torch.allclose(merged, f64(expected), rtol=0, atol=tolerance)


def merged_by(name, **parameters):
    return METHODS[name](W0, W_V, W_E, **parameters)
