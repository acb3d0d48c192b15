"""Export plans as mergekit recipes; `mergekit_import` reads recipes.

In: a plan. Out: the YAML of mergekit 0.1.5. mergekit merges every tensor of a model, this package
merges decoder matrices: a recipe therefore restricts every weight to names with `_proj.weight` and
keeps the first model's other tensors; if a method has no weight to restrict, a comment in the
recipe states it. Settings without a counterpart raise an error that names them. mergekit does not
support multimodal models; a recipe can be run if the MLLM's tensors have the names of a text model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from ipmerge_core.analysis.records import Source
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import find_method
from ipmerge_core.models.weight_files import is_adapter
from ipmerge_core.planning.plan import MergePlan

MATRICES = "_proj.weight"  # part of the name of every decoder matrix and of no other tensor
_RESCALE = {"l1": True, "none": False}
_UNLIMITED = (
    "# This method has no weight that mergekit could restrict to decoder matrices: it also\n"
    "# merges norms, biases and embeddings.\n"
)
_RANDOM = (
    "# The elements to drop are random; mergekit draws them with --random-seed, and this package\n"
    "# from the plan's seed and the names of the matrices.\n"
)


def export_recipe(plan: MergePlan) -> str:
    """Convert a plan to a mergekit recipe.

    Raises: PlanError if mergekit has no such method, or cannot express the plan.
    """
    if plan.method not in WRITERS:
        raise PlanError(
            f"mergekit has no counterpart of {find_method(plan.method).label}. Supported: "
            f"{', '.join(WRITERS)}."
        )
    _check_expressible(plan)
    text: str = yaml.dump(WRITERS[plan.method](plan), Dumper=_Dumper, sort_keys=False)
    notes = "" if MATRICES in text else _UNLIMITED
    return notes + (_RANDOM if "seed" in plan.parameters else "") + text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types
    """Writes equal parts out instead of as aliases, which `mergekit_import` does not read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _check_expressible(plan: MergePlan) -> None:
    named = [d.name for d in plan.selected if MATRICES not in d.name or "[" in d.name]
    if named:
        raise PlanError(
            f"The plan merges '{named[0]}'; a recipe is restricted to names with '{MATRICES}'. "
            f"Merge these models with IPMerge instead."
        )
    if plan.options.modules != "projections":
        raise PlanError(
            f"The plan has modules={plan.options.modules}; a recipe is restricted to names with "
            f"'{MATRICES}'. Export a plan with modules=projections."
        )
    kept = [d.name for d in plan.decisions if not d.experts and MATRICES in d.name]
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
    if plan.options.layer_profile != "all" or plan.options.input_share < 1:
        name = "layer_profile" if plan.options.layer_profile != "all" else "input_share"
        raise PlanError(
            f"The plan has the {name} {getattr(plan.options, name)}, which a recipe cannot "
            f"express. Export a plan without it."
        )
    if plan.options.layer_gains and not _has_grades(plan):
        raise PlanError(
            f"The plan has layer gains, which scale the change of every matrix; a recipe can only "
            f"grade the weight of a model, which is not the same for "
            f"{find_method(plan.method).label} with these parameters. Export a plan without layer "
            f"gains."
        )
    if plan.sources.base_mllm is not None:
        raise PlanError("The MLLM has a different base; a recipe has one base for all models.")
    if "seed" in plan.parameters:
        default = find_method(plan.method).complete({})["seed"]
        _refuse_unless(plan, seed=default)
    for source in plan.sources.all():
        _reference(source)


def _reference(source: Source) -> str:
    """Return a model as mergekit writes it: a path or a hub id, pinned by `@revision`.

    Raises: PlanError for an adapter in a folder, and for a path with a character that mergekit
        reads as a revision or an adapter.
    """
    folder = Path(source.id)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if source.revision is None and is_adapter(names):
        raise PlanError(
            f"'{source.id}' is a LoRA adapter, and a recipe needs a whole model: merge it into its "
            f"base first (merge_and_unload)."
        )
    if source.revision is None and set(source.id) & set("@+"):
        raise PlanError(
            f"mergekit cannot read the path '{source.id}': it reads '@' as a revision and '+' as "
            f"an adapter. Rename or move the folder."
        )
    return source.location


def _has_grades(plan: MergePlan) -> bool:
    """Return whether mergekit's graded weights have the effect of the plan's layer gains."""
    if plan.method == "linear":
        return plan.parameters["mllm_weight"] is None
    whole = {"mllm_density": 1.0} if _injects_a_sum(plan) else {}
    return plan.method == "slerp" or grades_the_change(plan.method, {**plan.parameters, **whole})


def grades_the_change(method: str, parameters: Mapping[str, Any]) -> bool:
    """Return whether the change of a matrix is proportional to the experts' weight.

    It is for a plain sum to which the MLLM's task vector is added unchanged.
    """
    if method not in _ELEMENTWISE or method in ("ties", "dare_ties") or parameters.get("elect"):
        return False
    density = parameters.get("mllm_density")
    density = parameters.get("density", 1.0) if density is None else density
    return bool(parameters["mllm_weight"] == parameters.get("scale", 1.0) == density == 1)


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
        "base_model": _reference(plan.sources.base),
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
        "base_model": _reference(plan.sources.mllm),  # mergekit's name for the end at t = 0
        "models": _models(plan, {}, {}),
        "parameters": {"t": _limited(_graded(plan, "t"), 0.0)},
        "dtype": "float32",
    }


def _write_nuslerp(plan: MergePlan) -> dict[str, Any]:
    t = cast("float", plan.parameters["t"])
    recipe: dict[str, Any] = {"merge_method": "nuslerp"}
    if plan.parameters["of"] == "task_vectors":
        recipe["base_model"] = _reference(plan.sources.base)
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
        "base_model": _reference(plan.sources.base),
        "models": _models(plan, {}, {}),
        "parameters": {"select_topk": plan.parameters["select_topk"]},
        "dtype": "float32",
    }


def _write_karcher(plan: MergePlan) -> dict[str, Any]:
    _refuse_unless(plan, alpha=None)
    return {"merge_method": "karcher", "models": _models(plan, {}, {}), "dtype": "float32"}


def _write_multislerp(plan: MergePlan) -> dict[str, Any]:
    p, experts = plan.parameters, len(plan.sources.math)
    own = 1 / (1 + experts) if p["alpha"] is None else cast("float", p["alpha"])
    base = {} if p["of"] == "weights" else {"base_model": _reference(plan.sources.base)}
    weights = {"weight": _limited(own, 1.0)}, {"weight": _limited((1 - own) / experts, 0.0)}
    return {"merge_method": "multislerp", **base, "models": _models(plan, *weights), **_FP32}


def _write_model_stock(plan: MergePlan) -> dict[str, Any]:
    _refuse_unless(plan, models="all")
    return {
        "merge_method": "model_stock",
        "base_model": _reference(plan.sources.base),
        "models": _models(plan, {}, {}),
        "parameters": {"filter_wise": plan.parameters["per"] == "row"},
        **_FP32,
    }


def _write_ram(plan: MergePlan) -> dict[str, Any]:
    p = plan.parameters
    plus = {"r": p["boost"], "alpha": p["boost_cap"]} if p["boost"] else {}
    return {
        "merge_method": "ramplus_tl" if plus else "ram",
        "base_model": _reference(plan.sources.base),
        "models": _models(plan, {}, {}),
        "parameters": {**plus, "epsilon": p["epsilon"]},
        **_FP32,
    }


_FP32 = {"dtype": "float32"}
_ELEMENTWISE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "della")
WRITERS: dict[str, Callable[[MergePlan], dict[str, Any]]] = {
    **dict.fromkeys(_ELEMENTWISE, _write_elementwise),
    "linear": _write_linear,
    "slerp": _write_slerp,
    "nuslerp": _write_nuslerp,
    "sce": _write_sce,
    "karcher": _write_karcher,
    "multislerp": _write_multislerp,
    "model_stock": _write_model_stock,
    "ram": _write_ram,
}


def _models(plan: MergePlan, host: dict[str, Any], expert: dict[str, Any]) -> list[dict[str, Any]]:
    named = [(plan.sources.mllm, host), *((math, expert) for math in plan.sources.math)]
    return [
        {"model": _reference(source), **({"parameters": parameters} if parameters else {})}
        for source, parameters in named
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
