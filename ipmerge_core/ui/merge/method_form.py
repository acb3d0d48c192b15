"""The methods of the Merge tab as a form, made from their own signatures.

In: what a visitor chooses. Out: a `MethodChoice`, small plain values that fit in gr.State, and the
plan it stands for. The methods load torch, so the list is filled when the tab opens and the fields
are made when a method is chosen; what a plan can be told beside its method stands folded away below
them. Values are judged where the plan is made, not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.planning.options import OPTIONS, Option, PlanOptions
from ipmerge_core.runtime.host import is_hosted
from ipmerge_core.ui.errors import QUIET
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of, plan_of

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.methods import Parameter
    from ipmerge_core.planning.plan import MergePlan
    from ipmerge_core.ui.merge.start_gate import StartGate

EXPLORED = ""  # the name that stands for the plan from Explore
EXPLORED_LABEL = "IP-Merging: the plan from Explore"
_SLIDER_STEP = 0.01
# Rules by matrix are the map's.
FIELDS = tuple(option for option in OPTIONS.values() if option.kind != "rules")
OWN = ""  # the choice that leaves an option to the method
Value = float | int | bool | str | None


class MethodChoice(NamedTuple):
    """The method that a visitor has chosen, and the values that differ from its defaults.

    `options` are what the plan is told beside its method; they stay when another method is chosen.
    """

    name: str = EXPLORED
    values: Mapping[str, Value] = {}
    options: Mapping[str, str] = {}
    calibration: str = ""


class MethodForm(NamedTuple):
    """The parts of the form that others listen to or lay something beside."""

    changed: Dependency  # another method was chosen, and the choice knows it
    data: gr.Column


def method_names() -> gr.Dropdown:
    """Lay out the choice of a method; `offered` fills it."""
    return gr.Dropdown(
        [(EXPLORED_LABEL, EXPLORED)], value=EXPLORED, label="Method", elem_id="merge-method"
    )


def method_form(name: gr.Dropdown, method: gr.State, gate: StartGate) -> MethodForm:
    """Lay out the method's fields and the options; what is chosen goes into `method`.

    Args:
        name: the choice of a method, as `method_names` lays it out.
        method: holds a MethodChoice.
        gate: what keeps Start off until a change of a field or an option is checked.
    """
    gate.at_once(name.change)
    changed = name.change(with_method, [method, name], method, queue=False, **QUIET)

    @gr.render(inputs=name, triggers=[name.change], show_progress="hidden")  # type: ignore[untyped-decorator]
    def fields(chosen: str) -> None:
        if chosen == EXPLORED:
            return
        from ipmerge_core.methods import find_method

        found = find_method(chosen)
        gr.Markdown(f"`{found.formula}` ({found.source})", elem_id="method-formula")
        with gr.Row(elem_classes="fields"):
            for parameter in found.parameters:
                keep: Callable[..., MethodChoice] = partial(with_value, parameter.name, chosen)
                _keep(_field(parameter), keep, method, gate)

    data = gr.Column(elem_id="calibration", visible=False)
    with (
        gr.Accordion("Advanced: scope and anchor", open=False),
        gr.Row(elem_classes="fields"),
    ):
        for option in FIELDS:
            _keep(_option_field(option), partial(with_option, option.name), method, gate)
    return MethodForm(changed, data)


def _keep(
    field: Any,  # noqa: ANN401 (a component; their events are made at run time)
    keep: Callable[..., MethodChoice],
    method: gr.State,
    gate: StartGate,
) -> None:
    """Put a field's value into the choice whenever it changes, the last one for sure."""
    gate.at_once(field.change)
    change = field.change(
        keep, [method, field], method, queue=False, trigger_mode="always_last", **QUIET
    )
    gate.after(change.then)


def offered() -> dict[str, Any]:
    """Return the dropdown's update: the plan from Explore, and every other method."""
    from ipmerge_core.methods import METHODS

    rest = [(m.label, m.name) for m in METHODS.values() if not m.needs_analysis]
    update: dict[str, Any] = gr.update(choices=[(EXPLORED_LABEL, EXPLORED), *rest])
    return update


def with_method(choice: MethodChoice, name: str) -> MethodChoice:
    """Return the choice of a method; another's values go, options stay."""
    return choice if name == choice.name else MethodChoice(name, options=choice.options)


def with_value(parameter: str, name: str, choice: MethodChoice, value: Value) -> MethodChoice:
    """Return the choice with one more value; values of another method are left behind.

    >>> with_value("density", "ties", MethodChoice("ties", {"seed": 1}), 0.4).values
    {'seed': 1, 'density': 0.4}
    >>> with_value("math_density", "ties", MethodChoice("ties", {"seed": 1}), " ").values
    {'seed': 1, 'math_density': None}
    >>> with_value("density", "ties", MethodChoice("della", {"seed": 1}), 0.4).name
    'della'
    """
    if name != choice.name:  # an event of a field that is on its way out
        return choice
    read = _number(value) if isinstance(value, str) else value
    return choice._replace(values={**choice.values, parameter: read})


def _number(text: str) -> float | str | None:
    """Read a number from a field that may be left empty; words stay what they are."""
    try:
        return float(text) if text.strip() else None
    except ValueError:
        return text


def with_option(option: str, choice: MethodChoice, value: str) -> MethodChoice:
    """Return the choice with one option set, or left to the method where the text is empty.

    >>> with_option("include", MethodChoice(options={"norms": "merge"}), " mlp ").options
    {'norms': 'merge', 'include': 'mlp'}
    >>> with_option("norms", MethodChoice(options={"norms": "merge"}), "").options
    {}
    """
    rest = {name: text for name, text in choice.options.items() if name != option}
    return choice._replace(options={**rest, option: value.strip()} if value.strip() else rest)


def chosen_plan(pack_id: str, choice: PlanChoice, method: MethodChoice) -> MergePlan:
    """Make the plan of the chosen method, or the one from Explore.

    Raises: PlanError for a value that the method refuses, more experts than it merges, or samples
        that it needs and nobody measured.
    """
    for option in FIELDS:
        if option.kind == "pattern":
            _refuse_slow(method.options.get(option.name, ""))
    options = PlanOptions.read(method.options)
    if method.name == EXPLORED:
        return plan_of(pack_id, choice, options=options)
    from ipmerge_core.methods import find_method
    from ipmerge_core.planning.plan import make_plan

    found, calibration = find_method(method.name), None
    if found.data is not None:
        if not method.calibration:
            raise PlanError(
                f"{found.label} needs a calibration of these models. Choose a finished one above, "
                f"or press Calibrate."
            )
        calibration = method.calibration
    values: dict[str, Any] = dict(method.values)
    analysis = analysis_of(pack_id)
    return make_plan(analysis, method.name, options=options, calibration=calibration, **values)


def _refuse_slow(pattern: str) -> None:
    """Refuse what can take for ever, where strangers write it: repetition."""
    if is_hosted() and re.search(r"[*+?{(]", pattern):
        raise PlanError(
            f"The pattern {pattern[:40]!r} repeats or groups, which is not offered here; expected "
            f"parts of names, as 'mlp|layers\\.0\\.'."
        )


def _field(parameter: Parameter) -> gr.Checkbox | gr.Dropdown | gr.Number | gr.Slider | gr.Textbox:
    """Make the form field that fits a parameter's kind."""
    words = [parameter.bounds.help]
    slides = _slides(parameter)
    if parameter.kind in ("float", "int") and slides is None:
        words.append(parameter.expectation)
    name = parameter.name.rstrip("_")
    common: dict[str, Any] = {
        "label": name.replace("_", " ").replace("mllm", "MLLM"),
        "info": "; ".join(word for word in words if word),
        "value": parameter.default,
        "interactive": True,
        "elem_id": f"parameter-{name.replace('_', '-')}",
    }
    if parameter.kind == "bool":
        return gr.Checkbox(**common)
    if parameter.kind == "choice":
        return gr.Dropdown(list(parameter.choices), **common)
    if parameter.optional:  # a number field cannot be empty
        return gr.Textbox(placeholder="none", **common)
    if slides is not None:
        low, high = slides
        return gr.Slider(low, high, step=_SLIDER_STEP if high <= 1 else 0.05, **common)
    whole = parameter.kind == "int"
    tiny = isinstance(parameter.default, float) and 0 < parameter.default < _SLIDER_STEP
    step = float(parameter.default or 0) if tiny else 1
    return gr.Number(precision=0 if whole else None, step=step, **common)


def _slides(parameter: Parameter) -> tuple[float, float] | None:
    """Say where a slider runs, if one fits: a number that is always there and not tiny."""
    default = parameter.default
    fits = parameter.kind == "float" and not parameter.optional and isinstance(default, float)
    tiny = isinstance(default, float) and 0 < default < _SLIDER_STEP
    return parameter.bounds.slides if fits and not tiny else None


def _option_field(option: Option) -> gr.Dropdown | gr.Textbox:
    common: dict[str, Any] = {
        "label": option.label,
        "info": option.help,
        "elem_id": f"option-{option.name.replace('_', '-')}",
    }
    if not option.choices:
        return gr.Textbox(**common)
    meant = [
        (value if words in (value, "") else f"{value.replace('_', ' ')}: {words}", value)
        for value, words in option.choices.items()
    ]
    if "keep" not in option.choices:  # the method decides where nothing is chosen
        meant = [("the method's own", OWN), *meant]
        return gr.Dropdown(meant, value=OWN, **common)
    return gr.Dropdown(meant, value="keep", **common)
