"""Open a model in any supported form: a folder or hub id with weights, or a LoRA adapter.

In: a folder, a hub id, or an opened `Checkpoint`. Out: a `Checkpoint`; its class is determined by
the files of the folder. `checkpoint.py` opens folders in which full weights are required.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from ipmerge_core.errors import CheckpointError, PairingError
from ipmerge_core.models.adapted import AdaptedCheckpoint
from ipmerge_core.models.adapter_config import AdapterConfig
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.files import Files, find_files, is_hub_id
from ipmerge_core.models.weight_files import ADAPTER_CONFIG, is_adapter

Source: TypeAlias = str | Path | Checkpoint


def open_model(source: Source, *, base: Source | None = None, hub_only: bool = False) -> Checkpoint:
    """Open a model by its headers, without reading weights; an adapter together with its base.

    Args:
        source: a folder, a hub id `org/name[@revision]`, or a Checkpoint, which is returned.
        base: the model that an adapter changes; by default the one that `adapter_config.json`
            names. It is opened only for an adapter.
        hub_only: accept only hub ids, for untrusted input.

    Raises:
        CheckpointError: the model does not exist, has no supported weights, or is an adapter that
            does not fit its base.
    """
    if isinstance(source, Checkpoint):
        return source
    files = find_files(source, hub_only=hub_only)
    if not is_adapter(files.names()):
        return Checkpoint.of(files)
    config = AdapterConfig.read(files)
    if base is None:
        return AdaptedCheckpoint(files, config, _base_of(files, config, hub_only=hub_only))
    return AdaptedCheckpoint(files, config, open_model(base, hub_only=hub_only))


def named_base(experts: Sequence[Source], *, hub_only: bool = False) -> Checkpoint:
    """Open the base that the first adapter among the experts names.

    Raises: CheckpointError as `open_model`; PairingError if no expert is an adapter.
    """
    for expert in experts:
        model = open_model(expert, hub_only=hub_only)
        if isinstance(model, AdaptedCheckpoint):
            return model.base
    raise PairingError(
        "No base given. Specify the text model that the models were fine-tuned from, unless a "
        "math model is an adapter, which names its base."
    )


def _base_of(files: Files, config: AdapterConfig, *, hub_only: bool) -> Checkpoint:
    """Open the base that an adapter names; one from the hub can only name a model on the hub."""
    name = config.base
    if name is None:
        raise CheckpointError(
            f"'{ADAPTER_CONFIG}' of '{files.id}' names no base (base_model_name_or_path): add the "
            f"folder or hub id of the model that the adapter was trained on; for a math model it "
            f"can also be given as the base."
        )
    on_hub = files.revision is not None
    if on_hub and not is_hub_id(name):
        raise CheckpointError(
            f"The adapter '{files.id}' names {name[:80]!r} as its base, which is not a hub id. "
            f"Download the adapter and write the base's folder or hub id into its "
            f"'{ADAPTER_CONFIG}'."
        )
    return Checkpoint.open(name, hub_only=hub_only or on_hub)
