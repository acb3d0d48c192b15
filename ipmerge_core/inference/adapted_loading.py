"""Load a model with a LoRA adapter: its base, with the weights that the adapter changes.

In: an adapter folder in the PEFT format, and its base. Out: a `LoadedModel` as if the adapter had
been merged into a model folder. The weights are those that an analysis or a merge of the adapter
reads: computed in fp32, stored in the dtype of the base.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ipmerge_core.errors import ModelLoadError
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.inference.module_names import module_names
from ipmerge_core.models.adapted import AdaptedCheckpoint
from ipmerge_core.models.opening import open_model


def load_with_adapter(
    folder: str | Path,
    device: str = "cpu",
    stops: Sequence[threading.Event] = (),
    *,
    base: str | Path | None = None,
) -> LoadedModel:
    """Load a model folder, or an adapter folder together with its base.

    Args:
        folder: a model folder, or an adapter folder.
        device: a torch device name, or "auto".
        stops: events that cancel loading.
        base: the base of an adapter; by default the one that it names.

    Raises: as `load_model`; PlanError for an adapter of a matrix that is part of a stack in memory;
        ModelLoadError for an adapter that changes the number of rows of a tensor.
    """
    import torch

    found = open_model(folder, base=base)
    if not isinstance(found, AdaptedCheckpoint):
        return load_model(folder, device, stops)
    loaded = load_model(found.base.id, device, stops)
    names = module_names(found.base, found.changed)
    with torch.no_grad():
        for tensor, module in names.items():
            weight = loaded.model.get_parameter(f"{module}.weight")
            value = found.read(tensor)
            if value.shape != weight.shape:
                raise ModelLoadError(
                    f"The adapter '{found.id}' changes '{tensor}' to the shape "
                    f"{tuple(value.shape)}; the base has {tuple(weight.shape)}. Merge it into the "
                    f"weights (merge_and_unload) and use the merged model."
                )
            weight.copy_(value.to(weight.dtype))
    return replace(loaded, fingerprint=found.fingerprint, nbytes=found.nbytes)
