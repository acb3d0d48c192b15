"""Compare the configs of two language models in all that shapes a forward pass.

In: two checkpoints. Out: the settings that differ, with both values. Everything in a config counts
except what is listed here as metadata, training, generation or shapes, so that settings of new
architectures are compared without a change of this module. Settings that one config omits have the
default of transformers for its model type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ipmerge_core.errors import CheckpointError, explained, first_line
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.decoders import inner_config
from ipmerge_core.runtime.imports import IMPORTING, find_torchvision

NOT_SET = "not set"
# Keys that do not change what a text model computes from its weights.
_METADATA = """
    _name_or_path architectures auto_map dtype torch_dtype transformers_version model_type id2label
    label2id problem_type return_dict tokenizer_class quantization_config output_attentions
    output_hidden_states output_router_logits use_cache is_encoder_decoder chunk_size_feed_forward
    attn_implementation _attn_implementation unsloth_version
"""
_TRAINING = "gradient_checkpointing pretraining_tp router_jitter_noise"
_GENERATION = """
    temperature top_k top_p typical_p do_sample max_length min_length max_new_tokens num_beams
    num_beam_groups num_return_sequences repetition_penalty length_penalty early_stopping
    no_repeat_ngram_size diversity_penalty bad_words_ids cache_implementation
"""
# Of the training samples; a RoPE that depends on a length states it in its own parameters.
_LENGTHS = "max_position_embeddings max_sequence_length seq_length model_max_length"
# Compared with the tensors; layers without a counterpart are kept.
_SHAPES = "hidden_size intermediate_size num_hidden_layers cross_attention_layers"
_IMAGE_POSITIONS = "mrope_section mrope_interleaved"  # those of text are the same without them
_OTHER_KEYS = frozenset(
    " ".join((_METADATA, _TRAINING, _GENERATION, _LENGTHS, _SHAPES, _IMAGE_POSITIONS)).split()
)
_OTHER_NAMES = re.compile(
    r"(^|_)(vision|visual|image|video|audio|mm|projector)_|(^|_)token_(id|ids|index)$|"
    r"dropout|pdrop|(^|_)loss(_|$)|initializer|init_std"
)
_SAME_KEY = {"hidden_activation": "hidden_act", "type": "rope_type"}
_NEUTRAL: tuple[object, ...] = (None, False, 0, 1, "default", [], {})


class Difference(NamedTuple):
    """A setting with different values; NOT_SET where the config has no such setting."""

    key: str
    ours: object
    theirs: object


class Settings(NamedTuple):
    """The settings of a language model.

    Attributes:
        model_type: its type in transformers.
        values: the settings by key; those of RoPE are among them.
        outer: settings of the multimodal model around it, which apply where `values` has none.
        is_mixed: whether `values` also holds settings of other parts of a multimodal model.
    """

    model_type: object
    values: Mapping[str, object]
    outer: Mapping[str, object]
    is_mixed: bool = False


def forward_differences(model: Checkpoint, base: Checkpoint) -> list[Difference]:
    """List the settings that shape a forward pass and differ between a model and its base.

    Raises: CheckpointError if transformers knows the type of a model and rejects its config.
    """
    ours, theirs = _written(model), _written(base)
    if ours.model_type != theirs.model_type or ours.values.keys() != theirs.values.keys():
        ours, theirs = _with_defaults(model, ours), _with_defaults(base, theirs)
    return list(_differences(ours, theirs))


def _differences(ours: Settings, theirs: Settings) -> Iterator[Difference]:
    for key in sorted({*ours.values, *theirs.values}):
        pair = [side.values.get(key, side.outer.get(key, NOT_SET)) for side in (ours, theirs)]
        if pair[0] == pair[1] or all(value in (None, False, NOT_SET) for value in pair):
            continue
        one_sided = NOT_SET in pair
        if one_sided and (ours.is_mixed or theirs.is_mixed or _is_neutral(pair)):
            continue
        yield Difference(key, *pair)


def _is_neutral(pair: list[object]) -> bool:
    """Return whether the set value has the effect of a setting that does not exist."""
    (value,) = (value for value in pair if value != NOT_SET)
    return any(value == neutral for neutral in _NEUTRAL)


def _written(model: Checkpoint) -> Settings:
    """Return the settings as the config states them."""
    inner = inner_config(model.config)
    own = model.config if inner is None else inner
    return Settings(
        model_type=own.get("model_type"),
        values=_forward_only(own),
        outer={} if inner is None else _stated(_forward_only(model.config)),
        is_mixed=inner is None and any(_OTHER_NAMES.search(f"{key}_") for key in own),
    )


def _with_defaults(model: Checkpoint, written: Settings) -> Settings:
    """Complete the settings with transformers' defaults, if it knows the model's type."""
    with IMPORTING:
        find_torchvision()
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    def explain(error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The config.json of '{model.id}' is not valid for its type "
            f"{model.config.get('model_type')!r} ({first_line(error)}). Restore the original file."
        )

    types = [model.config.get("model_type")]
    types += [written.model_type] if written.model_type is not None else []
    if not all(isinstance(name, str) and name in CONFIG_MAPPING_NAMES for name in types):
        return written
    with explained(explain):
        whole = AutoConfig.for_model(**model.config).get_text_config(decoder=True)
        known = _forward_only(whole.to_dict())
    stated = {
        key: value
        for key, value in written.outer.items()
        if key in known and key not in written.values
    }
    return Settings(whole.model_type, {**known, **stated}, {})


def _forward_only(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the settings that shape a forward pass, each under one name."""
    flat = {key: value for key, value in config.items() if not key.startswith("rope_")}
    flat |= _rope(config)
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if flat.get("head_dim") is None and isinstance(heads, int) and isinstance(width, int) and heads:
        flat["head_dim"] = width // heads
    if flat.get("num_key_value_heads") is None and heads is not None:
        flat["num_key_value_heads"] = heads
    if flat.pop("use_sliding_window", None) is False:
        flat["sliding_window"] = None
    if not flat.get("sliding_window"):
        flat.pop("max_window_layers", None)
    layers = flat.get("layer_types")
    if isinstance(layers, list) and set(map(str, layers)) <= {"full_attention"}:
        del flat["layer_types"]
    named = {_name(key): value for key, value in flat.items()}
    return {
        key: value
        for key, value in named.items()
        if key not in _OTHER_KEYS and not _OTHER_NAMES.search(key) and not _is_part(value)
    }


def _rope(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the parameters of RoPE, which configs of different versions nest differently."""
    found: dict[str, object] = {"rope_type": "default"}
    if config.get("rope_theta") is not None:
        found["rope_theta"] = config["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        nested = config.get(name)
        if not isinstance(nested, dict):
            continue
        for key, value in nested.items():
            if isinstance(value, dict):  # one RoPE per kind of layer
                prefix = "" if key == "full_attention" else f"{key}."
                found |= {prefix + _name(inner): each for inner, each in value.items()}
            elif value is not None:
                found[_name(key)] = value
    if found["rope_type"] == "mrope":  # the RoPE of text
        found["rope_type"] = "default"
    return found


def _name(key: str) -> str:
    return _SAME_KEY.get(key, key)


def _is_part(value: object) -> bool:
    """Return whether a value is the config of another part of the model."""
    return isinstance(value, dict) and "model_type" in value


def _stated(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if value is not None}
