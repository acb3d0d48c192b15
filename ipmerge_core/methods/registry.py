"""Registry of merge methods: `@merge_method` registers a pure function in METHODS.

The decorator reads a function's keyword-only parameters (name, type, range, default, help) into a
frozen `MergeMethod`. Sliders, the CLI, the README table, error messages and the contract tests are
all generated from `METHODS`, so that a method is described once, in its signature.

Some keywords are not form fields: the driver supplies them. Their annotation is `Supplied`:
`tensor_name` (it keys the randomness, and a layer swap reads the layer from it), `statistic` (a
number of the whole model, see `Statistic`), `noise` (the size of the files' rounding errors in each
task vector; by default estimated from the matrices), `low_rank` (the task vectors that are known as
factors, which are then decomposed as such), `report` (called with the progress of a slow
method), and calibration data such as `mllm_gram`. Every method accepts `tensor_name`, whether
it uses it or not; the others are valid only if `inputs` lists them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import (
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from jaxtyping import Float
from torch import Tensor

from ipmerge_core.errors import PlanError, ShapeError, UnknownMethodError
from ipmerge_core.methods.declarations import (
    AffineUpdate,
    Matrix,
    ParameterValue,
    Statistic,
)
from ipmerge_core.methods.ranges import Range
from ipmerge_core.spectral.kinds import Anchor
from ipmerge_core.spectral.low_rank import LowRank

Experts: TypeAlias = Float[Tensor, "m n"] | Sequence[Float[Tensor, "m n"]]


def as_list(math: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return one or several experts as a list."""
    return [math] if isinstance(math, Tensor) else list(math)


DataKind: TypeAlias = Literal["fisher", "gram"]


Coefficient: TypeAlias = Annotated[float, Range(help="weight of a task vector", usual=(-1.0, 2.0))]
Gain: TypeAlias = Annotated[
    float, Range(low=0, help="gain on an additive update", usual=(0.0, 2.0))
]
Fraction: TypeAlias = Annotated[float, Range(low=0, high=1)]
Density: TypeAlias = Annotated[float, Range(low=0, high=1, low_open=True, help="fraction kept")]


@dataclass(frozen=True)
class Supplied:
    """Marks a keyword that the driver supplies and forms do not show."""

    help: str


TensorName: TypeAlias = Annotated[str, Supplied("name of the matrix; keys its random numbers")]
WholeModel: TypeAlias = Annotated[
    tuple[float, ...] | None, Supplied("result of the method's Statistic over all matrices")
]
Noise: TypeAlias = Annotated[
    Sequence[float] | None,
    Supplied("norm of the rounding noise in each task vector, the MLLM's first"),
]
Changes: TypeAlias = Annotated[
    Sequence[LowRank | None] | None,
    Supplied("task vectors that are known to be of low rank, the MLLM's first; None for others"),
]

Report: TypeAlias = Annotated[
    Callable[[float], object] | None,
    Supplied("called with the share of the matrix that is done, where a method takes long"),
]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method, as used by form fields."""

    name: str
    kind: Literal["float", "int", "bool", "choice"]
    default: ParameterValue
    bounds: Range = field(default_factory=Range)
    choices: tuple[str, ...] = ()
    optional: bool = False  # None is valid

    def read(self, value: ParameterValue) -> ParameterValue:
        """Return the value, with true or false of older plans converted to a choice."""
        words = dict(self.bounds.former)
        return words.get(value, value) if isinstance(value, bool) else value

    def check(self, value: ParameterValue) -> None:
        """Raise PlanError unless `value` is valid for this parameter."""
        if value is None and self.optional:
            return
        legal = {
            "choice": lambda: value in self.choices,
            "bool": lambda: isinstance(value, bool),
            "int": lambda: type(value) is int and value in self.bounds,
            "float": lambda: not isinstance(value, bool) and value in self.bounds,
        }[self.kind]()
        if not legal:
            raise PlanError(
                f"{self.name.rstrip('_')} is {value!r}; expected {self.expectation}. "
                f"The default is {self.default!r}."
            )

    @property
    def expectation(self) -> str:
        """Description of the valid values."""
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        if self.kind == "bool":
            return "true or false"
        noun = "an integer" if self.kind == "int" else "a finite number"
        return f"{noun} in {self.bounds}" + (" or none" if self.optional else "")


_Merging: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class MergeMethod:
    """A merge method and its metadata for forms, tables and error messages.

    Attributes:
        gains: the parameters that scale the change: with all experts' gains at 0 (and the MLLM's
            at 1) the result is the MLLM.
        gain: the parameter that the change is proportional to; layer gains multiply it. The one of
            an arc ("t" of slerp) turns by that share of the angle instead. None: layer gains
            multiply the change itself.
        several_experts: whether `math` may be a list of matrices.
        affine: returns the change as an `AffineUpdate`, which makes its preview exact, from the
            parameters and other known values: the `statistic`, the `layer`, the number of
            `experts`, the `cosine` of the task vectors and their `squared_norms`; None if the
            change is not of that form.
        unknown: why the change is not of that form; from the parameters where it depends on them.
        from_analysis: the parameters that are also options of an analysis; a plan uses the values
            of its analysis unless they are given.
        anchor: the default anchor of a plan.
        statistic: a first pass over the whole model.
        data: the calibration that the method requires with any parameters.
        needed_data: returns the calibration that some of its parameters require, or None.
        decides_data: the parameters that this depends on.
        inputs: the keywords that a driver supplies.
        matrixwise: whether whole matrices are decomposed or iterated on, which does not apply to
            vectors; all other methods perform a few operations per element. NaN and infinity in an
            input propagate to the result, unless a method is matrixwise.
        local: whether an element of the result depends only on that element of each model and on
            the statistic.
        check: raises PlanError for values that are valid separately but not in combination.
        version: the version of its mathematics. A change after which the same inputs and
            parameters give other weights increases it, which changes the digest of plans.
        vectors: for methods that do not apply to norms, biases and embedding rows: returns the
            weights of task arithmetic on them, from the parameters and the number of experts.
    """

    name: str
    label: str
    formula: str
    source: str
    function: _Merging
    parameters: tuple[Parameter, ...]
    gains: tuple[str, ...] = ()
    gain: str | None = None
    several_experts: bool = False
    affine: Callable[[Mapping[str, Any]], AffineUpdate | None] | None = None
    unknown: str | Callable[[Mapping[str, Any]], str] = (
        "its change is not a multiple of a direction that the analysis measured"
    )
    from_analysis: tuple[str, ...] = ()
    anchor: Anchor = "two_base"
    statistic: Statistic | None = None
    data: DataKind | None = None
    needed_data: Callable[[Mapping[str, Any]], DataKind | None] = lambda parameters: None
    decides_data: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    matrixwise: bool = False
    local: bool = False
    check: Callable[[Mapping[str, Any]], object] | None = None
    vectors: Callable[[Mapping[str, Any], int], tuple[float, float]] | None = None
    version: int = 1

    def __call__(
        self,
        base: Tensor,
        mllm: Tensor,
        math: Tensor | Sequence[Tensor],
        **parameters: Any,  # noqa: ANN401
    ) -> Matrix:
        """Merge matrices of one shape (m, n); the result is fp32, or fp64 for fp64 inputs.

        Raises: ShapeError for unequal shapes, PlanError for an invalid parameter.
        """
        experts = [math] if isinstance(math, Tensor) else list(math)
        supplied = {name: parameters.pop(name) for name in self.inputs if name in parameters}
        parameters.pop("tensor_name", None)  # valid for every method
        self._check_matrices(base, mllm, experts)
        argument = experts if self.several_experts else experts[0]
        return self.function(base, mllm, argument, **self.complete(parameters), **supplied)

    def _check_matrices(self, base: Tensor, mllm: Tensor, experts: Sequence[Tensor]) -> None:
        if base.ndim != 2:
            raise ShapeError(
                f"{self.label} merges matrices and got a base of shape {tuple(base.shape)}; pass a "
                f"vector as one row."
            )
        for role, matrix in [("mllm", mllm), *(("math", expert) for expert in experts)]:
            if matrix.shape != base.shape:
                raise ShapeError(
                    f"{self.label} got a {role} matrix of shape {tuple(matrix.shape)} and a base "
                    f"of shape {tuple(base.shape)}; expected equal shapes."
                )
        if not experts:
            raise PlanError(f"{self.label} got no math matrix; expected at least one expert.")
        if len(experts) > 1 and not self.several_experts:
            raise PlanError(f"{self.label} merges one expert at a time and got {len(experts)}.")

    def needs_statistic(self, parameters: Mapping[str, ParameterValue]) -> bool:
        """Return whether the merge requires a first pass over the whole model."""
        scope = self.complete(parameters).get("scope")
        return self.statistic is not None and scope == "model"

    def data_for(self, parameters: Mapping[str, ParameterValue]) -> DataKind | None:
        """Return the calibration that a merge with these parameters requires, or None.

        >>> find_method("ip_merging").data_for({"projector": "off_inputs"})
        'gram'
        """
        return self.data or self.needed_data(self.complete(parameters))

    def reason_unknown(self, parameters: Mapping[str, ParameterValue]) -> str:
        """Return why there is no exact preview with these parameters."""
        return self.unknown if isinstance(self.unknown, str) else self.unknown(parameters)

    @property
    def needs_analysis(self) -> bool:
        """Whether a plan needs an analysis: to choose matrices by similarity, and for options."""
        return bool(self.from_analysis)

    @property
    def propagates_non_finite(self) -> bool:
        """Whether NaN or infinity in an input with a nonzero weight propagates to the result."""
        return not self.matrixwise

    def is_local(self, parameters: Mapping[str, ParameterValue]) -> bool:
        """Return whether rows of a matrix can be merged separately with identical results."""
        return self.local and (self.statistic is None or self.needs_statistic(parameters))

    def without_effect(self, given: Mapping[str, ParameterValue]) -> list[str]:
        """Describe the given values that should change the result but cannot.

        Defaults and values that turn something off (none, false) are consistent with no effect.

        >>> find_method("ip_merging").without_effect({"top_k": 8})
        ['top_k=8 (only used with projector=top_k)']
        """
        values = {parameter.name: parameter.default for parameter in self.parameters} | dict(given)
        return [
            f"{parameter.name}={given[parameter.name]} (only used with {words})"
            for parameter in self.parameters
            if parameter.name in given
            if given[parameter.name] not in (parameter.default, *_OFF)
            for words in parameter.bounds.unmet(values)
        ]

    def complete(self, parameters: Mapping[str, ParameterValue]) -> dict[str, ParameterValue]:
        """Return the given parameters, checked, with defaults for the rest.

        Raises: PlanError naming the parameter, its value and what was expected.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        unknown = sorted(set(parameters) - set(known))
        if unknown:
            raise PlanError(
                f"{self.label} has no parameter '{unknown[0]}'. "
                f"It has: {', '.join(known) or 'none'}."
            )
        parameters = {name: known[name].read(value) for name, value in parameters.items()}
        for name, value in parameters.items():
            known[name].check(value)
        complete = {name: parameters.get(name, known[name].default) for name in known}
        complete = {  # accept 1 for 1.0
            name: float(value) if known[name].kind == "float" and value is not None else value
            for name, value in complete.items()
        }
        if self.check is not None:
            self.check(complete)
        return complete

    def with_former_defaults(
        self, parameters: Mapping[str, ParameterValue]
    ) -> dict[str, ParameterValue]:
        """Add the former behaviour of parameters that a plan file predates.

        A plan stores all parameters that existed when it was created. A missing one was added
        later, and the behaviour before that may differ from its default.
        """
        before = {parameter.name: parameter.bounds.before for parameter in self.parameters}
        known = {name: value for name, value in before.items() if value is not None}
        return {**known, **parameters}

    def as_hashed(self, parameters: Mapping[str, ParameterValue]) -> dict[str, ParameterValue]:
        """Return complete parameters in the format of the first plans, which keeps their hash.

        Choices that used to be boolean are converted back; parameters that were added later and
        have the former behaviour are omitted.
        """
        known = {parameter.name: parameter.bounds for parameter in self.parameters}
        written = {
            name: {word: old for old, word in known[name].former}.get(str(value), value)
            for name, value in parameters.items()
        }
        return {
            name: value
            for name, value in written.items()
            if known[name].before is None or value != known[name].before
        }


_OFF = (None, False, "none")


METHODS: dict[str, MergeMethod] = {}

_Function = TypeVar("_Function", bound=_Merging)


def merge_method(**traits: Any) -> Callable[[_Function], _Function]:  # noqa: ANN401
    """Register a function in METHODS under its name and return it unchanged.

    Args:
        **traits: fields of `MergeMethod`, at least label, source and formula. Name, function,
            parameters and inputs are derived from the function.
    """

    def register(function: _Function) -> _Function:
        METHODS[function.__name__] = MergeMethod(
            name=function.__name__,
            function=function,
            parameters=_read_parameters(function),
            inputs=_read_inputs(function),
            **traits,
        )
        return function

    return register


def find_method(name: str) -> MergeMethod:
    """Return the method of that name. Raises: UnknownMethodError with the closest name."""
    if name not in METHODS:
        raise UnknownMethodError(name, METHODS)
    return METHODS[name]


def _read_parameters(function: Callable[..., object]) -> tuple[Parameter, ...]:
    hints = get_type_hints(function, include_extras=True)
    return tuple(
        _read_parameter(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not _is_supplied(hints[name])
    )


def _read_inputs(function: Callable[..., object]) -> tuple[str, ...]:
    hints = get_type_hints(function, include_extras=True)
    return tuple(name for name, hint in hints.items() if _is_supplied(hint))


def _is_supplied(hint: Any) -> bool:  # noqa: ANN401
    return get_origin(hint) is Annotated and isinstance(get_args(hint)[-1], Supplied)


def _read_parameter(name: str, hint: Any, default: ParameterValue) -> Parameter:  # noqa: ANN401
    optional = type(None) in get_args(hint)
    if optional:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    bounds = Range()
    if get_origin(hint) is Annotated:
        hint, bounds = get_args(hint)
    if get_origin(hint) is Literal:
        words = tuple(choice for choice in get_args(hint) if isinstance(choice, str))
        return Parameter(name, "choice", default, bounds, words, optional)
    kind: Literal["float", "int", "bool"] = hint.__name__
    return Parameter(name, kind, default, bounds, optional=optional)
