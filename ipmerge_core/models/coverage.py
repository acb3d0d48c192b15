"""Describe how much of the language model can merge, and what is kept.

In: the matched matrices and the kept tensors of an MLLM, with their numbers of elements. Out: the
sentences of the sibling check. Reads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ipmerge_core.models.matrix_kinds import is_projection, is_router

_LISTED = 6  # maximum number of kinds that a sentence lists


class Matched(NamedTuple):
    """A matched matrix: its module and number of elements."""

    module: str
    numel: int


class Kept(NamedTuple):
    """A kept tensor: the reason, a short name of its kind, and its number of elements."""

    reason: str
    kind: str
    numel: int


def describe_matrices(matched: Iterable[Matched], parameters: int) -> str:
    """Return the share of a language model's parameters that can merge, and that does by default.

    >>> describe_matrices([Matched("q", 60), Matched("mamba.in_proj", 20)], 100)
    '80 % of its weights can merge, 60 % by default; with modules=all also mamba.in_proj'
    """
    sizes: Counter[str] = Counter()
    for matrix in matched:
        sizes[matrix.module] += matrix.numel
    others = [module for module, _ in sizes.most_common() if not is_projection(module)]
    routers = [module for module in others if is_router(module)]
    rest = [module for module in others if module not in routers]
    text = f"{_percent(sizes.total(), parameters)} of its weights can merge"
    if not others:
        return text
    usual = sizes.total() - sum(sizes[module] for module in others)
    text += f", {_percent(usual, parameters)} by default"
    if rest:
        text += f"; with modules=all also {listed(rest)}"
    if routers:
        text += f"; with modules=all-and-router also {listed(routers)}"
    return text


def describe_kept(kept: Iterable[Kept], parameters: int) -> str:
    """List what is kept by reason, and tensors without one by kind, with their share.

    >>> describe_kept([Kept("vocabulary", "lm_head", 20), Kept("", "mamba.conv1d", 5)], 100)
    '1 vocabulary, mamba.conv1d (5 %)'
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in kept:
        if tensor.reason:
            counts[tensor.reason] += 1
        else:
            sizes[tensor.kind] += tensor.numel
    named = [f"{count} {reason}" for reason, count in counts.most_common()]
    named += [f"{kind} ({_percent(size, parameters)})" for kind, size in sizes.most_common()]
    return listed(named) if named else "nothing"


def listed(names: list[str]) -> str:
    """Join names, and count those beyond the first six.

    >>> listed(["a", "b"])
    'a, b'
    """
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _percent(part: int, whole: int) -> str:
    share = part / whole if whole else 0.0
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 or not part else "below 1 %"
