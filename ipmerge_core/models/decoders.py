"""Locate the language decoder of a checkpoint from tensor names and shapes.

In: a `Checkpoint`. Out: `Decoder`s: tensors by (text layer, name inside the layer), independent of
the prefix and in one common layout (see `layouts`), with non-text layers listed separately. Does
not depend on the model family: every 2-D weight of a layer is a matrix, whatever its name. Rejected
by name: encoder-decoders, and feed-forward layers without gate projections.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ipmerge_core.errors import PairingError
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.checkpoint import FLOAT_DTYPES, Checkpoint, TensorSpec
from ipmerge_core.models.layouts import in_common_layout
from ipmerge_core.models.matrix_kinds import is_projection, is_router, module_of

CROSS_ATTENTION = "cross-attention layer: no counterpart in the text model"
BUFFER = "buffer: computed, not trained"
PREDICTION = "prediction of later tokens: no layer of the decoder"
NORMS, BIASES, EMBEDDINGS, HEAD = "norms", "biases", "embeddings", "output head"
ROUTERS, OTHERS = "routers", "other tensors of the layers"

# Names are untrusted: a match ends at the first layer number, whose length is bounded.
_LAYER = re.compile(
    r"(?P<prefix>.*?)(?P<list>layers|blocks)\.(?P<layer>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL
)
_NOT_GATED = re.compile(
    r"(mlp\.)?(fc1|fc2|c_fc|c_proj|dense_h_to_4h|dense_4h_to_h)\.weight"
    r"|(self_attn|attention)\.query_key_value\.weight"
)
_PREDICTS = "eh_proj.weight"  # joins embedding and hidden state in a layer after the last one
_BUFFER = re.compile(r"self_attn\.(rotary_emb\.\w+|masked_bias)")


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

    @cached_property
    def matrices(self) -> dict[tuple[int, str], TensorSpec]:
        """The matrices: 2-D float weights, by (text layer, name in the common layout)."""
        return {key: spec for key, spec in self.tensors.items() if _is_matrix(key[1], spec)}

    def other_tensors(self, model: Checkpoint) -> dict[tuple[str, int, str], str]:
        """Return the other tensors of the language model by (kind, text layer, name in the layer).

        These are norms, biases and other vectors, routers, embeddings and output head.
        """
        found = {
            (_kind_of(rest), layer, rest): spec.name
            for (layer, rest), spec in self.tensors.items()
            if (layer, rest) not in self.matrices or is_router(module_of(rest))
        }
        for kind, name in ((NORMS, "norm.weight"), (EMBEDDINGS, "embed_tokens.weight")):
            if self.prefix + name in model.tensors:
                found[kind, len(self.layers), name] = self.prefix + name
        head = output_head(model)
        if head is not None:
            found[HEAD, len(self.layers), "lm_head.weight"] = head
        return {key: name for key, name in found.items() if any(model.spec(name).shape[:1])}


def _kind_of(rest: str) -> str:
    """Return the kind of a tensor of a layer that is no matrix of the usual kinds."""
    if is_router(module_of(rest)):
        return ROUTERS
    if rest.endswith(".bias"):
        return BIASES
    return NORMS if "norm" in rest else OTHERS


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
    """List the groups of layers that contain matrices, those with projections and many first.

    Raises: PairingError if there is none; the message names what was found instead.
    """
    groups: dict[tuple[str, str], dict[int, dict[str, TensorSpec]]]
    groups = defaultdict(lambda: defaultdict(dict))
    for spec in model.tensors.values():
        found = _LAYER.fullmatch(spec.name)
        if found:
            groups[found["prefix"], found["list"]][int(found["layer"])][found["rest"]] = spec
    config = text_config(model)
    decoders = [
        _decoder(
            prefix,
            {number: in_common_layout(model, config, layer) for number, layer in layers.items()},
        )
        for (prefix, _), layers in groups.items()
    ]
    usable = [decoder for decoder in decoders if decoder.matrices]
    if not usable:
        raise _no_decoder(role, model, groups)
    return sorted(usable, key=_by_likelihood)


def _by_likelihood(decoder: Decoder) -> tuple[bool, int]:
    """Return a sort key that puts the language model first."""
    modules = {module_of(rest) for _, rest in decoder.matrices}
    return not any(map(is_projection, modules)), -len(decoder.tensors)


def _is_matrix(rest: str, spec: TensorSpec) -> bool:
    return len(spec.shape) == 2 and rest.endswith(".weight") and spec.dtype in FLOAT_DTYPES


def refuse_unsupported(model: Checkpoint, decoder: Decoder) -> None:
    """Raise PairingError for a decoder with unsupported matrices."""
    numbers = sorted({int(_number(name)) for name in decoder.apart} | set(decoder.layers))
    if numbers != list(range(len(numbers))):
        missing = min(set(range(numbers[-1])) - set(numbers))
        raise PairingError(
            f"'{model.id}' has layers up to {numbers[-1]} under '{decoder.prefix}' but no layer "
            f"{missing}. Is a shard missing?"
        )
    for (layer, rest), spec in decoder.tensors.items():
        if rest.startswith("encoder_attn.") or model.config.get("is_encoder_decoder") is True:
            raise PairingError(
                f"'{model.id}' is an encoder-decoder model ('{spec.name}'). Merges need a language "
                f"model that is a decoder only, such as Llama or Qwen."
            )
        if _NOT_GATED.fullmatch(rest):
            raise PairingError(
                f"'{spec.name}' of '{model.id}' {spec.shape} in layer {layer} belongs to a layout "
                f"without the projections gate, up and down (as in OPT, Phi-2, StarCoder2 and "
                f"Persimmon). This layout is not supported."
            )


def is_in_layer(name: str) -> bool:
    """Return whether a tensor belongs to a numbered layer of some part of the model."""
    return _LAYER.fullmatch(name) is not None


def _no_decoder(role: str, model: Checkpoint, groups: Mapping[Any, Any]) -> PairingError:
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
            if _BUFFER.fullmatch(rest):
                apart[spec.name] = BUFFER
            else:
                tensors[ordinal, rest] = spec
    for number in set(layers) - set(text):
        reason = PREDICTION if _PREDICTS in layers[number] else CROSS_ATTENTION
        names = (split_address(spec.name).name for spec in layers[number].values())
        apart |= dict.fromkeys(names, reason)
    return Decoder(prefix, tuple(text), tensors, apart)


def _is_text_layer(layer: Mapping[str, TensorSpec]) -> bool:
    """Return True unless cross-attention replaces self-attention, or later tokens are predicted."""
    if _PREDICTS in layer:
        return False
    crossed = any(rest.startswith("cross_attn.") for rest in layer)
    return not crossed or any(rest.startswith("self_attn.") for rest in layer)
