"""Match every selected parameter of an MLLM's decoder with the expert's, in any name layout.

In: the opened MLLM and expert (and the expert's base, for a hierarchical prior) and a `Scope`. Out:
a `PriorMatch` with one entry per parameter. A selected parameter of the MLLM without a counterpart
raises an error: the number of parameters that the prior acts on is never smaller than expected.
Reads headers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from ipmerge_core.errors import PairingError, ShapeError
from ipmerge_core.finetuning.scope import Scope, set_of
from ipmerge_core.models.checkpoint import Checkpoint, TensorSpec
from ipmerge_core.models.decoders import Decoder, find_decoders, output_head, refuse_unsupported
from ipmerge_core.models.headers import FLOAT_DTYPES

_EMBEDDINGS = "embed_tokens.weight"
Key = tuple[int | None, str]  # text layer (None between layers), name in the layer


@dataclass(frozen=True)
class PriorEntry:
    """One parameter, or the part of a fused one, that the prior acts on.

    `name` is in the common layout; `mllm`, `expert` and `origin` are addresses in the stored
    models: D = expert - origin, where the origin is the MLLM (direct) or the expert's base.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    mllm: str
    expert: str
    origin: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class PriorMatch:
    """The models of a prior and its entries; `expert_base` is None for a direct prior."""

    mllm: Checkpoint
    expert: Checkpoint
    expert_base: Checkpoint | None
    entries: tuple[PriorEntry, ...]
    prefix: str  # of the MLLM's language model

    @property
    def origin(self) -> Checkpoint:
        """The model that the expert is compared with."""
        return self.mllm if self.expert_base is None else self.expert_base

    @property
    def numel(self) -> int:
        """Number of elements of the prior."""
        return sum(entry.numel for entry in self.entries)

    @property
    def language_numel(self) -> int:
        """Number of elements of the language model: decoder, embeddings, final norm and head."""
        names = {name for name in self.mllm.tensors if name.startswith(self.prefix)}
        head = output_head(self.mllm)
        names |= {head} if head is not None else set()
        return sum(self.mllm.spec(name).numel for name in names)

    def describe(self) -> str:
        """Count the parameters by their set, such as "28 of attn, 21 of mlp"."""
        counts = Counter(set_of(entry.name) or "other" for entry in self.entries)
        biases = sum(entry.name.endswith(".bias") for entry in self.entries)
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
        return f"{listed}; {biases} of them biases"


def match_prior(
    mllm: Checkpoint, expert: Checkpoint, scope: Scope, expert_base: Checkpoint | None = None
) -> PriorMatch:
    """Match the parameters of the MLLM that a scope selects with those of the expert.

    Args:
        mllm: the multimodal model that is fine-tuned.
        expert: the text model that the prior leads to.
        scope: the selected parameters.
        expert_base: the base of the expert, for the hierarchical prior D = expert - base.

    Raises:
        PairingError: a model has no supported decoder, nothing is selected, or a selected
            parameter has no counterpart.
        ShapeError: a selected parameter has another shape in another model.
    """
    target, decoder = _decoder_like("expert", expert, None)
    own, found = _decoder_like("mllm", mllm, decoder)
    sides = {"expert": (expert, target)}
    if expert_base is not None:
        sides["base of the expert"] = (expert_base, _decoder_like("base", expert_base, decoder)[0])
    wanted = {
        key: spec for key, spec in own.items() if scope.includes(_name(key), key[0])
    }  # fmt: skip
    if not wanted:
        raise PairingError(
            f"No parameter of '{mllm.id}' is selected by the modules {', '.join(scope.modules)} in "
            f"the layers from {scope.first_layer} to {scope.last_layer or len(found.layers) - 1}; "
            f"it has {len(found.layers)} layers. Select other modules or layers."
        )
    _refuse_unused(mllm, scope, wanted)
    for role, (model, tensors) in sides.items():
        _refuse_other_layers(mllm, own, role, model, tensors)
        for key, spec in wanted.items():
            _refuse_mismatch(mllm, (key, spec), role, model, tensors)
    origin = sides.get("base of the expert", (mllm, own))[1]
    entries = tuple(
        PriorEntry(_name(k), k[0], s.shape, s.name, target[k].name, origin[k].name)
        for k, s in wanted.items()
    )
    assert len(entries) == len(wanted) > 0, "every selected parameter has an entry"
    return PriorMatch(mllm, expert, expert_base, entries, found.prefix)


def _refuse_unused(mllm: Checkpoint, scope: Scope, wanted: Iterable[Key]) -> None:
    """Refuse a name of modules or a pattern that stands for no parameter."""
    names = {_name(key): key[0] for key in wanted}
    for module in scope.modules:
        alone = replace(scope, modules=(module,))
        if not any(alone.includes(name, layer) for name, layer in names.items()):
            raise PairingError(
                f"The modules '{module[:80]}' select no parameter of '{mllm.id}' in these layers, "
                f"as a head that shares its weights with the embeddings. Omit them."
            )
    for pattern, _ in scope.strengths:
        alone = replace(scope, strengths=((pattern, 1.0),))
        if not any(alone.strength(name, 0.0) for name in names):
            raise PairingError(
                f"The pattern '{pattern[:80]}' of a strength is found in the name of no parameter "
                f"that has a prior, such as '{next(iter(names))}'. Correct it, or omit it."
            )


def _decoder_like(
    role: str, model: Checkpoint, like: Decoder | None
) -> tuple[dict[Key, TensorSpec], Decoder]:
    """Return the tensors of a model's decoder: of the one most like another one, or the largest."""
    decoders = find_decoders(role, model)
    if like is None:  # of a vision-language model, the part with word embeddings
        decoders.sort(key=lambda each: each.prefix + _EMBEDDINGS not in model.tensors)
    else:
        decoders.sort(key=lambda each: -_likeness(each, like))
    refuse_unsupported(model, decoders[0])
    return dict(_tensors(model, decoders[0])), decoders[0]


def _likeness(decoder: Decoder, like: Decoder) -> int:
    """Count the tensors with an equal name and shape."""
    return sum(
        key in like.tensors and like.tensors[key].shape == spec.shape
        for key, spec in decoder.tensors.items()
    )


def _tensors(model: Checkpoint, decoder: Decoder) -> Iterator[tuple[Key, TensorSpec]]:
    """Yield the float tensors of the language model by text layer and name."""
    for key, spec in sorted(decoder.tensors.items(), key=lambda item: item[0]):
        if spec.dtype in FLOAT_DTYPES and spec.numel:
            yield key, spec
    for name in (_EMBEDDINGS, "norm.weight"):
        if decoder.prefix + name in model.tensors:
            yield (None, name), model.spec(decoder.prefix + name)
    if (head := output_head(model)) is not None:
        yield (None, "lm_head.weight"), model.spec(head)


def _name(key: Key) -> str:
    return key[1] if key[0] is None else f"layers.{key[0]}.{key[1]}"


def _refuse_other_layers(
    mllm: Checkpoint,
    own: dict[Key, TensorSpec],
    role: str,
    model: Checkpoint,
    tensors: dict[Key, TensorSpec],
) -> None:
    """Refuse decoders of another number of layers, whose layers do not correspond."""
    ours, theirs = ({k[0] for k in side if k[0] is not None} for side in (own, tensors))
    if ours != theirs:
        raise PairingError(
            f"The mllm '{mllm.id}' has {len(ours)} decoder layers and the {role} '{model.id}' has "
            f"{len(theirs)}. A reasoning prior needs an expert of the same architecture: choose a "
            f"text model of the size of the MLLM's language model."
        )


def _refuse_mismatch(
    mllm: Checkpoint,
    own: tuple[Key, TensorSpec],
    role: str,
    model: Checkpoint,
    tensors: dict[Key, TensorSpec],
) -> None:
    """Refuse a selected parameter that another model lacks or has with another shape."""
    key, spec = own
    other = tensors.get(key)
    if other is None:
        raise PairingError(
            f"'{spec.name}' of the mllm '{mllm.id}' has no counterpart in the {role} '{model.id}', "
            f"so that the prior could not act on it. Choose an expert of the same architecture, or "
            f"leave it out of the modules."
        )
    if other.shape != spec.shape:
        is_vocabulary = set_of(_name(key)) in ("embed", "head")
        why = " Their vocabularies differ: leave out embed and head." if is_vocabulary else ""
        raise ShapeError(
            f"'{spec.name}' has shape {spec.shape} in the mllm '{mllm.id}' but '{other.name}' has "
            f"{other.shape} in the {role} '{model.id}'; a reasoning prior needs equal shapes.{why}"
        )
