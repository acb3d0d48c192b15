"""Put other weights into a loaded model for a while; all others stay where they are.

In: a loaded model, and tensors by the names of its files. Out: the same model with these tensors in
their place, for as long as a context lasts. Stacks of experts and fused tensors are built from the
tensors of the files as transformers builds them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ipmerge_core.errors import ModelLoadError, PlanError, RunCancelled, explained
from ipmerge_core.inference.encoding import explain_loading
from ipmerge_core.inference.loading import LoadedModel
from ipmerge_core.inference.module_names import model_on_meta, renamed_tensors
from ipmerge_core.inference.placement import reported_loading
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.runtime.imports import IMPORTING
from ipmerge_core.runtime.turns import Turns

# What modules remember of the prompt between two steps, outside of the cache.
_REMEMBERED = ("rope_deltas",)


def weights_in_memory(mllm: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert stored tensors to the weights that transformers makes of them, by their names there.

    Where a weight in memory is built from several stored tensors, the others are read from `mllm`.
    Rename, split, fuse and stack are those of transformers; the values stay the same.

    Raises: ModelLoadError if transformers cannot build the model or a weight.
    """
    with IMPORTING:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if mllm.config.get("model_type") not in CONFIG_MAPPING_NAMES:
        return dict(tensors)
    with explained(partial(explain_loading, mllm.id, "model")):
        model = model_on_meta(mllm).to(torch.float32)  # exact for every smaller dtype
        weights = model.state_dict()
        places = renamed_tensors(model, weights, mllm.tensors)
        targets = {places[name] for name in tensors}
        needed = {
            name: tensors[name] if name in tensors else mllm.read(name)
            for name, place in places.items()
            if place in targets
        }
        _load_into(model, needed)
    return {
        name: value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
        if not value.is_meta and weights[name].is_meta
    }


def _load_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let transformers convert tensors and put them into a model on the meta device."""
    with IMPORTING:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

    mapping = get_model_conversion_mapping(model)
    how = LoadStateDictConfig(weight_mapping=mapping, dtype=torch.float32)
    with reported_loading(lambda _: None, ()):  # no bar of its own per merge
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), how, None)
    found = [*info.unexpected_keys, *info.conversion_errors]
    if found:
        raise ModelLoadError(
            f"The merged tensor '{min(map(str, found))}' has no place in the loaded model. "
            f"Do config.json and the weights belong to the same model?"
        )


class SwappedWeights:
    """Weights that take the place of those of a loaded model, prepared on its device.

    `nbytes` is the memory that they take in addition to the model.

    Raises: ModelLoadError for a quantised model; PlanError for a weight that it does not have.
    """

    def __init__(self, loaded: LoadedModel, weights: Mapping[str, Tensor]) -> None:
        owners = _owners(loaded.model)
        self._swaps: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self.nbytes = 0
        for name, value in weights.items():
            current = _parameter(loaded, name)
            if current.shape != value.shape:
                raise PlanError(
                    f"The merged '{name}' has the shape {tuple(value.shape)} and the loaded model "
                    f"{tuple(current.shape)}. Is the plan one of this model?"
                )
            moved = value.to(current.device, current.dtype)
            new = nn.Parameter(moved, requires_grad=False)
            self.nbytes += moved.nbytes
            self._swaps += [(module, key, current, new) for module, key in owners[id(current)]]

    def install(self) -> None:
        """Put the weights into the model."""
        for module, key, _, new in self._swaps:
            module._parameters[key] = new

    def remove(self) -> None:
        """Put the model's own weights back."""
        for module, key, old, _ in self._swaps:
            module._parameters[key] = old


def _parameter(loaded: LoadedModel, name: str) -> nn.Parameter:
    try:
        found: nn.Parameter = loaded.model.get_parameter(name)
    except AttributeError as error:
        raise PlanError(
            f"The merged '{name}' is not a weight of the loaded '{loaded.folder.name}'. Is the "
            f"plan one of this model?"
        ) from error
    if not found.is_floating_point() or found.is_meta:
        raise ModelLoadError(
            f"'{loaded.folder.name}' is loaded quantised or partly on disk, so that a merged model "
            f"cannot share its weights. Load it in 16 bit, or use IP-Merging with projection."
        )
    return found


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Find the modules that hold each parameter; tied weights have several."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                owners.setdefault(id(value), []).append((module, key))
    return owners


class Remembered:
    """What the modules of a model keep between two steps of one generation.

    Some families store positions in a module; another generation on the same model would overwrite
    them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module, name)
            for module in model.modules()
            for name in _REMEMBERED
            if name in vars(module)
        ]
        self._values: list[Any] = [None] * len(self._places)

    def save(self) -> None:
        """Remember the present values."""
        self._values = [getattr(module, name) for module, name in self._places]

    def restore(self) -> None:
        """Put the values back that were saved last; None at the start."""
        for (module, name), value in zip(self._places, self._values, strict=True):
            setattr(module, name, value)


@contextmanager
def swapped(
    loaded: LoadedModel,
    weights: SwappedWeights,
    stops: Sequence[threading.Event] = (),
) -> Iterator[LoadedModel]:
    """Give a loaded model other weights; no other thread runs it meanwhile.

    Yields the model to use inside. Raises: RunCancelled if one of `stops` is set before.
    """
    with loaded.turns.taken(stops) as mine:
        if not mine:
            raise RunCancelled("Stopped while another question was being answered.")
        weights.install()
        try:
            yield replace(loaded, turns=Turns())
        finally:
            weights.remove()
