"""Lay out the form of the Fine-tune tab, and read its values.

In: the settings of `finetuning.settings`, whose defaults the fields show. Out: the components, and
the `Asked` that their values describe. The usual fields are shown, the others under Advanced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import PlanError
from ipmerge_core.finetuning.scope import PRESETS, SETS, Scope
from ipmerge_core.finetuning.settings import (
    PLACEMENT_NAMES,
    PRECISIONS,
    TRAINED,
    DriftSettings,
    PriorSettings,
    TrainingSettings,
)
from ipmerge_core.ui.device_choice import device_field

RULES = {
    "adaptive": "adaptive",
    "grad_norm": "grad_norm",
    "absolute": "absolute",
    "none": "none: plain fine-tuning",
}
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
_USUAL = TrainingSettings()
_NUMBERS = {  # field of TrainingSettings -> label, information, whether it is an integer
    "epochs": ("Epochs", "Passes over the data", False),
    "max_steps": ("Optimizer steps", "Instead of epochs; 0 for none", True),
    "learning_rate": ("Learning rate", "Peak", False),
    "batch_size": ("Batch size", "Conversations of a micro-batch", True),
    "held_out": ("Held-out share", "0 to 0.5, to evaluate the loss on", False),
    "patience": ("Patience", "Evaluations without a lower held-out loss; 0 for none", True),
    "seed": ("Seed", "Of the order of the data", True),
}
_MORE_NUMBERS = {
    "accumulation": ("Accumulation", "Micro-batches of an optimizer step", True),
    "warmup": ("Warmup", "Share of the steps in which the learning rate rises", False),
    "weight_decay": ("Weight decay", "Of AdamW", False),
    "max_grad_norm": ("Maximum gradient norm", "After the rule; 0 for none", False),
    "save_every": ("Save every", "Steps between checkpoints; 0 for an epoch", True),
    "log_every": ("Log every", "Steps between points of the curves", True),
    "longest": ("Maximum number of tokens", "Longer conversations are skipped", True),
    "most_pixels": ("Maximum number of pixels", "Larger images are scaled down", True),
}
_OPTIONAL = ("max_steps", "patience", "save_every")


class Asked(NamedTuple):
    """What to fine-tune: models, data, output and settings, as they were typed."""

    mllm: str
    math: str
    data: str
    limit: int | None
    name: str
    math_base: str | None
    device: str
    force: bool
    settings: DriftSettings


class Form(NamedTuple):
    """The components of the form; `inputs` are all of them by the name of their value."""

    inputs: Mapping[str, Any]
    check: gr.Button
    found: gr.HTML
    start: gr.Button

    @property
    def fields(self) -> list[Any]:
        """The inputs of `read_form`."""
        return list(self.inputs.values())

    def read(self, values: Sequence[Any]) -> Asked:
        """Return what the values describe. Raises: PlanError."""
        return read_form(dict(zip(self.inputs, values, strict=True)))


def lay_out_form() -> Form:
    """Lay out the form in the open block."""
    inputs: dict[str, Any] = {}
    with gr.Row(elem_classes="fields"):
        inputs |= _models()
    with gr.Row(elem_classes="fields"):
        inputs |= _prior()
        inputs |= {name: _number(name, *about) for name, about in _NUMBERS.items()}
    with gr.Accordion("Advanced", open=False, elem_id="finetune-advanced"):
        with gr.Row(elem_classes="fields"):
            inputs |= _more_prior()
        with gr.Row(elem_classes="fields"):
            inputs |= {name: _number(name, *about) for name, about in _MORE_NUMBERS.items()}
            inputs |= _more_training()
    with gr.Row(elem_classes="run-row"):
        check = gr.Button("Check", elem_id="check-finetune")
        start = gr.Button(
            "Start fine-tuning", variant="primary", interactive=False, elem_id="start-finetune"
        )
    found = gr.HTML("", elem_id="finetune-found")
    return Form(inputs, check, found, start)


def _text(name: str, label: str, info: str, value: str = "") -> gr.Textbox:
    return gr.Textbox(value, label=label, info=info, max_lines=1, elem_id=_id(name))


def _number(name: str, label: str, info: str, whole: bool) -> gr.Number:
    return gr.Number(
        getattr(_USUAL, name) or 0,
        label=label,
        info=info,
        precision=0 if whole else None,
        elem_id=_id(name),
    )


def _choice(name: str, label: str, choices: Sequence[Any], value: str) -> gr.Dropdown:
    return gr.Dropdown(list(choices), value=value, label=label, elem_id=_id(name))


def _tick(name: str, label: str, info: str, value: bool = False) -> gr.Checkbox:
    return gr.Checkbox(value, label=label, info=info, elem_id=_id(name))


def _id(name: str) -> str:
    return f"finetune-{name.replace('_', '-')}"


def _models() -> dict[str, Any]:
    return {
        "mllm": _text("mllm", "Vision-language model", "Folder; that of the pair by default"),
        "math": _text("math", "Expert", "Folder or hub id that the prior leads to"),
        "data": _text(
            "data", "Data", "demo, demo:TASKS, datasets:NAME:SPLIT, or a jsonl file", "demo"
        ),
        "limit": gr.Number(
            0, label="Rows", info="Only the first; 0 for all", precision=0,
            elem_id=_id("limit"),
        ),
        "name": _text("name", "Output folder", "A name, or an absolute path; empty for a new name"),
        "device": device_field(_id("device"), "Device of the training"),
    }  # fmt: skip


def _prior() -> dict[str, Any]:
    rules = [(label, name) for name, label in RULES.items()]
    return {
        "rule": _choice("rule", "Rule", rules, PriorSettings().rule),
        "strength": gr.Number(
            PriorSettings().strength,
            label="Strength",
            info="1 is the paper's alpha = -1",
            elem_id=_id("strength"),
        ),
        "modules": gr.Dropdown(
            [*SETS, *PRESETS],
            value=list(Scope().modules),
            multiselect=True,
            allow_custom_value=True,
            label="Modules of the prior",
            info="Also re:PATTERN",
            elem_id=_id("modules"),
        ),
    }


def _more_prior() -> dict[str, Any]:
    return {
        "math_base": _text("math_base", "Base of the expert", "Prior expert - base instead"),
        "first_layer": gr.Number(
            0, label="First layer", info="Layers before it have no prior", precision=0,
            elem_id=_id("first_layer"),
        ),
        "last_layer": gr.Number(
            -1, label="Last layer", info="-1 for the last of the model", precision=0,
            elem_id=_id("last_layer"),
        ),
        "strengths": _text(
            "strengths", "Strengths per module", "PATTERN=STRENGTH, separated by spaces"
        ),
        "placement": _choice("placement", "Keep the prior on", PLACEMENT_NAMES, "cpu"),
        "biases": _tick("biases", "Biases", "Those of the modules have a prior", value=True),
        "per_micro_batch": _tick(
            "per_micro_batch", "Per micro-batch", "Act on every backward pass, as the authors' code"
        ),
        "normalize": _tick(
            "normalize", "Normalize the prior", "To the norm of each weight (absolute rule)"
        ),
    }  # fmt: skip


def _more_training() -> dict[str, Any]:
    return {
        "precision": _choice("precision", "Precision", PRECISIONS, _USUAL.precision),
        "trained": _choice("trained", "Trained part", TRAINED, _USUAL.trained),
        "schedule": _choice("schedule", "Schedule", SCHEDULES, _USUAL.schedule),
        "tokens": _text("tokens", "Added tokens", "Such as <think>, separated by spaces"),
        "gradient_checkpointing": _tick(
            "gradient_checkpointing", "Gradient checkpointing", "Less memory for more computing"
        ),
        "force": _tick(
            "force", "Start anyway", "Although memory does not suffice, or models seem unrelated"
        ),
    }


def read_form(values: Mapping[str, Any]) -> Asked:
    """Return what the values of the form describe. Raises: PlanError.

    >>> usual = {"rule": "adaptive", "modules": ["attn"], "first_layer": 0, "epochs": 2}
    >>> asked = read_form({**usual, "mllm": "a", "math": "b", "data": "demo", "placement": "cpu"})
    >>> asked.settings.training.epochs, asked.settings.prior.scope.modules
    (2, ('attn',))
    """
    typed = {name: str(values.get(name) or "").strip() for name in ("mllm", "math", "data")}
    missing = [name for name, value in typed.items() if not value]
    if missing:
        names = {"mllm": "vision-language model", "math": "expert", "data": "data"}
        raise PlanError(f"Missing: {', '.join(names[name] for name in missing)}.")
    modules = values.get("modules") or ()
    scope = Scope(
        tuple(modules) if isinstance(modules, list) else modules,
        _number_of(values, "first_layer", 0),
        _last(_number_of(values, "last_layer", -1)),
        bool(values.get("biases", True)),
        tuple(map(_strength, str(values.get("strengths") or "").split())),
    )
    prior = PriorSettings(
        rule=values["rule"],
        strength=_number_of(values, "strength", PriorSettings().strength),
        scope=scope,
        per_micro_batch=bool(values.get("per_micro_batch")),
        normalize=bool(values.get("normalize")),
        placement=values["placement"],
    )
    return Asked(
        **typed,
        limit=_number_of(values, "limit", None),
        name=str(values.get("name") or "").strip(),
        math_base=str(values.get("math_base") or "").strip() or None,
        device=str(values.get("device") or "auto"),
        force=bool(values.get("force")),
        settings=DriftSettings(prior, _training(values)),
    )


def _training(values: Mapping[str, Any]) -> TrainingSettings:
    found: dict[str, Any] = {}
    for name in _NUMBERS | _MORE_NUMBERS:
        default = None if name in _OPTIONAL else getattr(_USUAL, name)
        found[name] = _number_of(values, name, default)
    for name in ("precision", "trained", "schedule"):
        found[name] = values.get(name) or getattr(_USUAL, name)
    return TrainingSettings(
        **found,
        gradient_checkpointing=bool(values.get("gradient_checkpointing")),
        tokens=tuple(str(values.get("tokens") or "").split()),
    )


def _number_of(values: Mapping[str, Any], name: str, otherwise: Any) -> Any:  # noqa: ANN401
    """Return a number of the form as the settings expect it, which check its type and range.

    Integers are fractions in JSON of some browsers. An empty field, and 0 where it stands for no
    number, are the default.
    """
    value = values.get(name)
    if value is None or value == "" or (otherwise is None and value == 0):
        return otherwise
    is_integer = isinstance(value, float) and value.is_integer()
    return int(value) if is_integer and abs(value) < 2**53 else value


def _last(value: Any) -> Any:  # noqa: ANN401
    """Return a layer; None for -1 and an empty field."""
    return None if value is None or value == -1 else value


def _strength(text: str) -> tuple[str, float]:
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, float(value)
    except ValueError:
        raise PlanError(
            f"'{text[:80]}' is no strength of a module; expected PATTERN=STRENGTH, such as mlp=0.5."
        ) from None
