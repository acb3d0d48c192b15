"""Locate the language decoder of a checkpoint from tensor names and shapes.

In: a `Checkpoint`. Out: `Decoder`s: tensors by (text layer, name inside the layer), independent of
the prefix, with fused projections split by rows and non-text layers listed separately. Does not
depend on the model family. Unsupported layers are rejected by name: hybrid layers, projections
other than q, k, v, o, gate, up and down.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from ipmerge_core.errors import PairingError, ShapeError
from ipmerge_core.models.checkpoint import Checkpoint, TensorSpec
from ipmerge_core.runtime.input_files import InvalidContentError, Schema

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
MATRICES = {
    **{f"self_attn.{module}_proj.weight": module for module in MODULES[:4]},
    **{f"mlp.{module}_proj.weight": module for module in MODULES[4:]},
}
MOE = "mixture of experts: experts and router are kept, attention is merged"
CROSS_ATTENTION = "cross-attention layer: no counterpart in the text model"
BUFFER = "buffer: computed, not trained"
NORMS, BIASES, EMBEDDINGS, HEAD = "norms", "biases", "embeddings", "output head"
MIXTURE = "experts of the mixture"

# Names are untrusted: a match ends at the first layer number, whose length is bounded.
_LAYER = re.compile(r"(?P<prefix>.*?)layers\.(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL)
_MOE = re.compile(
    r"(mlp\.(experts|gate|router|shared_experts?|shared_expert_gate)\.|block_sparse_moe\.).+"
)
_BUFFER = re.compile(r"self_attn\.(rotary_emb\.\w+|masked_bias)")


Size = Annotated[int, Field(gt=0, lt=2**31)]


@dataclass(frozen=True)
class Decoder:
    """The text layers under one prefix. `tensors` is by (text layer, name inside the layer).

    `layers` are the stored numbers of the text layers. `apart` maps each other tensor under the
    prefix's layers to the reason why it is not merged.
    """

    prefix: str
    layers: tuple[int, ...]
    tensors: Mapping[tuple[int, str], TensorSpec]
    apart: Mapping[str, str]

    @property
    def matrices(self) -> dict[tuple[int, str], TensorSpec]:
        """The seven kinds of matrices by (text layer, module)."""
        return {
            (layer, MATRICES[rest]): spec
            for (layer, rest), spec in self.tensors.items()
            if rest in MATRICES
        }

    def other_tensors(self, model: Checkpoint) -> dict[tuple[str, int, str], str]:
        """Return the other tensors of the language model by (kind, text layer, name in the layer).

        These are norms and biases, experts and router of a mixture, embeddings and output head.
        """
        found = {
            (BIASES if rest.endswith(".bias") else NORMS, layer, rest): spec.name
            for (layer, rest), spec in self.tensors.items()
            if rest not in MATRICES
        }
        for name, reason in self.apart.items():
            place = _LAYER.fullmatch(name)
            if reason == MOE and place is not None:
                layer = self.layers.index(int(place["layer"]))
                found[MIXTURE, layer, place["rest"]] = name
        for kind, name in ((NORMS, "norm.weight"), (EMBEDDINGS, "embed_tokens.weight")):
            if self.prefix + name in model.tensors:
                found[kind, len(self.layers), name] = self.prefix + name
        head = output_head(model)
        if head is not None:
            found[HEAD, len(self.layers), "lm_head.weight"] = head
        return {key: name for key, name in found.items() if any(model.spec(name).shape[:1])}


def output_head(model: Checkpoint) -> str | None:
    """Return the name of the output head, if the model stores one."""
    found = [name for name in model.tensors if name.split(".")[-2:] == ["lm_head", "weight"]]
    return min(found, key=len, default=None)


def text_config(model: Checkpoint) -> dict[str, Any]:
    """Return the config of the language model, with the outer config's values as defaults."""
    outer = model.config
    own = inner_config(outer) or {}
    merged = outer | {key: value for key, value in own.items() if value is not None}
    rope = merged.get("rope_parameters")
    if isinstance(rope, dict):
        layers = rope.get("full_attention")  # local layers may have a different RoPE
        rope = layers if isinstance(layers, dict) else rope
        merged["rope_theta"] = rope.get("rope_theta", merged.get("rope_theta"))
    return merged


def inner_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the language model inside that of a multimodal model, if any."""
    inner = (config.get(key) for key in ("text_config", "llm_config", "language_config"))
    found = next((part for part in inner if isinstance(part, dict)), None)
    thinker = config.get("thinker_config")  # the language model of omni models has its own towers
    return inner_config(thinker) if found is None and isinstance(thinker, dict) else found


def find_decoders(role: str, model: Checkpoint) -> list[Decoder]:
    """List the groups of layers that contain matrices of the seven kinds, largest first.

    Raises: PairingError if there is none; the message names what was found instead.
    """
    groups: dict[str, dict[int, dict[str, TensorSpec]]] = defaultdict(lambda: defaultdict(dict))
    for spec in model.tensors.values():
        found = _LAYER.fullmatch(spec.name)
        if found:
            groups[found["prefix"]][int(found["layer"])][found["rest"]] = spec
    split = {
        prefix: {number: _split_fused(model, layer) for number, layer in layers.items()}
        for prefix, layers in groups.items()
    }
    named = {
        prefix: layers
        for prefix, layers in split.items()
        if any(rest in MATRICES for layer in layers.values() for rest in layer)
    }
    if not named:
        raise _no_decoder(role, model, groups)
    largest = sorted(named, key=lambda prefix: -sum(map(len, named[prefix].values())))
    return [_decoder(prefix, named[prefix]) for prefix in largest]


def refuse_unsupported(model: Checkpoint, decoder: Decoder) -> None:
    """Raise PairingError for a decoder with unsupported matrices."""
    numbers = sorted({int(_number(name)) for name in decoder.apart} | set(decoder.layers))
    if numbers != list(range(len(numbers))):
        missing = min(set(range(numbers[-1])) - set(numbers))
        raise PairingError(
            f"'{model.id}' has layers up to {numbers[-1]} under '{decoder.prefix}layers.' but no "
            f"layer {missing}. Is a shard missing?"
        )
    for (layer, rest), spec in decoder.tensors.items():
        if len(spec.shape) > 1 and rest not in MATRICES:
            raise PairingError(
                f"'{spec.name}' of '{model.id}' {spec.shape} in layer {layer} is none of the "
                f"projections q, k, v, o, gate, up, down. This architecture is not supported."
            )


def _no_decoder(role: str, model: Checkpoint, groups: Mapping[str, Any]) -> PairingError:
    found = (
        spec.name
        for layers in groups.values()
        for layer in layers.values()
        for spec in layer.values()
        if len(spec.shape) == 2
    )
    inside = next(found, None)
    hint = f" It has '{inside}': this layout is not supported." if inside else ""
    return PairingError(
        f"The {role} '{model.id}' has no decoder matrices named like "
        f"'...layers.0.self_attn.q_proj.weight'.{hint} Expected a Llama-like decoder in the "
        f"transformers layout."
    )


def _number(name: str) -> str:
    found = _LAYER.fullmatch(name)
    assert found is not None
    return found["layer"]


def _decoder(prefix: str, layers: Mapping[int, Mapping[str, TensorSpec]]) -> Decoder:
    """Select and renumber the text layers, and list the other tensors separately."""
    text = [number for number in sorted(layers) if _is_text_layer(layers[number])]
    tensors: dict[tuple[int, str], TensorSpec] = {}
    apart: dict[str, str] = {}
    for ordinal, number in enumerate(text):
        for rest, spec in layers[number].items():
            reason = MOE if _MOE.fullmatch(rest) else BUFFER if _BUFFER.fullmatch(rest) else None
            if reason is None:
                tensors[ordinal, rest] = spec
            else:
                apart[spec.name] = reason
    for number in set(layers) - set(text):
        apart |= dict.fromkeys((spec.name for spec in layers[number].values()), CROSS_ATTENTION)
    return Decoder(prefix, tuple(text), tensors, apart)


def _is_text_layer(layer: Mapping[str, TensorSpec]) -> bool:
    """Return True unless cross-attention replaces self-attention in the layer."""
    crossed = any(rest.startswith("cross_attn.") for rest in layer)
    return not crossed or any(rest.startswith("self_attn.") for rest in layer)


def _split_fused(model: Checkpoint, layer: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Replace `qkv_proj` and `gate_up_proj` by the addresses of their stacked rows."""
    split: dict[str, TensorSpec] = {}
    for rest, spec in layer.items():
        place, _, kind = rest.rpartition(".")
        if place == "self_attn.qkv_proj" and kind in ("weight", "bias"):
            sizes = dict(zip("qkv", _qkv_rows(model, spec), strict=True))
        elif place == "mlp.gate_up_proj" and kind in ("weight", "bias"):
            sizes = dict.fromkeys(("gate", "up"), spec.shape[0] // 2)
        else:
            split[rest] = spec
            continue
        start = 0
        for name, size in sizes.items():
            address = f"{spec.name}[{start}:{start + size}]"
            split[f"{place.partition('.')[0]}.{name}_proj.{kind}"] = model.spec(address)
            start += size
    return split


@dataclass(frozen=True)
class _Heads:
    """The fields of a config that determine the rows of q, k and v."""

    num_attention_heads: Size
    hidden_size: Size
    head_dim: Size | None
    num_key_value_heads: Size | None


_HEADS = Schema[_Heads](_Heads)


def _qkv_rows(model: Checkpoint, spec: TensorSpec) -> list[int]:
    """Compute the rows of q, k and v in a fused projection from the number of heads."""
    model_config = text_config(model)
    names = [each.name for each in fields(_Heads)]
    try:
        config = _HEADS.validate({key: model_config.get(key) for key in names})
    except InvalidContentError as error:
        raise PairingError(
            f"'{spec.name}' of '{model.id}' is a fused q, k and v projection, which cannot be "
            f"split by its config: {error}."
        ) from error
    heads = config.num_attention_heads
    head = config.head_dim or config.hidden_size // heads
    keys = (config.num_key_value_heads or heads) * head
    if heads * head + 2 * keys != spec.shape[0]:
        raise ShapeError(
            f"'{spec.name}' of '{model.id}' has {spec.shape[0]} rows; {heads} query heads and "
            f"{keys // head} key/value heads of {head} require {heads * head + 2 * keys}."
        )
    return [heads * head, keys, keys]
