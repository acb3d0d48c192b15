"""Hold the one merge that all tabs speak of: choose it, name it, describe it and link to it.

In: the choices of a visitor in Explore, in the Merge tab, among finished merges and among recorded
answers; the last one counts. Out: a frozen `ChosenMerge` that fits in gr.State, its name with the
short digest of its plan, its full description, and its part of the permalink. The plan itself is
made on demand, which imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import parse_qsl, urlencode

from ipmerge_core.errors import IPMergeError, PlanError
from ipmerge_core.planning.map_variants import LARGEST_LAMBDA, VARIANTS, variant_with
from ipmerge_core.planning.options import ANCHORS, shown
from ipmerge_core.ui.errors import sentence_of
from ipmerge_core.ui.finished_merges import FinishedMerge, method_label
from ipmerge_core.ui.method_choice import (
    ALSO_IN_EXPLORE,
    EXPLORED_METHOD,
    FIELDS,
    SET_IN_EXPLORE,
    MethodChoice,
    Value,
    chosen_plan,
    option_text,
    parameters_of,
)
from ipmerge_core.ui.pairs import SKIP_ALL, find_partial, pair_name
from ipmerge_core.ui.plan_choice import (
    PlanChoice,
    describe_choice,
)
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan

Origin = Literal["start", "explore", "kept", "record", "merge", "default", "folder"]
PLACES: Mapping[Origin, str] = {
    "start": "plan in Explore",
    "explore": "plan in Explore",
    "kept": "plan kept in Explore",
    "record": "plan of the recorded answers",
    "merge": "method in Merge",
    "default": "other method",
}
METHOD_KEY, VALUE_KEY, OPTION_KEY = "method", "p.", "o."  # of the permalink
LONGEST_VALUE = 200  # characters of a value in a link


class Recipe(NamedTuple):
    """What determines a plan of a pair: the choices of the map, the method and its options.

    Of the choices of the map, only the rules by matrix apply to another method.
    """

    plan: PlanChoice
    method: MethodChoice


@dataclass(frozen=True)
class ChosenMerge:
    """The merge that the tabs speak of.

    Attributes:
        pack_id: the pair; empty if there is none.
        plan: the plan in Explore.
        method: the method, its values and the plan's options, as in the form of the Merge tab.
        by: where the merge was chosen; "start" until a visitor chooses one.
        merge: the finished merge, if one is chosen.
        made: how the finished merge was made.
    """

    pack_id: str = ""
    plan: PlanChoice = field(default_factory=PlanChoice)
    method: MethodChoice = field(default_factory=MethodChoice)
    by: Origin = "start"
    merge: FinishedMerge | None = None
    made: Recipe | None = None

    @property
    def recipe(self) -> Recipe:
        """What the plan is made of."""
        if self.made is not None:
            return self.made
        return Recipe(PlanChoice() if self.method.name else self.plan, self.method)

    @property
    def run(self) -> str:
        """The run of the chosen finished merge; empty if it is none."""
        return self.merge.run if self.merge else ""

    @property
    def map_plan(self) -> PlanChoice | None:
        """The plan as the map draws it; None for another method, or parameters that are its own."""
        plan, method = self.recipe
        return None if method.name or method.values else plan

    def with_plan(self, plan: PlanChoice) -> ChosenMerge:
        """Choose a plan of the map; options of the form stay, another method does not."""
        values = {} if self.method.name else self.method.values
        method = MethodChoice(values=values, options=self.method.options)
        return ChosenMerge(self.pack_id, plan, method, "explore")

    def with_record(self, plan: PlanChoice) -> ChosenMerge:
        """Choose the plan of a recorded answer: exactly that, without the form's options."""
        return ChosenMerge(self.pack_id, plan, by="record")

    def opened(self, pack_id: str, plan: PlanChoice) -> ChosenMerge:
        """Open a pair with its initial plan; the method and the options stay chosen."""
        method = self.method._replace(calibration="")  # of the models of the other pair
        return ChosenMerge(pack_id, plan, method, "merge" if method.name else "start")

    def with_link(self, plan: PlanChoice) -> ChosenMerge:
        """Take the plan of a link that was opened; a method that the link names stays."""
        return replace(self, plan=plan, by="merge" if self.method.name else "explore")

    def with_method(self, method: MethodChoice) -> ChosenMerge:
        """Choose what the form of the Merge tab holds, if that is something else."""
        if method == self.method:
            return self
        by: Origin = "merge" if method.name else "explore"
        return ChosenMerge(self.pack_id, self.plan, method, by)

    def with_merge(self, merge: FinishedMerge) -> ChosenMerge:
        """Choose a finished merge; the form and the map keep what they hold."""
        return replace(self, by="folder", merge=merge, made=recipe_of(merge.made.content))

    def without_merge(self) -> ChosenMerge:
        """Choose the form's merge again instead of a finished one."""
        by: Origin = "merge" if self.method.name else "explore"
        return replace(self, by=by, merge=None, made=None)

    def make_plan(self) -> MergePlan:
        """Make the plan. Raises: PlanError."""
        plan, method = self.recipe
        rules = {"overrides": plan.overrides} if method.name and plan.overrides else {}
        return chosen_plan(self.pack_id, plan, method, **rules)


# --- names and descriptions ------------------------------------------------------------------


def name_of(chosen: ChosenMerge, plan: str = "") -> str:
    """Name the chosen merge; `plan` is its plan's hash, if it is known.

    >>> name_of(ChosenMerge("pack"), "1a2b3c4d")
    'plan in Explore · IP-Merging, Sα 0.4, λ 1 · plan 1a2b3c4d'
    """
    if chosen.merge is not None:
        return chosen.merge.label
    choice, method = chosen.recipe
    label = method_label(method.name) if method.name else "IP-Merging"  # without torch
    words = [label, *([] if method.name else [describe_choice(choice)])]
    words += [f"{name.rstrip('_')} {shown(value)}" for name, value in method.values.items()]
    words += [f"{name.replace('_', ' ')} {value}" for name, value in method.options.items()]
    words += [f"{len(choice.overrides)} set by hand"] if method.name and choice.overrides else []
    named = [PLACES[chosen.by], ", ".join(words), *([f"plan {plan}"] if plan else [])]
    return " · ".join(named)


def digest_of(chosen: ChosenMerge) -> str:
    """Return the short digest of the chosen merge's plan. Raises: PlanError."""
    return chosen.merge.made.plan if chosen.merge else chosen.make_plan().hash


def describe(chosen: ChosenMerge) -> dict[str, str]:
    """Describe the chosen merge in full, by display name. Raises: PlanError."""
    from ipmerge_core.methods import find_method
    from ipmerge_core.planning.description import describe_selection, settings_of

    plan = chosen.make_plan()
    method, settings = find_method(plan.method), settings_of(plan)
    options = plan.options.describe()
    patterns = [f"{name} '{options[name]}'" for name in ("include", "exclude") if name in options]
    rules = [f"overrides {options['overrides']}"] if "overrides" in options else []
    elsewhere = {*options, "calibration"}
    own = {name: text for name, text in settings.items() if name not in elsewhere}
    return {
        "Pair": plan.name,
        "Chosen": name_of(chosen, chosen.merge.made.plan if chosen.merge else plan.hash),
        "Method": f"{method.label} ({method.source})",
        "Parameters": ", ".join(f"{name} {text}" for name, text in own.items() if text != "none"),
        "Scope": ", ".join([describe_selection(plan), *plan.extras, *patterns, *rules]),
        "Anchor": f"{ANCHORS[plan.anchor]} ({plan.anchor})",
        "Layer gains": settings.get("layer gains", "none"),
        "Calibration": settings.get("calibration", "none"),
    }


def chosen_line(chosen: ChosenMerge) -> str:
    """Return the line that names the chosen merge in a tab, as HTML."""
    if not chosen.pack_id:
        return ""
    try:
        partial = find_partial(chosen.pack_id, SKIP_ALL) is not None
        words = name_of(chosen, "" if partial else digest_of(chosen))
    except IPMergeError as error:
        words = f"{name_of(chosen)} · {sentence_of(error)}"
    return (
        f"<p>Chosen merge: <b>{as_html(words)}</b> · pair {as_html(pair_name(chosen.pack_id))}</p>"
    )


# --- the recipe of a finished merge ----------------------------------------------------------


def recipe_of(content: Mapping[str, Any]) -> Recipe:
    """Read a recipe from the plan of a manifest: only what differs from the defaults.

    Raises: PlanError if the method is unknown.
    """
    from ipmerge_core.methods import find_method

    method = find_method(str(content["method"]))
    found, analysed = content.get("parameters") or {}, content.get("analysed") or {}
    usual = {parameter.name: parameter.default for parameter in method.parameters}
    usual |= {name: analysed.get(name, usual[name]) for name in method.from_analysis}
    values = {name: found[name] for name in usual if name in found and found[name] != usual[name]}
    choice = _map_choice(content, values) if method.name == EXPLORED_METHOD else None
    options = {
        option.name: option_text(content[option.name])
        for option in FIELDS
        if content.get(option.name) not in (None, option.default, _stored(option.default))
    }
    calibration = content.get("calibration") or {}
    folder = str(calibration.get("folder", "")) if isinstance(calibration, Mapping) else ""
    if choice is not None:
        values = {name: value for name, value in values.items() if name not in _in_map(values)}
        return Recipe(choice, MethodChoice(values=values, options=options, calibration=folder))
    selects = ("similarity", "similarity_threshold") if method.needs_analysis else ()
    values |= {name: content[name] for name in selects if content.get(name) is not None}
    rules = PlanChoice(overrides=dict(content.get("overrides") or {}))
    return Recipe(rules, MethodChoice(method.name, values, options, folder))


def _stored(default: object) -> object:
    """Return a default as JSON stores it: a tuple becomes a list."""
    return list(default) if isinstance(default, tuple) else default


def _in_map(values: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the parameters that Explore sets for a plan with these values."""
    also = values.get(ALSO_IN_EXPLORE) in {v.get(ALSO_IN_EXPLORE) for v in VARIANTS.values()}
    return SET_IN_EXPLORE | ({ALSO_IN_EXPLORE} if also else set())


def _map_choice(content: Mapping[str, Any], values: Mapping[str, Any]) -> PlanChoice | None:
    """Return the plan as Explore sets it, or None if it cannot be set there."""
    own = {name: value for name, value in values.items() if name in _in_map(values)}
    rest = {name: value for name, value in own.items() if name not in ("lambda_", "budget")}
    if rest.get(ALSO_IN_EXPLORE) == "complement":
        rest["energy"] = (content.get("parameters") or {}).get("energy")
    variant = variant_with(rest)
    lambda_ = values.get("lambda_", 1.0)
    if variant is None or lambda_ > LARGEST_LAMBDA or content.get("similarity") is None:
        return None
    return PlanChoice(
        float(content["similarity_threshold"]),
        float(lambda_),
        str(content["similarity"]),
        variant,
        dict(content.get("overrides") or {}),
        float(values.get("budget", 0.0)),
    )


# --- the permalink ---------------------------------------------------------------------------


def link_part(chosen: ChosenMerge) -> str:
    """Return the part of the permalink that the map does not write: method, values and options.

    >>> link_part(ChosenMerge(method=MethodChoice("ties", {"density": 0.25}, {"norms": "merge"})))
    'method=ties&p.density=0.25&o.norms=merge'
    """
    _, method = chosen.recipe
    named = {METHOD_KEY: method.name} if method.name else {}
    values = {f"{VALUE_KEY}{name}": json.dumps(value) for name, value in method.values.items()}
    options = {f"{OPTION_KEY}{name}": value for name, value in method.options.items()}
    return urlencode({**named, **values, **options})


def read_link_part(query: str) -> tuple[MethodChoice, list[str]]:
    """Read what `link_part` wrote; return also one sentence for every part that is not valid.

    A calibration is not part of a link: it is a folder of this machine.
    """
    from ipmerge_core.methods import METHODS

    given = dict(parse_qsl(query.removeprefix("?"), keep_blank_values=True, max_num_fields=100))
    problems: list[str] = []
    name = given.get(METHOD_KEY, "")
    if name and (name not in METHODS or METHODS[name].needs_analysis):
        problems.append(f"method {name[:40]!r} is not one of the Merge tab")
        name = ""
    values: dict[str, Value] = {}
    options: dict[str, str] = {}
    for key, text in given.items():
        try:
            if key.startswith(VALUE_KEY):
                values |= _link_value(name, key.removeprefix(VALUE_KEY), text)
            elif key.startswith(OPTION_KEY):
                options |= _link_option(key.removeprefix(OPTION_KEY), text)
        except PlanError as error:
            problems.append(f"{key[:40]}: {error}")
    return MethodChoice(name, values, options), problems


def _link_value(method: str, name: str, text: str) -> dict[str, Value]:
    known = {each.name: each for each in parameters_of(method)}
    if name not in known:
        raise PlanError(f"the method has no parameter {name[:40]!r}")
    try:
        value = json.loads(text[:LONGEST_VALUE])
    except ValueError as error:
        raise PlanError(f"{text[:40]!r} is not a value") from error
    known[name].check(value)
    return {name: value}


def _link_option(name: str, text: str) -> dict[str, str]:
    from ipmerge_core.planning.options import PlanOptions

    if name not in {option.name for option in FIELDS} or len(text) > LONGEST_VALUE:
        raise PlanError("there is no such option, or its value is too long")
    PlanOptions.read({name: text})
    return {name: text}
