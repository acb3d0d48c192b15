"""Build the form of the Merge tab that chooses a method and its parameters.

In: what a user chooses. Out: a `MethodChoice` of plain values that fits in gr.State. The methods
import torch, so the list is filled when the tab is opened, and the fields are created from the
method's signature when it is chosen. Values are checked by `make_plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.planning.options import Option
from ipmerge_core.ui.errors import QUIET
from ipmerge_core.ui.finished_merges import method_label
from ipmerge_core.ui.formula import formula_html
from ipmerge_core.ui.method_choice import EXPLORED, FIELDS, MethodChoice, Value
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.methods import Parameter
    from ipmerge_core.ui.merge.start_gate import StartGate
    from ipmerge_core.ui.runs import Listener

EXPLORED_LABEL = "IP-Merging: the plan from Explore"
_SLIDER_STEP = 0.01
OWN = ""  # the choice that keeps the method's default


class MethodForm(NamedTuple):
    """The parts of the form that are used outside of it."""

    changed: Dependency  # another method was chosen and stored
    data: gr.Column
    options: dict[str, gr.Dropdown | gr.Textbox]  # by name

    def filled(self, how: MethodChoice) -> dict[Any, str]:
        """Return the updates of the option fields that show a choice."""
        usual = {option.name: _unset(option) for option in FIELDS}
        return {field: how.options.get(name, usual[name]) for name, field in self.options.items()}


def method_names() -> gr.Dropdown:
    """Lay out the dropdown of methods; `list_methods` fills it."""
    return gr.Dropdown(
        [(EXPLORED_LABEL, EXPLORED)], value=EXPLORED, label="Method", elem_id="merge-method"
    )


def method_form(
    name: gr.Dropdown,
    method: gr.State,
    gate: StartGate,
    choose: Callable[[Listener], Dependency],
) -> MethodForm:
    """Lay out the method's fields and the options, whose values are stored in `method`.

    Args:
        name: the dropdown made by `method_names`.
        method: holds a MethodChoice.
        gate: disables Start until a change has been checked.
        choose: makes the form's merge the chosen one after an event.
    """
    gate.disable_on(name.change)
    stored = name.change(with_method, [method, name], method, queue=False, **QUIET)
    changed = choose(stored.then)

    @gr.render(inputs=[name, method], triggers=[name.change], show_progress="hidden")  # type: ignore[untyped-decorator]
    def fields(chosen: str, before: MethodChoice) -> None:
        if not chosen:
            return
        from ipmerge_core.methods import METHODS

        found = METHODS.get(chosen)
        if found is None:  # the check says so
            return
        formula = f'<span class="formula-line">{formula_html(found.formula)}</span>'
        gr.HTML(f"<p>{formula} ({as_html(found.source)})</p>", elem_id="method-formula")
        with gr.Row(elem_classes="fields"):
            for parameter in found.parameters:
                keep: Callable[..., MethodChoice] = partial(with_value, parameter.name, chosen)
                values = before.values if before.name == chosen else {}
                value = values.get(parameter.name, parameter.default)
                _keep(_field(parameter, value), keep, method, gate, choose)

    data = gr.Column(elem_id="calibration", visible=False)
    with (
        gr.Accordion("Advanced: scope and anchor", open=False),
        gr.Row(elem_classes="fields"),
    ):
        options = {option.name: _option_field(option) for option in FIELDS}
        for option_name, field in options.items():
            _keep(field, partial(with_option, option_name), method, gate, choose)
    return MethodForm(changed, data, options)


def _keep(
    field: Any,  # noqa: ANN401 (a component; their events are made at run time)
    keep: Callable[..., MethodChoice],
    method: gr.State,
    gate: StartGate,
    choose: Callable[[Listener], Dependency],
) -> None:
    """Store a field's value in the choice whenever it changes; the last value always arrives."""
    gate.disable_on(field.change)
    change = field.change(
        keep, [method, field], method, queue=False, trigger_mode="always_last", **QUIET
    )
    gate.check_after(choose(change.then).then)


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

    >>> with_value("density", "ties", MethodChoice("ties", {"seed": 1}), 0.4).values
    {'seed': 1, 'density': 0.4}
    >>> with_value("math_density", "ties", MethodChoice("ties", {"seed": 1}), " ").values
    {'seed': 1, 'math_density': None}
    >>> with_value("density", "ties", MethodChoice("della", {"seed": 1}), 0.4).name
    'della'
    """
    if name != choice.name:  # an event of a field that is being removed
        return choice
    read = _number(value) if isinstance(value, str) else value
    return choice._replace(values={**choice.values, parameter: read})


def _number(text: str) -> float | str | None:
    """Read a number from a field that may be empty; other text is returned unchanged."""
    try:
        return float(text) if text.strip() else None
    except ValueError:
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


def _field(
    parameter: Parameter, value: Value
) -> gr.Checkbox | gr.Dropdown | gr.Number | gr.Slider | gr.Textbox:
    """Create the form field that fits a parameter's kind."""
    words = [parameter.bounds.help]
    slides = _slides(parameter)
    if parameter.kind in ("float", "int") and slides is None:
        words.append(parameter.expectation)
    name = parameter.name.rstrip("_")
    common: dict[str, Any] = {
        "label": name.replace("_", " ").replace("mllm", "MLLM"),
        "info": "; ".join(word for word in words if word),
        "value": value,
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
        return gr.Textbox(**common)
    meant = [
        (value if words in (value, "") else f"{value.replace('_', ' ')}: {words}", value)
        for value, words in option.choices.items()
    ]
    if "keep" not in option.choices:  # the method decides where nothing is chosen
        meant = [("method default", OWN), *meant]
        return gr.Dropdown(meant, value=OWN, **common)
    return gr.Dropdown(meant, value="keep", **common)
