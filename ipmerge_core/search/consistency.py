"""Choose a coefficient without labels: where answers agree with those of its neighbours.

In: the answers of models along a path of one coefficient, to the same unlabelled questions. Out:
the number of questions on which each model disagrees with a neighbour, and the choice. Source:
AdaMMS, arXiv 2503.23733.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.search.space import THRESHOLD, SearchSpace
from ipmerge_core.search.study import COMPLETE, Evaluation
from ipmerge_core.tasks.answers import normalized

if TYPE_CHECKING:
    from ipmerge_core.evaluation.report import Judged, Report

FEWEST = 3  # coefficients of a path
# Parameters whose largest value is closest to the vision-language model.
_KEEPING = ("mllm_weight", "alpha", THRESHOLD)


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
    if len(answers) < FEWEST:
        raise RunError(
            f"The path has {len(answers)} coefficients; comparing neighbours needs at least "
            f"{FEWEST}."
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


@dataclass(frozen=True)
class AnswerPath:
    """The evaluations of a path, from the vision-language model outwards, and the choice on it.

    Attributes:
        numbers: the evaluations in the order of the path.
        disagreements: the questions on which each disagrees with a neighbour; None at both ends.
        questions: how many were compared.
        tied: the evaluations with the least disagreement, the chosen one first.
        by_labels: the evaluation with the best validation score, for comparison only.
    """

    numbers: tuple[int, ...]
    disagreements: tuple[int | None, ...]
    questions: int
    tied: tuple[int, ...]
    by_labels: int

    @property
    def chosen(self) -> int:
        """The evaluation that is chosen without labels."""
        return self.tied[0]

    def disagreement(self, number: int) -> int | None:
        """Return the disagreements of an evaluation; None if it has fewer than two neighbours."""
        return dict(zip(self.numbers, self.disagreements, strict=True)).get(number)


def check_path(space: SearchSpace) -> None:
    """Check that a space is a path of one parameter with enough values. Raises: RunError."""
    if space.dimension != 1:
        raise RunError(
            f"A search without labels varies one parameter; got {space.dimension} "
            f"({', '.join(space.names)}). Give one range."
        )
    if len(space.axes[0].values) < FEWEST:
        name = space.names[0]
        raise RunError(
            f"A search without labels compares neighbouring values; '{name}' needs at least "
            f"{FEWEST}, such as {name}=0.2,0.4,0.6."
        )


def path_order(space: SearchSpace, found: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the complete evaluations of a path, from the vision-language model outwards."""
    name = space.names[0]
    complete = [each for each in found if each.state == COMPLETE]
    return sorted(complete, key=lambda each: each.parameters[name], reverse=name in _KEEPING)


def path_of(ordered: Sequence[Evaluation], names: Sequence[str], report: Report) -> AnswerPath:
    """Choose on a path by the replies of its models; references decide `by_labels` only.

    Args:
        ordered: evaluations in the order of the path.
        names: the models of the report, in the same order.
        report: their replies to the validation items.

    Raises: as `most_consistent`.
    """
    answers = [
        [_answer(reply) for replies in report.replies[name].values() for reply in replies]
        for name in names
    ]
    found = most_consistent(answers)
    numbers = tuple(each.number for each in ordered)
    best = max(ordered, key=lambda each: each.value or 0.0)
    return AnswerPath(
        numbers,
        tuple(found.disagreements.get(index) for index in range(len(ordered))),
        len(answers[0]),
        tuple(numbers[index] for index in found.tied),
        best.number,
    )


def describe_path(path: AnswerPath, found: Sequence[Evaluation]) -> str:
    """Describe a choice without labels, next to what the labels would have chosen."""
    numbered = {each.number: each for each in found}
    least = path.disagreement(path.chosen)
    text = (
        f"Chosen without labels: evaluation {path.chosen}, whose answers to {least} of "
        f"{path.questions} validation items differ from those of a neighbouring value"
    )
    others = len(path.tied) - 1
    text += f" ({others} more with as few; the closest to the unmerged model)." if others else "."
    if path.by_labels == path.chosen:
        return f"{text} The labels choose the same."
    scores = [numbered[n].value or 0.0 for n in (path.by_labels, path.chosen)]
    return (
        f"{text} The labels would choose evaluation {path.by_labels}: {scores[0]:.1f} instead of "
        f"{scores[1]:.1f} on these items."
    )


def _answer(reply: Judged) -> str:
    """Return the answer that the rules find in a reply, or the reply if they find none."""
    return reply.text if reply.found is None else reply.found
