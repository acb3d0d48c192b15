"""Read which method a user has chosen for a pair, and make its plan.

In: plain values from a form, a link or a manifest. Out: a `MethodChoice` that fits in gr.State, and
on demand the `MergePlan` (this imports torch). Values are checked by `make_plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.errors import PlanError
from ipmerge_core.planning.map_variants import SET_BY_VARIANTS
from ipmerge_core.planning.options import OPTIONS, PlanOptions, shown
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of, plan_of

if TYPE_CHECKING:
    from ipmerge_core.methods import Parameter
    from ipmerge_core.methods.registry import DataKind
    from ipmerge_core.planning.plan import MergePlan

EXPLORED = ""  # the name of the plan from Explore
EXPLORED_METHOD = "ip_merging"
ALSO_IN_EXPLORE = "projector"  # set by the map for some updates; the form may set another
SET_IN_EXPLORE = frozenset({"lambda_", "budget", *SET_BY_VARIANTS} - {ALSO_IN_EXPLORE})
# Rules by matrix are the map's.
FIELDS = tuple(option for option in OPTIONS.values() if option.kind != "rules")
DECIDE_DATA = frozenset({"input_share"})  # options with which every method needs a calibration
Value = float | int | bool | str | None


class MethodChoice(NamedTuple):
    """The chosen method, and the values that differ from its defaults.

    The values of the plan from Explore are the parameters of IP-Merging that are not set there.
    `options` are the plan's options; they stay when another method is chosen.
    """

    name: str = EXPLORED
    values: Mapping[str, Value] = {}
    options: Mapping[str, str] = {}
    calibration: str = ""


def option_text(value: object) -> str:
    """Return an option's value as the form's text.

    >>> option_text((0.5, 1.0)), option_text("upper_half")
    ('0.5 1', 'upper_half')
    """
    return " ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)


def parameters_of(name: str) -> tuple[Parameter, ...]:
    """Return the parameters that the form shows: for the plan from Explore, those not set there."""
    from ipmerge_core.methods import find_method

    found = find_method(name or EXPLORED_METHOD).parameters
    return tuple(p for p in found if name != EXPLORED or p.name not in SET_IN_EXPLORE)


def data_kind(choice: MethodChoice) -> DataKind | None:
    """Return the kind of calibration that a choice needs; None for no kind, or unknown values."""
    if choice.name == EXPLORED and not choice.values and not DECIDE_DATA & choice.options.keys():
        return None  # without importing the methods
    from ipmerge_core.methods import METHODS
    from ipmerge_core.planning.scope import needed_data

    method = METHODS.get(choice.name or EXPLORED_METHOD)
    try:
        options = PlanOptions.read(choice.options)
        return needed_data(method, choice.values, options) if method is not None else None
    except PlanError:
        return None  # the check of the plan says so


def chosen_plan(
    pack_id: str,
    choice: PlanChoice,
    method: MethodChoice,
    **more: Any,  # noqa: ANN401
) -> MergePlan:
    """Make the plan of the chosen method, or the one from Explore.

    `more` are arguments of `make_plan` for a method other than that of Explore.

    Raises: PlanError for an invalid value, more experts than the method merges, or a missing
        calibration.
    """
    options = PlanOptions.read(method.options)
    calibration = None
    if data_kind(method) is not None:
        if not method.calibration:
            raise PlanError(
                "This merge needs a calibration of these models. Select a finished one above, or "
                "press Calibrate."
            )
        calibration = method.calibration
    if method.name == EXPLORED:
        own = {**method.values, "calibration": calibration}
        return plan_of(pack_id, choice, options=options, **own)
    from ipmerge_core.planning.plan import make_plan

    values: dict[str, Any] = {**more, **method.values}
    analysis = analysis_of(pack_id)
    return make_plan(analysis, method.name, options=options, calibration=calibration, **values)
