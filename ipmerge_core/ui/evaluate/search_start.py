"""Check what a visitor asks to search, and describe it as the arguments of a run.

In: the fields of the form, untrusted, and the chosen plan. Out: the arguments of `iter_search_to`.
The ranges, the budget and a plan in the middle of the space are checked before the run starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.ui.pairs import find_pack
from ipmerge_core.ui.plan_choice import analysis_of

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan

MOST_HOSTED = 100  # evaluations of a search on a Space
LONGEST_RANGES = 2000  # characters of all ranges
OPTIMIZER, GRID = "gp-bo", "grid"
BUDGET = 40


class SearchAsked(NamedTuple):
    """What to search.

    Attributes:
        method: a merge method; empty for that of the chosen merge.
        ranges: one NAME=LOW:HIGH or NAME=V1,V2,... per line; none for the usual space.
        optimizer: a name of `OPTIMIZERS`.
        evaluations: after how many evaluations the search ends.
        minutes: after how many minutes a run ends, if that is earlier; None for no limit.
        groups: groups of items whose mean score is maximised.
        validation: the share of items that the search sees.
        racing: give bad points up after a part of their items.
        seed: of the optimizer.
        labels: choose by scores; False chooses by the consistency of answers.
    """

    method: str = ""
    ranges: str = ""
    optimizer: str = OPTIMIZER
    evaluations: int | None = BUDGET
    minutes: float | None = None
    groups: Sequence[str] = ("math", "perception")
    validation: float = 0.2
    racing: bool = False
    seed: int = 0
    labels: bool = True


def search_work(
    pack_id: str, plan: MergePlan, asked: SearchAsked, *, hosted: bool
) -> dict[str, Any]:
    """Return the arguments of a search of a pair.

    Parameters that are not searched are those of the plan if it has the searched method, and the
    defaults otherwise.

    Raises: IPMergeError for a value that is not valid.
    """
    from ipmerge_core.planning.description import arguments_of
    from ipmerge_core.planning.plan import make_plan
    from ipmerge_core.search.objective import check_items
    from ipmerge_core.search.optimizers import find_optimizer
    from ipmerge_core.search.runs import read_settings

    _check_size(asked, hosted=hosted)
    method = asked.method or plan.method
    fixed = arguments_of(plan) if plan.method == method else {}
    how: dict[str, Any] = {
        "method": method,
        "optimizer": asked.optimizer,
        "ranges": [line.strip() for line in asked.ranges.splitlines() if line.strip()],
        "fixed": {},
        "groups": list(asked.groups),
        "seed": asked.seed,
        "validation": asked.validation,
        "racing": asked.racing,
        "labels": asked.labels,
    }
    budget = {"evaluations": asked.evaluations, "minutes": asked.minutes}
    settings = read_settings(how, budget)
    find_optimizer(asked.optimizer)
    check_items(settings.groups, asked.validation)
    space = settings.space
    searched = {"method", *space.names}
    how["fixed"] = {name: value for name, value in fixed.items() if name not in searched}
    middle = {axis.name: int(v) if axis.whole else v for axis in space.axes for v in [axis.at(0.5)]}
    make_plan(analysis_of(pack_id), method=method, **{**how["fixed"], **middle})
    return {"pack": str(find_pack(pack_id).path), "how": how, "budget": budget}


def _check_size(asked: SearchAsked, *, hosted: bool) -> None:
    """Check the length of the ranges and, on a Space, the budget. Raises: RunError."""
    if len(asked.ranges) > LONGEST_RANGES:
        raise RunError(
            f"The ranges have {len(asked.ranges)} characters; the maximum is {LONGEST_RANGES}. "
            f"Give fewer values."
        )
    if hosted and (asked.evaluations is None or asked.evaluations > MOST_HOSTED):
        raise RunError(f"This Space searches with at most {MOST_HOSTED} evaluations.")
