"""Find the modules of transformers that stored matrices are loaded into.

In: an MLLM and the names of some of its tensors. Out: the names of their modules in memory, which
PEFT needs. Files keep the names of the version of transformers that wrote them, and families differ
in where their decoder is: the model is built from its config without memory for weights (on the
meta device), and transformers' own mapping is applied to the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ipmerge_core.errors import PlanError, explained
from ipmerge_core.inference.encoding import explain_loading
from ipmerge_core.inference.loading import refuse_layers
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.runtime.imports import IMPORTING


def module_names(mllm: Checkpoint, tensors: Iterable[str]) -> dict[str, str]:
    """Return the name of the module, from the root of the model, for each tensor.

    A type that transformers does not know is loaded by code of its own, which names modules as in
    the files.

    Args:
        mllm: the model that the adapter is for.
        tensors: names of its stored matrices, each the weight of a linear layer.

    Raises:
        ModelLoadError: transformers cannot build the model of this config.
        PlanError: the model has no such module, or one of another shape, or a stack of matrices.
    """
    with IMPORTING:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if mllm.config.get("model_type") not in CONFIG_MAPPING_NAMES:
        return {tensor: tensor.removesuffix(".weight") for tensor in tensors}
    refuse_layers(mllm)
    with explained(partial(explain_loading, mllm.id, "model")):
        model = model_on_meta(mllm)
    weights = model.state_dict()
    renamed = renamed_tensors(model, weights, mllm.tensors)
    names = {tensor: renamed[tensor] for tensor in tensors}
    for tensor, name in names.items():
        _refuse_misfit(mllm, tensor, name, weights.get(name))
    return {tensor: name.removesuffix(".weight") for tensor, name in names.items()}


def parameter_names(model: Any, tensors: Iterable[str]) -> dict[str, str]:  # noqa: ANN401
    """Return the name of the parameter of a loaded model for each stored tensor.

    Args:
        model: a model of transformers.
        tensors: the names of all tensors in its files, as the renaming of one depends on others.
    """
    return renamed_tensors(model, model.state_dict(), tensors)


def _refuse_misfit(mllm: Checkpoint, tensor: str, name: str, weight: Tensor | None) -> None:
    shape = mllm.spec(tensor).shape
    if weight is not None and weight.ndim > 2:
        raise PlanError(
            f"'{tensor}' of '{mllm.id}' becomes part of the stack '{name}' in memory, which the "
            f"adapter of a linear layer cannot change. Write the merged model instead."
        )
    if weight is None or tuple(weight.shape) != shape or not name.endswith(".weight"):
        has = f"has the shape {tuple(weight.shape)}" if weight is not None else "does not exist"
        raise PlanError(
            f"'{tensor}' of '{mllm.id}' {shape} belongs to '{name}' in memory, which {has}. Do "
            f"config.json and the weights belong to the same model?"
        )


def model_on_meta(mllm: Checkpoint) -> Any:  # noqa: ANN401
    """Build the model of a config without memory for its weights."""
    with IMPORTING:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            AutoModelForMultimodalLM,
        )

    config = AutoConfig.for_model(**mllm.config)
    kinds = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
    fitting = [kind for kind in kinds if type(config) in kind._model_mapping]
    with torch.device("meta"):
        return (fitting or kinds)[0].from_config(config, attn_implementation="eager")


def renamed_tensors(
    model: Any,  # noqa: ANN401
    weights: Mapping[str, Any],
    tensors: Iterable[str],
) -> dict[str, str]:
    """Rename stored tensors as transformers does while it loads them: all of them, in order."""
    with IMPORTING:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    return {
        tensor: rename_source_key(tensor, renamings, converters, prefix, weights)[0]
        for tensor in sorted(tensors)
    }
