"""Write a model with a LoRA adapter as a folder of full weights, for programs without PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file

from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.runtime.atomic import atomic_path, writing


def fold(model: Checkpoint, folder: Path) -> Path:
    """Write the values of all tensors, and the other files of a model, to a new folder.

    The names, the shards and the dtypes are those of the base. An existing folder is returned as it
    is: it appears only when it is complete, so that its name should identify the content.

    Raises: RunError if the disk is full or read-only.
    """
    if folder.is_dir():
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for name, data in _other_files(model):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(data)
            for shard in model.shards:
                names = [name for name, spec in model.tensors.items() if spec.shard == shard]
                tensors = {name: model.read(name).contiguous() for name in names}
                save_file(tensors, temporary / shard, metadata={"format": "pt"})
    return folder


def _other_files(model: Checkpoint) -> Iterator[tuple[str, bytes]]:
    for name in model.files.names():
        if model.weights.is_copied(name):
            yield name, bytes(model.files.read(name))
