"""Build the form of the Merge tab that chooses a method and its parameters.

In: what a user chooses. Out: a `MethodChoice` of plain values that fits in gr.State. The methods
import torch, so the list is filled when the tab is opened, and the fields are created from the
method's signature when it is chosen. Values are checked by `make_plan`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.models.catalogue import Preset, load_catalogue
from ipmerge_core.planning.options import Option, shown
from ipmerge_core.ui.errors import QUIET
from ipmerge_core.ui.finished_merges import method_label
from ipmerge_core.ui.formula import formula_html
from ipmerge_core.ui.method_choice import (
    ALSO_IN_EXPLORE,
    DECIDE_DATA,
    EXPLORED,
    EXPLORED_METHOD,
    FIELDS,
    MethodChoice,
    Value,
    option_text,
    parameters_of,
)
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.methods import Parameter
    from ipmerge_core.ui.chosen_merge import ChosenMerge
    from ipmerge_core.ui.merge.start_gate import StartGate
    from ipmerge_core.ui.runs import Listener

EXPLORED_LABEL = "IP-Merging: the plan from Explore"
NO_PRESET = "none: own values"
AS_ANALYSED, AS_IN_EXPLORE = "as in the analysis", "as in Explore"
_SLIDER_STEP = 0.01
_NARROWEST = 260  # pixels of a dropdown with long names, so that two stack on a phone
OWN = ""  # the choice that keeps the method's default


class MethodForm(NamedTuple):
    """The parts of the form that are used outside of it."""

    changed: Dependency  # another method was chosen and stored
    decided: list[Dependency]  # options were stored that decide whether data are needed
    data: gr.Column
    options: dict[str, gr.Dropdown | gr.Textbox]  # by name
    drawn: gr.State  # a number that redraws the method's fields when it changes

    def filled(self, how: MethodChoice) -> dict[Any, str]:
        """Return the updates of the option fields that show a choice."""
        usual = {option.name: _unset(option) for option in FIELDS}
        return {field: how.options.get(name, usual[name]) for name, field in self.options.items()}


def method_names() -> gr.Dropdown:
    """Lay out the dropdown of methods; `list_methods` fills it."""
    return gr.Dropdown(
        [(EXPLORED_LABEL, EXPLORED)],
        value=EXPLORED,
        label="Method",
        elem_id="merge-method",
        min_width=_NARROWEST,
    )


def preset_names() -> gr.Dropdown:
    """Lay out the dropdown of presets: other methods with values that are from somewhere."""
    return gr.Dropdown(
        [(NO_PRESET, OWN), *((preset.name, preset.name) for preset in form_presets())],
        value=OWN,
        label="Preset",
        elem_id="merge-preset",
        min_width=_NARROWEST,
    )


def form_presets() -> list[Preset]:
    """Return the presets of the catalogue for other methods than that of Explore."""
    return [preset for preset in load_catalogue().presets if preset.method != EXPLORED_METHOD]


def preset_choice(preset: Preset) -> MethodChoice:
    """Return what the form holds after a preset; values that are the method's default are left out.

    >>> preset_choice(Preset("", "ties", {"density": 0.2, "norms": "merge"}, "ours", ""))[:2]
    ('ties', {})
    """
    from ipmerge_core.methods import find_method

    found = find_method(preset.method)
    usual = {parameter.name: parameter.default for parameter in found.parameters}
    values = {
        name: value
        for name, value in preset.arguments.items()
        if name in usual and value != usual[name]
    }
    options = {
        name: option_text(value) for name, value in preset.arguments.items() if name not in usual
    }
    return MethodChoice(preset.method, values, options)


def preset_of(how: MethodChoice) -> Preset | None:
    """Return the preset that a choice is, whatever its calibration."""
    if how.name == EXPLORED:
        return None
    own = how._replace(calibration="")
    return next((p for p in form_presets() if preset_choice(p) == own), None)


def with_preset(chosen: ChosenMerge, name: str) -> ChosenMerge:
    """Choose a preset's method with its values and options; without a name nothing changes.

    The calibration stays, for methods that need one.
    """
    found = next((preset for preset in form_presets() if preset.name == name), None)
    if found is None:
        return chosen
    how = preset_choice(found)
    return chosen.with_method(how._replace(calibration=chosen.method.calibration))


def shown_preset(chosen: ChosenMerge) -> tuple[str, str]:
    """Return the preset that the chosen merge is, and its source as HTML."""
    found = preset_of(chosen.method)
    if found is None:
        return OWN, ""
    return found.name, f"<p>{as_html(found.source)}</p>"


def method_form(
    name: gr.Dropdown,
    method: gr.State,
    gate: StartGate,
    choose: Callable[[Listener], Dependency],
    follow: Callable[[Dependency], Dependency],
) -> MethodForm:
    """Lay out the method's fields and the options, whose values are stored in `method`.

    Args:
        name: the dropdown made by `method_names`.
        method: holds a MethodChoice.
        gate: disables Start until a change has been checked.
        choose: makes the form's merge the chosen one after an event.
        follow: shows the calibration that a merge needs, after a value that it depends on.
    """
    gate.disable_on(name.change)
    stored = name.change(with_method, [method, name], method, queue=False, **QUIET)
    changed = choose(stored.then)

    drawn = gr.State(0)
    shows = {"inputs": [name, method], "triggers": [name.change, drawn.change]}

    @gr.render(**shows, show_progress="hidden")  # type: ignore[untyped-decorator]
    def fields(chosen: str | None, before: MethodChoice) -> None:
        from ipmerge_core.methods import METHODS

        chosen = chosen or EXPLORED
        found = METHODS.get(chosen or EXPLORED_METHOD)
        if found is None:  # the check says so
            return
        values = before.values if before.name == chosen else {}
        with _section(chosen, is_open=bool(values)):
            formula = f'<span class="formula-line">{formula_html(found.formula)}</span>'
            gr.HTML(f"<p>{formula} ({as_html(found.source)})</p>", elem_id="method-formula")
            with gr.Row(elem_classes="fields"):
                for parameter in parameters_of(chosen):
                    keep: Callable[..., MethodChoice] = partial(with_value, parameter.name, chosen)
                    field = _field_of(chosen, parameter, values, found.from_analysis)
                    stored = _keep(field, keep, method, gate, choose)
                    if parameter.name in found.decides_data:
                        follow(stored)

    data = gr.Column(elem_id="calibration", visible=False)
    with (
        gr.Accordion("Advanced: scope and anchor", open=False),
        gr.Row(elem_classes="fields"),
    ):
        options = {option.name: _option_field(option) for option in FIELDS}
        kept = {
            name: _keep(field, partial(with_option, name), method, gate, choose)
            for name, field in options.items()
        }
    decided = [kept[name] for name in kept if name in DECIDE_DATA]
    return MethodForm(changed, decided, data, options, drawn)


def _section(chosen: str, *, is_open: bool) -> gr.Column | gr.Accordion:
    """Return the block of a method's fields, folded for the plan from Explore."""
    if chosen != EXPLORED:
        return gr.Column()
    return gr.Accordion("Advanced: parameters not set in Explore", open=is_open)


def _keep(
    field: Any,  # noqa: ANN401 (a component; their events are made at run time)
    keep: Callable[..., MethodChoice],
    method: gr.State,
    gate: StartGate,
    choose: Callable[[Listener], Dependency],
) -> Dependency:
    """Store a field's value in the choice whenever it is entered; the last one always arrives."""
    entered = _entered(field)
    gate.disable_on(partial(gr.on, entered))
    stored = gr.on(
        entered,
        keep,
        [method, field],
        method,
        queue=False,
        trigger_mode="always_last",
        **QUIET,
    )
    chosen = choose(stored.then)
    gate.check_after(chosen.then)
    return chosen


def _entered(field: Any) -> list[Any]:  # noqa: ANN401 (as in `_keep`)
    """Return the events of a field after which a visitor has entered a value.

    `change` also occurs when a field has been drawn, for each with a check of the pair; but only
    `change` follows a text that was pasted, and only `release` the button that resets a slider.
    """
    if isinstance(field, gr.Textbox):
        return [field.change]
    return [field.input, field.release] if isinstance(field, gr.Slider) else [field.input]


def named_choices(name: str) -> dict[str, Any]:
    """Return the update of the dropdown that selects a method before all of them are listed."""
    rest = [(method_label(name), name)] if name else []
    update: dict[str, Any] = gr.update(choices=[(EXPLORED_LABEL, EXPLORED), *rest], value=name)
    return update


def list_methods() -> dict[str, Any]:
    """Return the update of the dropdown: the plan from Explore and every other method."""
    from ipmerge_core.methods import METHODS

    rest = [(m.label, m.name) for m in METHODS.values() if not m.needs_analysis]
    update: dict[str, Any] = gr.update(choices=[(EXPLORED_LABEL, EXPLORED), *rest])
    return update


def with_method(choice: MethodChoice, name: str | None) -> MethodChoice:
    """Return the choice with another method: values are reset, options stay."""
    name = name or EXPLORED  # a dropdown can be left empty
    return choice if name == choice.name else MethodChoice(name, options=choice.options)


def with_value(parameter: str, name: str, choice: MethodChoice, value: Value) -> MethodChoice:
    """Return the choice with one value set; a value of another method is ignored.

    A method's default is not stored; nor is, for the plan from Explore, the value of the analysis.

    >>> with_value("density", "ties", MethodChoice("ties", {"seed": 1}), 0.4).values
    {'seed': 1, 'density': 0.4}
    >>> with_value("math_density", "ties", MethodChoice("ties", {"math_density": 0.1}), " ").values
    {}
    >>> with_value("density", "ties", MethodChoice("della", {"seed": 1}), 0.4).name
    'della'
    >>> with_value("rank", EXPLORED, MethodChoice(values={"rank": 8, "top_k": 4}), "").values
    {'top_k': 4}
    """
    if name != choice.name:  # an event of a field that is being removed
        return choice
    known = {each.name: each for each in parameters_of(name)}[parameter]
    is_number = known.kind in ("float", "int")
    read = _number(value) if is_number and isinstance(value, str) else value
    rest = {other: kept for other, kept in choice.values.items() if other != parameter}
    usual = (OWN, None) if name == EXPLORED else (known.default,)
    return choice._replace(values=rest if read in usual else {**rest, parameter: read})


def _number(text: str) -> float | int | str | None:
    """Read a number from a field that may be empty or "none"; other text is returned unchanged."""
    if text.strip().lower() in ("", "none"):
        return None
    for read in (int, float):
        with contextlib.suppress(ValueError):
            return read(text)
    return text


def with_option(option: str, choice: MethodChoice, value: str | None) -> MethodChoice:
    """Return the choice with one option set, or removed if the text is empty.

    >>> with_option("include", MethodChoice(options={"norms": "merge"}), " mlp ").options
    {'norms': 'merge', 'include': 'mlp'}
    >>> with_option("norms", MethodChoice(options={"norms": "merge"}), "").options
    {}
    """
    rest = {name: text for name, text in choice.options.items() if name != option}
    value = (value or "").strip()
    return choice._replace(options={**rest, option: value} if value else rest)


def _field_of(
    chosen: str, parameter: Parameter, values: Mapping[str, Value], from_analysis: Sequence[str]
) -> gr.Component:
    """Create the field of a parameter: with a value of its own, of the analysis or of Explore."""
    if chosen == EXPLORED and parameter.name in from_analysis:
        return _inherited_field(parameter, values)
    if chosen == EXPLORED and parameter.name == ALSO_IN_EXPLORE:
        return _inherited_field(parameter, values, AS_IN_EXPLORE)
    return _field(parameter, values)


def _inherited_field(
    parameter: Parameter, values: Mapping[str, Value], usual: str = AS_ANALYSED
) -> gr.Dropdown | gr.Textbox:
    """Create the field of a parameter whose default is the value of the analysis, or another."""
    common: dict[str, Any] = {
        "label": parameter.name.rstrip("_").replace("_", " "),
        "info": f"{parameter.bounds.help}; {parameter.expectation}",
        "interactive": True,
        "elem_id": f"parameter-{parameter.name.rstrip('_').replace('_', '-')}",
    }
    given = shown(values[parameter.name]) if parameter.name in values else OWN
    if parameter.kind == "choice":
        choices = [(usual, OWN), *((choice, choice) for choice in parameter.choices)]
        return gr.Dropdown(choices, value=given, **common)
    return gr.Textbox(given, placeholder=usual, **common)


def _field(
    parameter: Parameter, values: Mapping[str, Value]
) -> gr.Checkbox | gr.Dropdown | gr.Number | gr.Slider | gr.Textbox:
    """Create the form field that fits a parameter's kind, with its stored value or the default."""
    words = [parameter.bounds.help]
    slides = _slides(parameter)
    if parameter.kind in ("float", "int") and slides is None:
        words.append(parameter.expectation)
    name = parameter.name.rstrip("_")
    common: dict[str, Any] = {
        "label": name.replace("_", " ").replace("mllm", "MLLM"),
        "info": "; ".join(word for word in words if word),
        "value": values.get(parameter.name, parameter.default),
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
    """Return the range of a slider if one fits: for a required number that is not tiny."""
    default = parameter.default
    fits = parameter.kind == "float" and not parameter.optional and isinstance(default, float)
    tiny = isinstance(default, float) and 0 < default < _SLIDER_STEP
    return parameter.bounds.slides if fits and not tiny else None


def _unset(option: Option) -> str:
    """Return the value of a field whose option is not set."""
    return "keep" if "keep" in option.choices else OWN


def _option_field(option: Option) -> gr.Dropdown | gr.Textbox:
    common: dict[str, Any] = {
        "label": option.label,
        "info": option.help,
        "elem_id": f"option-{option.name.replace('_', '-')}",
    }
    if not option.choices:
        return gr.Textbox("", **common)
    meant = [
        (value if words in (value, "") else f"{value.replace('_', ' ')}: {words}", value)
        for value, words in option.choices.items()
    ]
    if "keep" not in option.choices:  # the method decides where nothing is chosen
        meant = [("method default", OWN), *meant]
        return gr.Dropdown(meant, value=OWN, **common)
    return gr.Dropdown(meant, value="keep", **common)
