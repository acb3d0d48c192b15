"""Write a fine-tuned model in the layout of the MLLM it started from.

In: the source checkpoint, the trained model in memory and the parameter of each stored tensor. Out:
a complete model folder: names, shards, dtypes and other files of the source, the trained tensors
replaced, every other one bitwise equal to the source's, with a manifest and a model card. Never
`save_pretrained`, which renames tensors between versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipmerge_core.errors import PairingError, RunError
from ipmerge_core.finetuning.provenance import FORMAT
from ipmerge_core.models.checkpoint import DTYPES, Checkpoint, count_non_finite, tensor_bytes
from ipmerge_core.models.writer import MANIFEST, CheckpointWriter, in_file_order
from ipmerge_core.runtime.pipeline import keep_freed_memory


class WriteStep(NamedTuple):
    """A tensor that was written."""

    name: str
    trained: bool
    nbytes_done: int
    nbytes_total: int


def stored_parameters(
    model: nn.Module, source: Checkpoint, names: Mapping[str, str]
) -> dict[str, str]:
    """Return the trained parameter of each stored tensor that has one, before any training.

    Raises: PairingError for a trained parameter that no stored tensor of its shape corresponds to,
        such as the stack of a mixture of experts: it could not be written back.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {
        stored: name
        for stored, name in names.items()
        if name in trained and tuple(trained[name].shape) == source.spec(stored).shape
    }
    lost = sorted(set(trained) - set(found.values()))
    if lost:
        raise PairingError(
            f"'{lost[0]}' and {len(lost) - 1} more trained parameters of '{source.id}' are stored "
            f"in another shape, so that they could not be written back. DRIFT supports decoders "
            f"whose tensors are stored as they are in memory; mixtures of experts are not."
        )
    return found


def iter_write(
    source: Checkpoint,
    model: nn.Module,
    stored: Mapping[str, str],
    out: Path,
    run: str,
    documents: Mapping[str, str],
) -> Iterator[WriteStep]:
    """Write the model folder and yield a step per tensor; an unfinished one is resumed.

    Args:
        source: the model that training started from.
        model: the trained model.
        stored: the result of `stored_parameters`.
        out: the output folder.
        run: identifies the work.
        documents: further files by name, written over those of the source.

    Raises: RunError if the disk is full, or a weight is NaN or infinite in its stored dtype.
    """
    keep_freed_memory()
    done, total = 0, source.nbytes
    with CheckpointWriter(source, out, run, resume=True) as writer:
        for spec in in_file_order(source):
            name = stored.get(spec.name)
            if spec.name in writer.done:
                pass  # by an earlier process, from the same checkpoint
            elif name is None:
                for offset, piece in _pieces(source, spec.name):
                    writer.write_piece(spec.name, offset, piece)
            else:
                values = model.get_parameter(name).detach().to("cpu", DTYPES[spec.dtype])
                _refuse_non_finite(spec.name, values)
                writer.write(spec.name, tensor_bytes(values))
            done += spec.nbytes
            yield WriteStep(spec.name, name is not None, done, total)
        writer.audit([spec.name for spec in in_file_order(source)])
        writer.finish(lambda: documents)


def _pieces(source: Checkpoint, name: str) -> Iterator[tuple[int, bytearray]]:
    """Yield the bytes of a tensor with their offsets; of an empty one, an empty piece."""
    offset = 0
    for piece in source.iter_bytes(name) if source.spec(name).nbytes else [bytearray()]:
        yield offset, piece
        offset += len(piece)


def _refuse_non_finite(name: str, values: Tensor) -> None:
    if count_non_finite(values):
        raise RunError(
            f"The trained '{name}' has NaN or infinite values in {values.dtype}. The last "
            f"checkpoint is kept; train with a lower learning rate or a smaller strength."
        )


def documents_of(
    sources: Mapping[str, Checkpoint],
    names: Mapping[str, str],
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, str]:
    """Return the manifest and the model card of a result.

    Args:
        sources: the model that training started from as "mllm", with added tokens if there are any,
            and the model that the prior leads to as "math".
        names: the models that were requested: the start with added tokens is temporary.
        settings: the settings of the run.
        facts: what the run measured: its prior, data, curves and time.
    """
    from ipmerge_core.version import __version__

    manifest = {
        "format": FORMAT,
        "version": 1,
        "engine": __version__,
        "torch": torch.__version__,
        "settings": settings,
        "sources": {role: _source(model, names[role]) for role, model in sources.items()},
        **facts,
    }
    return {MANIFEST: json.dumps(manifest, indent=1) + "\n", "README.md": _card(manifest)}


def _source(model: Checkpoint, name: str) -> dict[str, str | None]:
    return {
        "id": name,
        "revision": model.files.revision,
        "fingerprint": model.fingerprint,
    }


def _card(manifest: Mapping[str, Any]) -> str:
    """Return the model card; names of folders are reduced to safe characters."""
    prior, training = manifest["settings"]["prior"], manifest["settings"]["training"]
    rule = "no prior (plain fine-tuning)" if prior["rule"] == "none" else f"rule {prior['rule']}"
    names = {role: Path(source["id"]).name for role, source in manifest["sources"].items()}
    safe = {
        r: "".join(c if c.isalnum() or c in "._-" else "_" for c in n) for r, n in names.items()
    }
    rows: Sequence[tuple[str, object]] = (
        ("MLLM", f"`{safe['mllm']}`"),
        ("expert", f"`{safe['math']}`"),
        ("rule", prior["rule"]),
        ("strength", prior["strength"]),
        ("modules", " ".join(m if m.isalnum() else "(pattern)" for m in prior["scope"]["modules"])),
        ("learning rate", training["learning_rate"]),
        ("optimizer steps", manifest["steps"]),
        ("parameters with a prior", manifest["prior"]["parameters"]),
    )
    return "\n".join(
        [
            "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n"
            "tags:\n- drift\n- ipmerge\n---\n",
            "# A fine-tuned vision-language model\n",
            f"Made by IPMerge {manifest['engine']} with DRIFT (arXiv 2510.15050), {rule}.\n",
            "| setting | value |\n|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "\n`ipmerge.json` lists all settings and the curves. No benchmark was run: evaluate "
            "perception and reasoning before using the model.\n",
        ]
    )
