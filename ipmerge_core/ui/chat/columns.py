"""Describe the models that a column of the chat can ask, by the value of its dropdown.

In: the chosen merge, the finished merges and kept plans of a visitor. Out: labelled choices, and
for a value the merge that it names. A column is the unmerged model, the chosen merge, the plan of
the recorded answers, a plan kept in this browser, another method with its default values, or a
finished merge. Pure but for what it reads of the pair: no components and no models.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ipmerge_core.errors import IPMergeError, PlanError
from ipmerge_core.ui.chat.recorded import recorded_choice
from ipmerge_core.ui.chosen_merge import ChosenMerge, name_of
from ipmerge_core.ui.finetuned_models import PREFIX as FINETUNED
from ipmerge_core.ui.finished_merges import describe_unmerged
from ipmerge_core.ui.method_choice import EXPLORED_METHOD, MethodChoice
from ipmerge_core.ui.pairs import load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of, read_commit

# A column is one of these, begins with one of the prefixes, or is the run of a finished merge or,
# after `FINETUNED`, of a fine-tuned model.
BASE, PLAN, FORM, RECORD = "base", "plan", "form", "record"
KEPT_PREFIX, METHOD_PREFIX = "kept:", "method:"
UNMERGED = "Vision-language model, unmerged"
FEWEST_COLUMNS, MOST_COLUMNS = 2, 4
MOST_KEPT = 9  # plans kept in Explore
LONGEST_KEPT = 400_000  # characters of the kept plans of a pair, as sent by a browser
LETTERS = "ABCD"

Choices = list[tuple[str, str]]


class Selection(NamedTuple):
    """The models that a user selected for a pair, and the chosen merge of that moment."""

    columns: tuple[str, ...]
    chosen: ChosenMerge


Selections = Mapping[str, Selection]  # by pair


def column_names(columns: Sequence[str]) -> tuple[str, ...]:
    """Name the columns: by what they are if that distinguishes them, else by characters.

    >>> column_names([BASE, PLAN]), column_names([BASE, PLAN, RECORD])
    (('Base', 'Merged'), ('Model A', 'Model B', 'Model C'))
    """
    names = tuple("Base" if who == BASE else "Merged" for who in columns)
    if len(set(names)) == len(names):
        return names
    return tuple(f"Model {letter}" for letter, _ in zip(LETTERS, columns, strict=False))


def default_columns(chosen: ChosenMerge) -> tuple[str, ...]:
    """Return the columns of a pair for which nothing has been selected.

    As long as no merge was chosen, the second one is the plan of the recorded answers, so that the
    first question gets the answer that is shown.
    """
    is_recorded = chosen.by == "start" and recorded_choice(chosen.pack_id) is not None
    return BASE, RECORD if is_recorded else PLAN


def selected(chosen: ChosenMerge, selections: Selections) -> tuple[str, ...]:
    """Return the selected columns; a merge that was chosen since is one of them.

    If no column asks the chosen merge, the one of the recorded plan does so from the next choice
    on, or else the last one.
    """
    mine = selections.get(chosen.pack_id)
    if mine is None:
        return default_columns(chosen)
    if mine.chosen == chosen or PLAN in mine.columns:
        return mine.columns
    columns = list(mine.columns)
    columns[columns.index(RECORD) if RECORD in columns else -1] = PLAN
    return tuple(columns)


def with_column(chosen: ChosenMerge, columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns with one more: the first choice of the pair that is not among them."""
    if len(columns) >= MOST_COLUMNS:
        return columns
    usual = [who for _, who in own_choices(chosen)]
    free = (who for who in (PLAN, RECORD, BASE) if who in usual and who not in columns)
    return (*columns, next(free, PLAN))


def own_choices(chosen: ChosenMerge) -> Choices:
    """List the choices that a pair has without finished merges and kept plans."""
    found = [(UNMERGED, BASE), (_label(chosen), PLAN)]
    if chosen.merge is not None:
        found.append((_label(chosen.without_merge()), FORM))
    recorded = merge_of(chosen, RECORD)
    return [*found, *([(_label(recorded), RECORD)] if recorded else [])]


def kept_choices(pack_id: str, kept: str | None) -> Choices:
    """List the plans of a pair that a browser keeps; what is not a plan of it is skipped.

    `kept` is untrusted: a JSON list of plans in the format of the layer map.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(PlanError, ValueError, RecursionError):
        plans = json.loads((kept or "")[:LONGEST_KEPT] or "[]")
        pack = load_pack(pack_id)
        for number, values in enumerate(plans[:MOST_KEPT] if isinstance(plans, list) else [], 1):
            with contextlib.suppress(PlanError):
                choice = read_commit(values, pack)
                label = name_of(ChosenMerge(pack_id, choice, by="kept"))
                found[_kept_value(choice)] = f"{label[:1].upper()}{label[1:]} · number {number}"
    return [(label, who) for who, label in found.items()]


def method_choices() -> Choices:
    """List the other methods, each with its default values; not those that need a calibration."""
    from ipmerge_core.methods import METHODS

    return [
        (f"Other method · {method.label}, default values", f"{METHOD_PREFIX}{name}")
        for name, method in METHODS.items()
        if name != EXPLORED_METHOD and method.data is None
    ]


def merge_of(chosen: ChosenMerge, who: str) -> ChosenMerge | None:
    """Return the merge that a column asks; None for the unmerged model and for a run.

    Raises: PlanError for a kept plan that is not one of the pair, or an unknown method.
    """
    pack_id = chosen.pack_id
    if who == PLAN:
        return chosen
    if who == FORM:
        return chosen.without_merge()
    if who == RECORD:
        recorded = recorded_choice(pack_id)
        return ChosenMerge(pack_id, recorded, by="record") if recorded else None
    if who.startswith(KEPT_PREFIX):
        return ChosenMerge(pack_id, _kept_plan(pack_id, who), by="kept")
    if who.startswith(METHOD_PREFIX):
        name = who.removeprefix(METHOD_PREFIX)
        if who not in {value for _, value in method_choices()}:
            raise PlanError(f"'{name[:40]}' is not a merge method that runs without calibration.")
        return ChosenMerge(pack_id, method=MethodChoice(name), by="default")
    return None


def with_gain(chosen: ChosenMerge, gain: float) -> ChosenMerge:
    """Return a merge of IP-Merging with another lambda."""
    plan, method = chosen.recipe
    own = replace(chosen, merge=None, made=None) if chosen.merge else chosen
    return replace(own, plan=plan._replace(lambda_=gain), method=method)


def name_asked(chosen: ChosenMerge, who: str) -> str:
    """Name the model of a column before it is found."""
    if who == BASE:
        with contextlib.suppress(IPMergeError):
            return describe_unmerged(analysis_of(chosen.pack_id).sources.mllm.id)
        return UNMERGED
    if who.startswith(FINETUNED):
        return "Fine-tuned model"
    with contextlib.suppress(PlanError):
        found = merge_of(chosen, who)
        return name_of(found) if found else who
    return who


def _label(chosen: ChosenMerge) -> str:
    name = name_of(chosen)
    return f"Chosen merge · {name}" if chosen.merge else name[:1].upper() + name[1:]


def _kept_value(choice: PlanChoice) -> str:
    return KEPT_PREFIX + json.dumps(choice.to_browser(), sort_keys=True, separators=(",", ":"))


def _kept_plan(pack_id: str, who: str) -> PlanChoice:
    try:
        values = json.loads(who.removeprefix(KEPT_PREFIX))
    except (ValueError, RecursionError) as error:
        raise PlanError("The kept plan of this column cannot be read. Select another.") from error
    return read_commit(values, load_pack(pack_id))
