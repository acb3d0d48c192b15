"""Convert plans to mergekit recipes, and recipes to arguments of `make_plan`.

In and out: the YAML of mergekit 0.1.5, and arguments of `make_plan`. mergekit merges every tensor
of a model, this package merges decoder matrices: an exported recipe therefore restricts every
weight to names with `_proj.weight` and keeps the first model's other tensors; if a method has no
weight to restrict, a comment in the recipe states it. Settings without a counterpart raise an error
that names them. mergekit does not support multimodal models; a recipe can be run if the MLLM's
tensors have the names of a text model. Opens no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import yaml

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import find_method
from ipmerge_core.planning.plan import MergePlan

MATRICES = "_proj.weight"  # part of the name of every decoder matrix and of no other tensor
_RESCALE = {"l1": True, "none": False}
_UNLIMITED = (
    "# This method has no weight that mergekit could restrict to decoder matrices: it also\n"
    "# merges norms, biases and embeddings.\n"
)


class Recipe(NamedTuple):
    """The models of a recipe, and the other arguments of `make_plan`."""

    mllm: str
    math: list[str]
    base: str | None
    arguments: dict[str, Any]


# --- export ---


def export_recipe(plan: MergePlan) -> str:
    """Convert a plan to a mergekit recipe.

    Raises: PlanError if mergekit has no such method, or cannot express the plan.
    """
    if plan.method not in _WRITERS:
        raise PlanError(
            f"mergekit has no counterpart of {find_method(plan.method).label}. Supported: "
            f"{', '.join(_WRITERS)}."
        )
    _check_expressible(plan)
    text: str = yaml.safe_dump(_WRITERS[plan.method](plan), sort_keys=False)
    return text if MATRICES in text else _UNLIMITED + text


def _check_expressible(plan: MergePlan) -> None:
    kept = [decision.name for decision in plan.decisions if not decision.experts]
    if kept:
        raise PlanError(
            f"The plan keeps {len(kept)} matrices, '{kept[0]}' first; a recipe merges all of them. "
            f"Export a plan without overrides, include or exclude."
        )
    if plan.extras:
        raise PlanError(
            f"The plan also merges {plan.extras[0]}; an exported recipe is restricted to decoder "
            f"matrices. Export a plan that keeps norms and embeddings."
        )
    own = find_method(plan.method).anchor
    if plan.anchor not in ("two_base", "root", own) and not _injects_a_sum(plan):
        raise PlanError(
            f"The plan's anchor is {plan.anchor}; a recipe has one base for all task vectors. "
            f"Export a plan with the anchor {own}."
        )
    if plan.sources.base_mllm is not None:
        raise PlanError("The MLLM has a different base; a recipe has one base for all models.")


def _injects_a_sum(plan: MergePlan) -> bool:
    """Return whether the plan adds sparse task vectors to the MLLM, exported as density 1."""
    elects = plan.method in ("ties", "dare_ties") or plan.parameters.get("elect") is True
    return plan.anchor == "inject" and plan.method in _ELEMENTWISE and not elects


def _write_elementwise(plan: MergePlan) -> dict[str, Any]:
    """Export task vectors with weights, densities and rescaling."""
    p = plan.parameters
    _refuse_unless(plan, election="weighted", trim="exact", scope="tensor", per="tensor")
    host: dict[str, Any] = {"weight": _limited(p["mllm_weight"], 1.0)}
    expert: dict[str, Any] = {"weight": _limited(_graded(plan, "math_weight"), 0.0)}
    if "density" in p:
        whole = 1.0 if _injects_a_sum(plan) else p["mllm_density"]
        for part, own in ((host, whole), (expert, p["math_density"])):
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
    divides = p.get("elect", True) and p.get("normalize", "none") != "none"
    if divides:  # by weights; mergekit does not support count
        _refuse_unless(plan, normalize="weights")
    switches: dict[str, Any] = {"normalize": divides}
    if "scale" in p:
        switches["lambda"] = _limited(p["scale"], 1.0)
    if "rescale" in p:
        if p["rescale"] not in _RESCALE:
            raise PlanError(
                f"The plan rescales {find_method(plan.method).label} by 1 / density; mergekit only "
                f"supports rescale=l1 or none."
            )
        switches["rescale"] = _RESCALE[str(p["rescale"])]
    return switches


def _write_linear(plan: MergePlan) -> dict[str, Any]:
    p = plan.parameters
    if p["mllm_weight"] is None:
        share = cast("float", p["alpha"])
        weights: tuple[Any, Any] = (share, 1.0 - share)
        if plan.options.layer_gains:
            rest = [(1.0 - share) * factor for factor in plan.options.layer_gains]
            weights = ([1.0 - value for value in rest], rest)
    else:
        weights = (p["mllm_weight"], _graded(plan, "math_weight"))
    host, expert = _limited(weights[0], 1.0), _limited(weights[1], 0.0)
    return {
        "merge_method": "linear",
        "models": _models(plan, {"weight": host}, {"weight": expert}),
        "parameters": {"normalize": p["normalize"]},
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
    if plan.options.layer_gains:
        raise PlanError("mergekit's nuslerp has weights and no t to grade. Plan without gains.")
    t = cast("float", plan.parameters["t"])
    recipe: dict[str, Any] = {"merge_method": "nuslerp"}
    if plan.parameters["of"] == "task_vectors":
        recipe["base_model"] = plan.sources.base.id
    host, expert = {"weight": _limited(1.0 - t, 1.0)}, {"weight": _limited(t, 0.0)}
    switches = {"nuslerp_flatten": plan.parameters["per"] == "tensor"}
    if not switches["nuslerp_flatten"]:  # mergekit's row-wise is per column here
        switches["nuslerp_row_wise"] = plan.parameters["per"] == "column"
    return {
        **recipe,
        "models": _models(plan, host, expert),
        "parameters": switches,
        "dtype": "float32",
    }


def _write_sce(plan: MergePlan) -> dict[str, Any]:
    _refuse_unless(plan, mllm_weight=1.0, math_weight=1.0)
    return {
        "merge_method": "sce",
        "base_model": plan.sources.base.id,
        "models": _models(plan, {}, {}),
        "parameters": {"select_topk": plan.parameters["select_topk"]},
        "dtype": "float32",
    }


def _write_karcher(plan: MergePlan) -> dict[str, Any]:
    _refuse_unless(plan, alpha=None)
    return {"merge_method": "karcher", "models": _models(plan, {}, {}), "dtype": "float32"}


_ELEMENTWISE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "della")
_WRITERS: dict[str, Callable[[MergePlan], dict[str, Any]]] = {
    **dict.fromkeys(_ELEMENTWISE, _write_elementwise),
    "linear": _write_linear,
    "slerp": _write_slerp,
    "nuslerp": _write_nuslerp,
    "sce": _write_sce,
    "karcher": _write_karcher,
}


def _models(plan: MergePlan, host: dict[str, Any], expert: dict[str, Any]) -> list[dict[str, Any]]:
    named = [(plan.sources.mllm.id, host), *((math.id, expert) for math in plan.sources.math)]
    return [
        {"model": name, **({"parameters": parameters} if parameters else {})}
        for name, parameters in named
    ]


def _limited(value: Any, rest: float) -> list[dict[str, Any]]:  # noqa: ANN401
    """Restrict a value to decoder matrices, so that other tensors are the first model's."""
    return [{"filter": MATRICES, "value": value}, {"value": rest}]


def _graded(plan: MergePlan, gain: str) -> Any:  # noqa: ANN401
    """Return a gain, or its values from the first layer to the last with layer gains."""
    value = cast("float", plan.parameters[gain])
    return [value * factor for factor in plan.options.layer_gains] or value


def _refuse_unless(plan: MergePlan, **expected: str | float | None) -> None:
    for name, value in expected.items():
        found = plan.parameters.get(name, value)
        if found != value:
            shown = "its default" if value is None else value
            raise PlanError(
                f"mergekit's {plan.method} has no {name}={found}. Plan with {name}={shown}."
            )


# --- import ---


class _Defaults(NamedTuple):
    """Defaults of mergekit 0.1.5."""

    normalize: bool = False
    rescale: bool = False


_DEFAULTS = {
    "task_arithmetic": _Defaults(),
    "ties": _Defaults(normalize=True),
    "dare_ties": _Defaults(rescale=True),
    "dare_linear": _Defaults(rescale=True),
    "breadcrumbs": _Defaults(),
    "della": _Defaults(normalize=True, rescale=True),
    "della_linear": _Defaults(rescale=True),
}
_KNOWN = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")


def import_recipe(text: str) -> Recipe:
    """Read a mergekit recipe of two models (or more experts); the first is the MLLM.

    Raises: PlanError for an invalid recipe, or one that a plan cannot express.
    """
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PlanError(f"The recipe is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict) or "merge_method" not in recipe:
        raise PlanError("This is not a mergekit recipe: it has no merge_method.")
    unknown = sorted(set(recipe) - set(_KNOWN))
    if unknown:
        raise PlanError(f"The recipe has '{unknown[0]}', which a plan cannot express.")
    method = str(recipe["merge_method"])
    ours = "della" if method == "della_linear" else method
    if ours not in _WRITERS:
        raise PlanError(
            f"The method '{method}' of the recipe is not one of: {', '.join(_WRITERS)}."
        )
    names, parts = _read_models(recipe)
    reader = _Reader(method, parts)
    values = _READERS.get(ours, _read_elementwise)(reader)
    reader.refuse_the_rest()
    base = recipe.get("base_model") if ours != "slerp" else None
    if ours == "nuslerp":
        values["of"] = "weights" if base is None else "task_vectors"
    layer_gains = values.pop("layer_gains", ())
    arguments = {"method": ours, **find_method(ours).complete(values)}
    if layer_gains:
        arguments["layer_gains"] = layer_gains
    return Recipe(names[0], names[1:], base, arguments)


def _read_models(recipe: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    base = recipe.get("base_model")
    entries = [entry for entry in recipe.get("models") or [] if isinstance(entry, dict)]
    if recipe["merge_method"] != "slerp":  # there the base is the MLLM
        entries = [entry for entry in entries if entry.get("model") != base]
    elif (
        base is not None
    ):  # the model at t = 0 comes first, regardless of its position in the recipe
        entries.sort(key=lambda entry: entry.get("model") != base)
    if len(entries) < 2 or not all(isinstance(entry.get("model"), str) for entry in entries):
        raise PlanError(
            f"The recipe has {len(entries)} models in addition to its base; a plan requires the "
            f"MLLM and at least one expert."
        )
    shared = dict(recipe.get("parameters") or {})
    parts = [{**shared, **(entry.get("parameters") or {})} for entry in entries]
    if any(part != parts[1] for part in parts[2:]):
        raise PlanError("The experts of a plan share their parameters; those of the recipe differ.")
    return [entry["model"] for entry in entries], parts


class _Reader:
    """Reads values of a recipe and keeps track of unused ones."""

    def __init__(self, method: str, parts: list[dict[str, Any]]) -> None:
        self.method, self.experts = method, len(parts) - 1
        self.parts = [{name: _plain(value) for name, value in p.items()} for p in parts[:2]]
        self.taken = {"int8_mask"}  # the storage of masks does not affect the result

    def both(self, name: str, default: Any = None) -> tuple[Any, Any]:  # noqa: ANN401
        """Return the values of the MLLM and of the experts."""
        self.taken.add(name)
        host, expert = (part.get(name, default) for part in self.parts)
        if host is None or expert is None:
            raise PlanError(
                f"The recipe lacks {name} for some models, which {self.method} requires."
            )
        return host, expert

    def one(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        """Return a value common to all models. Raises: PlanError if they differ."""
        host, expert = self.both(name, default)
        if host != expert:
            raise PlanError(f"The recipe's {name} differs between the models; a plan has one.")
        return host

    def refuse_the_rest(self) -> None:
        """Raise PlanError for an unused value."""
        rest = sorted({name for part in self.parts for name in part} - self.taken)
        if rest:
            raise PlanError(
                f"The recipe's {self.method} has '{rest[0]}', which a plan cannot express."
            )


def _read_elementwise(reader: _Reader) -> dict[str, Any]:
    method = "della" if reader.method == "della_linear" else reader.method
    known = {parameter.name for parameter in find_method(method).parameters}
    defaults = _DEFAULTS[reader.method]
    elects = reader.method in ("ties", "dare_ties", "della")
    host, expert = reader.both("weight")
    graded = isinstance(expert, list)
    values: dict[str, Any] = {
        "mllm_weight": _number("weight", host),
        "math_weight": 1.0 if graded else _number("weight", expert),
    }
    values |= {"layer_gains": _grades(expert)} if graded else {}
    normalize = _switch(reader, "normalize", defaults.normalize)
    rescale = _switch(reader, "rescale", defaults.rescale)
    scale = _number("lambda", reader.one("lambda", 1.0))
    if "rescale" in known:
        values["rescale"] = "l1" if rescale else "none"
    elif rescale:
        raise PlanError(f"The recipe's {reader.method} rescales, which a plan cannot express.")
    if normalize and not elects:  # a normalized sum is a sum with other weights
        scale /= _divisor(reader, host, expert)
    if elects and "normalize" in known:
        values["normalize"] = normalize
    values |= {"elect": elects} if method == "della" else {}
    if "scale" in known:
        values["scale"] = scale
    elif elects and (normalize or scale < 0) and scale != 1:
        raise PlanError(f"The recipe's lambda of {scale:g} has no counterpart in {reader.method}.")
    elif scale != 1:
        values |= {name: values[name] * scale for name in ("mllm_weight", "math_weight")}
    return values | _densities(reader, known)


def _densities(reader: _Reader, known: set[str]) -> dict[str, Any]:
    """Read the density of every model, in mergekit 1 by default."""
    if "density" not in known:
        return {}
    host, expert = reader.both("density", 1.0)
    values = {"density": host}
    if host != expert:
        values = {"density": expert, "mllm_density": host, "math_density": expert}
    silent = {"gamma": 0.01, "epsilon": 0.15}
    return values | {name: reader.one(name, v) for name, v in silent.items() if name in known}


def _divisor(reader: _Reader, host: Any, expert: Any) -> float:  # noqa: ANN401
    total = _number("weight", host) + reader.experts * _number("weight", expert)
    if abs(total) < 1e-8:
        raise PlanError(f"The weights of the recipe's {reader.method} sum to 0.")
    return total


def _read_linear(reader: _Reader) -> dict[str, Any]:
    host, expert = (_number("weight", value) for value in reader.both("weight"))
    if not _switch(reader, "normalize", True):
        return {"mllm_weight": host, "math_weight": expert, "normalize": False}
    share = host / _divisor(reader, host, expert)
    if not 0 <= share <= 1:
        return {"mllm_weight": host, "math_weight": expert}
    return {"alpha": share}


def _read_slerp(reader: _Reader) -> dict[str, Any]:
    t = reader.one("t")
    return {"t": 1.0, "layer_gains": _grades(t)} if isinstance(t, list) else {"t": t}


def _read_nuslerp(reader: _Reader) -> dict[str, Any]:
    host, expert = (_number("weight", value) for value in reader.both("weight"))
    t = 0.5 if abs(host + expert) < 1e-6 else expert / (host + expert)
    flat = _switch(reader, "nuslerp_flatten", True)
    by_column = _switch(reader, "nuslerp_row_wise", False)
    return {"t": t, "per": "tensor" if flat else "column" if by_column else "row"}


def _read_sce(reader: _Reader) -> dict[str, Any]:
    return {"select_topk": reader.one("select_topk", 1.0)}


_READERS: dict[str, Callable[[_Reader], dict[str, Any]]] = {
    "linear": _read_linear,
    "slerp": _read_slerp,
    "nuslerp": _read_nuslerp,
    "sce": _read_sce,
    "karcher": lambda reader: {},
}


def _switch(reader: _Reader, name: str, default: bool) -> bool:
    value = reader.one(name, default)
    if not isinstance(value, bool):
        raise PlanError(f"The recipe's {name} is {value!r}; expected true or false.")
    return value


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return the value for decoder matrices from a list of conditions."""
    conditions = [value] if isinstance(value, dict) else value
    if isinstance(conditions, list) and any(isinstance(part, dict) for part in conditions):
        for part in conditions:
            if isinstance(part, dict) and part.get("filter") in (None, "*", MATRICES):
                return part.get("value")
        raise PlanError(
            f"The recipe restricts a value to '{conditions[0].get('filter')}'; use include and "
            f"exclude of a plan instead."
        )
    return value


def _grades(values: list[Any]) -> tuple[float, ...]:
    return tuple(_number("gradient", value) for value in values)


def _number(name: str, value: Any) -> float:  # noqa: ANN401
    try:
        return float(value)
    except (TypeError, ValueError):
        raise PlanError(f"The recipe's {name} is {value!r}; expected a number.") from None
