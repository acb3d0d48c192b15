"""Choose a coefficient without labels: where answers agree with those of its neighbours.

In: the answers of models along a path of one coefficient, to the same unlabelled questions. Out:
the number of questions on which each model disagrees with a neighbour, and the choice. Source:
AdaMMS, arXiv 2503.23733.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.tasks.answers import normalized


class Consistency(NamedTuple):
    """The disagreements at every interior coefficient, and the chosen index on the path.

    `tied` lists all indices with the least disagreement; the one closest to the start of the path
    is chosen, which is closest to the vision-language model.
    """

    disagreements: dict[int, int]
    chosen: int
    tied: tuple[int, ...]


def most_consistent(answers: Sequence[Sequence[str]]) -> Consistency:
    """Return where on a path answers change least.

    Math:   D_j = |{q : a_j(q) != a_{j-1}(q) or a_j(q) != a_{j+1}(q)}| for interior j; the choice is
            argmin_j D_j. Answers are compared in lower case, without surrounding whitespace and a
            final full stop.
    Args:   answers: one list of answers per coefficient, in the order of the path.
    Raises: RunError for fewer than three coefficients, or lists of different lengths.

    >>> paths = [list("xxx"), list("xyx"), list("xyz"), list("xyz"), list("wyz")]
    >>> most_consistent(paths)
    Consistency(disagreements={1: 2, 2: 1, 3: 1}, chosen=2, tied=(2, 3))
    """
    if len(answers) < 3:
        raise RunError(
            f"The path has {len(answers)} coefficients; comparing neighbours needs at least 3."
        )
    counts = {len(each) for each in answers}
    if len(counts) > 1 or counts == {0}:
        raise RunError(
            f"The models answered {', '.join(map(str, sorted(counts)))} questions; expected the "
            f"same questions for all, and at least one."
        )
    plain = [[normalized(reply) for reply in each] for each in answers]
    found = {
        j: sum(
            not (before == here == after)
            for before, here, after in zip(plain[j - 1], plain[j], plain[j + 1], strict=True)
        )
        for j in range(1, len(plain) - 1)
    }
    least = min(found.values())
    tied = tuple(j for j, count in found.items() if count == least)
    return Consistency(found, tied[0], tied)
