"""Plans as mergekit recipes, and two-model recipes as arguments of a plan.

In and out: the YAML of mergekit 0.1.5, and what `make_plan` takes. mergekit merges every tensor of
a model, we merge decoder matrices: an exported recipe therefore limits every weight to names with
`_proj.weight` and leaves the rest to the first model. What one side cannot say is refused by name.
mergekit does not know multimodal models; a recipe runs where the MLLM's files have the names of a
text model. No model is opened here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import yaml

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import find_method
from ipmerge_core.plan import MergePlan

MATRICES = "_proj.weight"  # part of the name of every decoder matrix and of nothing else
_ELEMENTWISE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "della")
_RESCALE = {"l1": True, "none": False}


class Recipe(NamedTuple):
    """The models a recipe names, and what to give to `make_plan` beside them."""

    mllm: str
    math: list[str]
    base: str | None
    arguments: dict[str, Any]


# --- out ---


def export_recipe(plan: MergePlan) -> str:
    """Write a plan as a mergekit recipe.

    Raises: PlanError when mergekit has no such method, or cannot say what the plan says.
    """
    if plan.method not in _WRITERS:
        raise PlanError(
            f"mergekit has no counterpart of {find_method(plan.method).label}. It has: "
            f"{', '.join(_WRITERS)}."
        )
    _check_expressible(plan)
    text: str = yaml.safe_dump(_WRITERS[plan.method](plan), sort_keys=False)
    return text


def _check_expressible(plan: MergePlan) -> None:
    kept = [decision.name for decision in plan.decisions if not decision.experts]
    if kept:
        raise PlanError(
            f"The plan keeps {len(kept)} matrices, '{kept[0]}' first; a recipe merges all of them. "
            f"Export a plan without overrides, include or exclude."
        )
    if plan.beside:
        raise PlanError(
            f"The plan also merges {plan.beside[0]}; an exported recipe limits itself to decoder "
            f"matrices. Export a plan that keeps norms and embeddings."
        )
    if plan.anchor in ("inject", "interp"):
        raise PlanError(
            f"The plan's anchor is {plan.anchor}; a recipe measures every change from one base. "
            f"Export a plan with the anchor two_base."
        )
    if plan.sources.base_mllm is not None:
        raise PlanError("The MLLM has a base of its own; a recipe has one base for all models.")


def _write_elementwise(plan: MergePlan) -> dict[str, Any]:
    """Task vectors with weights, and whatever thins them out."""
    p = plan.parameters
    _refuse_unless(plan, election="weighted", trim="exact", scope="tensor", per="tensor")
    host: dict[str, Any] = {"weight": _limited(p["mllm_weight"], 1.0)}
    expert: dict[str, Any] = {"weight": _limited(_graded(plan, "math_weight"), 0.0)}
    if "density" in p:
        for part, own in ((host, p.get("mllm_density")), (expert, p.get("math_density"))):
            part["density"] = _limited(p["density"] if own is None else own, 1.0)
    for part in (host, expert):
        part |= {name: _limited(p[name], 0.0) for name in ("gamma", "epsilon") if name in p}
    return {
        "merge_method": "della_linear" if p.get("elect") is False else plan.method,
        "base_model": plan.sources.base.id,
        "models": _models(plan, host, expert),
        "parameters": _switches(plan),
        "dtype": "float32",
    }


def _switches(plan: MergePlan) -> dict[str, Any]:
    p = plan.parameters
    switches: dict[str, Any] = {"normalize": p.get("normalize", False)}
    if "scale" in p:
        switches["lambda"] = _limited(p["scale"], 1.0)
    if "rescale" in p:
        if p["rescale"] not in _RESCALE:
            raise PlanError(
                f"{find_method(plan.method).label} rescales by 1 / density here; mergekit rescales "
                f"by the ratio of absolute sums or not at all. Plan with rescale=l1 or none."
            )
        switches["rescale"] = _RESCALE[str(p["rescale"])]
    return switches


def _write_linear(plan: MergePlan) -> dict[str, Any]:
    share = float(plan.parameters["alpha"] or 0.0)
    host = {"weight": _limited(share, 1.0)}
    return {
        "merge_method": "linear",
        "models": _models(plan, host, {"weight": _limited(1.0 - share, 0.0)}),
        "parameters": {"normalize": True},
        "dtype": "float32",
    }


def _write_slerp(plan: MergePlan) -> dict[str, Any]:
    return {
        "merge_method": "slerp",
        "base_model": plan.sources.mllm.id,  # mergekit's name for the end at t = 0
        "models": _models(plan, {}, {}),
        "parameters": {"t": _limited(_graded(plan, "t"), 0.0)},
        "dtype": "float32",
    }


def _write_nuslerp(plan: MergePlan) -> dict[str, Any]:
    _refuse_unless(plan, per="tensor")
    t = float(plan.parameters["t"] or 0.0)
    recipe: dict[str, Any] = {"merge_method": "nuslerp"}
    if plan.parameters["of"] == "task_vectors":
        recipe["base_model"] = plan.sources.base.id
    host, expert = {"weight": _limited(1.0 - t, 1.0)}, {"weight": _limited(t, 0.0)}
    return {**recipe, "models": _models(plan, host, expert), "dtype": "float32"}


_WRITERS: dict[str, Callable[[MergePlan], dict[str, Any]]] = {
    **dict.fromkeys(_ELEMENTWISE, _write_elementwise),
    "linear": _write_linear,
    "slerp": _write_slerp,
    "nuslerp": _write_nuslerp,
}


def _models(plan: MergePlan, host: dict[str, Any], expert: dict[str, Any]) -> list[dict[str, Any]]:
    named = [(plan.sources.mllm.id, host), *((math.id, expert) for math in plan.sources.math)]
    return [
        {"model": name, **({"parameters": parameters} if parameters else {})}
        for name, parameters in named
    ]


def _limited(value: Any, rest: float) -> list[dict[str, Any]]:  # noqa: ANN401
    """A value for decoder matrices, and what leaves every other tensor to the first model."""
    return [{"filter": MATRICES, "value": value}, {"value": rest}]


def _graded(plan: MergePlan, gain: str) -> Any:  # noqa: ANN401
    """A gain, or its values from the first layer to the last where the plan grades it."""
    value = float(plan.parameters[gain] or 0.0)
    if not plan.layer_gains:
        return value
    if find_method(plan.method).gains[-1] != gain:
        raise PlanError(f"Layer gains act on another parameter than '{gain}' here.")
    return [value * factor for factor in plan.layer_gains]


def _refuse_unless(plan: MergePlan, **expected: str) -> None:
    for name, value in expected.items():
        found = plan.parameters.get(name, value)
        if found != value:
            raise PlanError(
                f"mergekit's {plan.method} has no {name}={found}. Plan with {name}={value}."
            )


# --- in ---


def import_recipe(text: str) -> Recipe:
    """Read a mergekit recipe of two models (or more experts): the first is the host, our MLLM.

    Raises: PlanError for what is no recipe, or says what a plan cannot say.
    """
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PlanError(f"This is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict) or "merge_method" not in recipe:
        raise PlanError("This is no mergekit recipe: it has no merge_method.")
    unknown = sorted(set(recipe) - {*_KNOWN, "dtype", "out_dtype"})
    if unknown:
        raise PlanError(f"The recipe has '{unknown[0]}', which a plan cannot say.")
    method = str(recipe["merge_method"])
    ours = "della" if method == "della_linear" else method
    if ours not in _WRITERS:
        raise PlanError(f"The recipe's '{method}' is not one of: {', '.join(_WRITERS)}.")
    names, parts = _read_models(recipe)
    values = _read_values(ours, parts, dict(recipe.get("parameters") or {}))
    if ours == "della":
        values["elect"] = method == "della"
    layer_gains = values.pop("layer_gains", ())
    arguments = {"method": ours, **find_method(ours).complete(values)}
    if layer_gains:
        arguments["layer_gains"] = layer_gains
    base = recipe.get("base_model") if ours != "slerp" else None
    return Recipe(names[0], names[1:], base, arguments)


_KNOWN = ("merge_method", "base_model", "models", "parameters")


def _read_models(recipe: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    base = recipe.get("base_model")
    entries = [entry for entry in recipe.get("models") or [] if isinstance(entry, dict)]
    if recipe["merge_method"] != "slerp":  # there the base is the host
        entries = [entry for entry in entries if entry.get("model") != base]
    if len(entries) < 2 or not all(isinstance(entry.get("model"), str) for entry in entries):
        raise PlanError(
            f"The recipe names {len(entries)} models beside its base; a plan needs the MLLM and at "
            f"least one expert."
        )
    parts = [dict(entry.get("parameters") or {}) for entry in entries]
    if any(part != parts[1] for part in parts[2:]):
        raise PlanError("The experts of a plan share their parameters; those of the recipe differ.")
    return [entry["model"] for entry in entries], parts


def _read_values(
    method: str, parts: list[dict[str, Any]], shared: dict[str, Any]
) -> dict[str, Any]:
    host, expert = ({name: _plain(value) for name, value in part.items()} for part in parts[:2])
    shared = {name: _plain(value) for name, value in shared.items()}
    if method in ("linear", "nuslerp"):
        total = host["weight"] + expert["weight"]
        if not total:
            raise PlanError("The recipe's weights add up to 0.")
        share = expert["weight"] / total
        return {"alpha": 1 - share} if method == "linear" else {"t": share}
    if method == "slerp":
        return _with_grades("t", shared["t"])
    known = {parameter.name for parameter in find_method(method).parameters}
    values = {"mllm_weight": host.get("weight", 1.0)}
    values |= _with_grades("math_weight", expert.get("weight", 1.0))
    densities = [part["density"] for part in (host, expert) if "density" in part]
    if densities and "mllm_density" in known:
        values |= {"mllm_density": host.get("density"), "math_density": expert.get("density")}
    elif densities:
        values["density"] = densities[-1]
    values |= {name: expert[name] for name in ("gamma", "epsilon") if name in expert}
    values |= {"normalize": shared["normalize"]} if "normalize" in shared else {}
    values |= {"scale": shared["lambda"]} if "lambda" in shared else {}
    if "rescale" in known:
        values["rescale"] = "l1" if shared.get("rescale", True) else "none"
    return {name: v for name, v in values.items() if name in known or name == "layer_gains"}


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Take the value for decoder matrices out of a list of conditions."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("filter") in (None, MATRICES):
                return part["value"]
        raise PlanError(
            f"The recipe limits a value to '{value[0].get('filter')}'; a plan says that with "
            f"include and exclude."
        )
    return value


def _with_grades(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401
    """A gain that the recipe grades over the layers becomes a gain of 1 and layer gains."""
    if isinstance(value, list):
        return {name: 1.0, "layer_gains": tuple(float(v) for v in value)}
    return {name: float(value)}
