"""Import mergekit recipes as arguments of `make_plan`; the inverse of `mergekit`.

In: the YAML of mergekit 0.1.5. Out: a `Recipe`. Values that a plan cannot express raise an error
that names them. Opens no models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field

from ipmerge_core.errors import PlanError
from ipmerge_core.methods import find_method
from ipmerge_core.planning.mergekit import MATRICES, WRITERS, grades_the_change
from ipmerge_core.runtime.input_files import (
    CLOSED,
    FileKind,
    InvalidContentError,
    Location,
    Name,
    Number,
    Schema,
    parse_yaml,
)


class Recipe(NamedTuple):
    """The models of a recipe, and the other arguments of `make_plan`.

    `notes` describe how a merge of the plan differs from mergekit's, in a sentence each.
    """

    mllm: str
    math: list[str]
    base: str | None
    arguments: dict[str, Any]
    notes: tuple[str, ...] = ()


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
_OURS = {"della_linear": "della", "ramplus_tl": "ram"}  # our names of other methods
_Dtype: TypeAlias = Literal["float32", "float16", "bfloat16", "float64"]
_KNOWN = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")


RECIPE = FileKind("a recipe", "Expected mergekit's YAML.", PlanError, largest=128 * 1024)
_Scalar: TypeAlias = Number | int | bool | Annotated[str, Field(max_length=200)] | None


@dataclass(frozen=True)
class _Condition:
    """A value for tensors whose name contains `filter`."""

    __pydantic_config__ = CLOSED

    value: _Scalar | list[_Scalar]
    filter: str | None = None


_Value: TypeAlias = _Scalar | _Condition | list[_Scalar | _Condition]


@dataclass(frozen=True)
class _Model:
    """One model of a recipe with its parameters."""

    __pydantic_config__ = CLOSED

    model: Location
    parameters: dict[str, _Value] | None = None


@dataclass(frozen=True)
class _Recipe:
    """The fields of a recipe that a plan can express."""

    __pydantic_config__ = CLOSED

    merge_method: Name
    models: tuple[_Model, ...] = ()
    base_model: Location | None = None
    parameters: dict[str, _Value] | None = None
    dtype: _Dtype | None = None
    out_dtype: _Dtype | None = None


_RECIPE = Schema[_Recipe](_Recipe)


def import_recipe(text: str | bytes) -> Recipe:
    """Read a mergekit recipe of two models (or more experts); the first is the MLLM.

    Raises: PlanError for an invalid recipe, or one that a plan cannot express.
    """
    try:
        content = parse_yaml(text, RECIPE.largest)
        unknown = sorted(set(content) - set(_KNOWN)) if isinstance(content, dict) else []
        if unknown:
            raise PlanError(f"The recipe has '{unknown[0]:.80}', which a plan cannot express.")
        recipe = asdict(_RECIPE.validate(content))
    except InvalidContentError as error:
        raise PlanError(
            f"This is not a mergekit recipe: {error}. Expected YAML with a merge_method and models."
        ) from error
    method = recipe["merge_method"]
    ours = _OURS.get(method, method)
    if ours not in WRITERS:
        raise PlanError(f"The method '{method}' of the recipe is not one of: {', '.join(WRITERS)}.")
    names, parts = _read_models(recipe)
    reader = _Reader(method, parts)
    values = _READERS.get(ours, _read_elementwise)(reader)
    reader.refuse_the_rest()
    base = recipe.get("base_model") if ours != "slerp" else None
    if ours in ("nuslerp", "multislerp"):
        values["of"] = "weights" if base is None else "task_vectors"
    layer_gains = values.pop("layer_gains", ())
    arguments = {"method": ours, **find_method(ours).complete(values)}
    if layer_gains:
        arguments["layer_gains"] = layer_gains
    return Recipe(names[0], names[1:], base, arguments, _dtype_notes(recipe))


def _dtype_notes(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """Describe the dtypes of a recipe that a merge does not use."""
    dtypes = {name: recipe[name] for name in ("dtype", "out_dtype") if recipe.get(name)}
    notes = []
    if dtypes.get("dtype", "float32") != "float32":
        notes.append(f"The recipe computes in {dtypes['dtype']}; the merge computes in float32.")
    if "out_dtype" in dtypes or notes:
        written = dtypes.get("out_dtype", dtypes.get("dtype"))
        notes.append(
            f"The recipe writes {written}; the merged model keeps the dtype of every tensor of the "
            f"vision-language model."
        )
    return tuple(notes)


def _read_models(recipe: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    base = recipe.get("base_model")
    entries = list(recipe["models"])
    if recipe["merge_method"] != "slerp":  # there the base is the MLLM
        entries = [entry for entry in entries if entry.get("model") != base]
    elif (
        base is not None
    ):  # the model at t = 0 comes first, regardless of its position in the recipe
        entries.sort(key=lambda entry: entry.get("model") != base)
    if len(entries) < 2:
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
    if isinstance(host, list):
        raise PlanError(
            f"The recipe's {reader.method} has MLLM weights per layer, which a plan cannot express."
        )
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
    values |= _densities(reader, known)
    if graded and not grades_the_change(method, values):
        raise PlanError(
            f"The recipe grades the weights of {reader.method}, whose change is not proportional "
            f"to them; a plan's layer gains scale the change. Use one weight for all layers."
        )
    return values


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
    hosts, experts = reader.both("weight")
    if isinstance(hosts, list) or isinstance(experts, list):
        return _read_graded_linear(reader, hosts, experts)
    host, expert = _number("weight", hosts), _number("weight", experts)
    if not _switch(reader, "normalize", True):
        return {"mllm_weight": host, "math_weight": expert, "normalize": False}
    share = host / _divisor(reader, host, expert)
    if not 0 <= share <= 1:
        return {"mllm_weight": host, "math_weight": expert}
    return {"alpha": share}


def _read_graded_linear(reader: _Reader, hosts: Any, experts: Any) -> dict[str, Any]:  # noqa: ANN401
    """Read weights that differ between layers.

    With a constant weight of the MLLM the experts' weights are graded. Two lists that sum to a
    constant in every layer are a graded average.
    """
    normalize = _switch(reader, "normalize", True)
    if not isinstance(hosts, list):
        host = _number("weight", hosts)
        gains = _grades(experts)
        return {
            "mllm_weight": host,
            "math_weight": 1.0,
            "normalize": normalize,
            "layer_gains": gains,
        }
    shares = _grades(experts) if isinstance(experts, list) else ()
    totals = [h + reader.experts * s for h, s in zip(_grades(hosts), shares, strict=False)]
    scale = totals[0] if normalize and totals else 1.0
    constant = all(abs(total - scale) <= 1e-9 * abs(scale) for total in totals)
    if len(hosts) != len(shares) or not constant or scale <= 0 or reader.experts > 1:
        raise PlanError(
            "The recipe's weights per layer do not sum to the same value in every layer, which a "
            "plan cannot express. Expected lists of one length, such as [0.9, 0.5] and [0.1, 0.5]."
        )
    return {"alpha": 0.0, "layer_gains": tuple(share / scale for share in shares)}


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


def _read_multislerp(reader: _Reader) -> dict[str, Any]:
    host, expert = (_number("weight", value) for value in reader.both("weight"))
    if not _switch(reader, "normalize_weights", True):
        raise PlanError(
            "The recipe's multislerp has normalize_weights false, which a plan cannot express."
        )
    share = host / _divisor(reader, host, expert)
    if not 0 <= share <= 1:
        raise PlanError(
            f"The MLLM has a share of {share:g} in the recipe's multislerp; a plan has one in "
            f"[0, 1]. Use weights >= 0."
        )
    return {"alpha": share}


def _read_model_stock(reader: _Reader) -> dict[str, Any]:
    return {"per": "row" if _switch(reader, "filter_wise", False) else "tensor"}


def _read_ram(reader: _Reader) -> dict[str, Any]:
    values = {"epsilon": reader.one("epsilon", 1e-5)}
    if reader.method == "ramplus_tl":
        values |= {"boost": reader.one("r", 0.1), "boost_cap": reader.one("alpha", 0.2)}
    return values


_READERS: dict[str, Callable[[_Reader], dict[str, Any]]] = {
    "linear": _read_linear,
    "slerp": _read_slerp,
    "nuslerp": _read_nuslerp,
    "sce": _read_sce,
    "karcher": lambda reader: {},
    "multislerp": _read_multislerp,
    "model_stock": _read_model_stock,
    "ram": _read_ram,
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
