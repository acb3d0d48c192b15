"""Settings of a fine-tuning: every value is checked by type and range, from code, form and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from ipmerge_core.errors import PlanError
from ipmerge_core.finetuning.scope import Scope
from ipmerge_core.finetuning.settings import DriftSettings, PriorSettings, TrainingSettings
from ipmerge_core.ui.finetune.form import read_form

NAN, INFINITY = float("nan"), float("inf")
WRONG: tuple[Any, ...] = (
    NAN, INFINITY, -INFINITY, -1, 1e308, -1e308, 10**400, "1", "x", [1], {}, (1,), b"1", object(),
)  # fmt: skip
USUAL = {"rule": "adaptive", "modules": ["attn"], "mllm": "a", "math": "b", "data": "demo"}
USUAL |= {"placement": "cpu"}
SCOPES = ("modules", "first_layer", "last_layer", "biases", "strengths")


@pytest.mark.parametrize(
    ("kind", "name"),
    [(TrainingSettings, part.name) for part in fields(TrainingSettings)]
    + [(PriorSettings, part.name) for part in fields(PriorSettings) if part.name != "scope"]
    + [(Scope, name) for name in SCOPES],
)
def test_no_value_of_another_type_or_range_is_a_setting(kind: Callable[..., Any], name: str):
    wrong = [value for value in WRONG if (name, value) != ("strength", -1)]
    for value in wrong:
        with pytest.raises(PlanError):
            kind(**{name: value})


@pytest.mark.parametrize("name", ["max_steps", "batch_size", "accumulation", "seed", "log_every"])
def test_counts_are_integers(name: str):
    for value in (1.5, True, "2"):
        with pytest.raises(PlanError, match="expected an integer from"):
            TrainingSettings(**{name: value})


@pytest.mark.parametrize("value", [NAN, INFINITY, 1e308, -1001, "x", None, True])
def test_a_strength_of_a_module_has_the_range_of_the_strength(value: Any):
    with pytest.raises(PlanError, match="strength of 'mlp' is .*expected a number from -1000"):
        Scope(strengths=(("mlp", value),))
    content = DriftSettings().as_json()
    content["prior"]["scope"]["strengths"] = [["mlp", value]]
    with pytest.raises(PlanError, match="strength of 'mlp'"):
        DriftSettings.from_json(content)


@pytest.mark.parametrize(
    "name",
    [
        "strength", "first_layer", "last_layer", "epochs", "max_steps", "learning_rate", "longest",
        "batch_size", "held_out", "patience", "seed", "accumulation", "warmup", "weight_decay",
        "max_grad_norm", "save_every", "log_every", "most_pixels",
    ],
)  # fmt: skip
def test_a_number_of_the_form_is_checked_like_any(name: str):
    others = {"strength": (-1,), "last_layer": (-1,)}.get(name, ())
    for value in (value for value in WRONG if value not in others):
        with pytest.raises(PlanError):
            read_form({**USUAL, name: value})


@pytest.mark.parametrize("value", ["mlp=nan", "mlp=inf", "mlp=1e308", "mlp", "(=1"])
def test_a_strength_of_the_form_is_checked_like_any(value: str):
    with pytest.raises(PlanError):
        read_form({**USUAL, "strengths": value})


def test_integers_that_a_browser_sends_as_fractions_are_integers():
    asked = read_form({**USUAL, "max_steps": 4.0, "last_layer": 2.0, "limit": 8.0, "patience": 0.0})
    found = asked.settings.training.max_steps, asked.settings.prior.scope.last_layer, asked.limit
    assert found == (4, 2, 8)
    assert all(type(value) is int for value in found)
    assert asked.settings.training.patience is None
    with pytest.raises(PlanError, match=r"batch size is 1\.5; expected an integer"):
        read_form({**USUAL, "batch_size": 1.5})
