"""Check a fine-tuning without a step, and start it as a run of the app.

In: what the form describes. Out: the findings of a dry run as HTML, and a run that writes a model
folder and its curves. Everything that needs no step is checked before the run starts.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.errors import IPMergeError, PlanError, RunError
from ipmerge_core.runtime.jobs import Claim
from ipmerge_core.ui.finetune.form import Asked
from ipmerge_core.ui.pairs import list_packs, pair_name
from ipmerge_core.ui.plan_choice import analysis_of
from ipmerge_core.ui.runs import FINETUNING, curves_folder
from ipmerge_core.ui.safe_text import as_html
from ipmerge_core.ui.serving import current_visitor

if TYPE_CHECKING:
    from ipmerge_core.finetuning.train import DriftCheck, DriftRequest
    from ipmerge_core.runtime.jobs import Started
    from ipmerge_core.ui.backend import Backend

COMMAND = "ipmerge drift --mllm FOLDER --math MODEL --data train.jsonl -o OUT"
_EXAMPLES = 2


class Models(NamedTuple):
    """The addresses of the models of a pair; empty if they are not known."""

    mllm: str = ""
    math: str = ""


def models_of(backend: Backend, pack_id: str) -> Models:
    """Return the models of a pair: the folder of the MLLM, and the first expert."""
    with contextlib.suppress(IPMergeError, OSError):
        sources = analysis_of(pack_id).sources
        mllm = sources.mllm.location
        with contextlib.suppress(IPMergeError, OSError):  # not downloaded yet
            mllm = str(backend.base_folder(pack_id))
        return Models(mllm, sources.math[0].location)
    return Models()


def named(backend: Backend, asked: Asked) -> Asked:
    """Return the request with an output folder: an unused name if none was typed."""
    if asked.name:
        return asked
    stem = f"{Path(asked.mllm).name or 'model'}-{asked.settings.prior.rule}".replace("_", "-")
    return asked._replace(name=backend.free_name_like(stem) or backend.free_name_like("finetuned"))


def check(backend: Backend, asked: Asked) -> DriftCheck:
    """Check names, shapes, memory, data and the first examples of a request with an output.

    Raises: as `check_drift`; RunError if the memory does not suffice, unless it is forced.
    """
    from ipmerge_core.finetuning.train import check_drift

    _refuse_hosted(backend)
    backend.import_libraries()
    device = backend.device_for(asked.device, fp64=False)
    found = check_drift(_request(backend, asked), device=device, shown=_EXAMPLES)
    if not asked.force:
        found.memory.refuse_too_large()
    return found


def start(backend: Backend, asked: Asked, *, owner: str = "") -> Started:
    """Start the run of a request with an output folder.

    Raises: PlanError for a device that is not available, CheckpointError if the folder is not
        empty, FolderInUseError or RunError if it cannot be used or too many runs are in progress.
    """
    from ipmerge_core.finetuning.recording import iter_recorded_drift
    from ipmerge_core.models.writer import check_output

    _refuse_hosted(backend)
    out = check_output(backend.output_folder(asked.name))
    curves_folder().mkdir(parents=True, exist_ok=True)
    settings = asked.settings
    pack_id = pack_of(asked)
    arguments = {
        "mllm": asked.mllm,
        "math": asked.math,
        "data": asked.data,
        "out": str(out),
        "settings": settings.as_json(),
        "curves": str(curves_folder() / f"{secrets.token_hex(8)}.jsonl"),
        "math_base": asked.math_base,
        "limit": asked.limit,
        "device": backend.device_for(asked.device, fp64=False),
        "force": asked.force,
    }
    rule = settings.prior.rule
    names = f"{Path(asked.mllm).name} + {Path(asked.math).name}"
    return backend.store.start(
        iter_recorded_drift,
        arguments,
        title=f"Fine-tune {Path(asked.mllm).name} into {out.name}",
        claim=Claim(str(out)),
        owner=owner,
        about={
            "kind": FINETUNING,
            "pack": pack_id,
            "pair": pair_name(pack_id) if pack_id else names,
            "method": "plain fine-tuning" if rule == "none" else f"DRIFT {rule}",
            "samples": asked.data,
        },
        visitor=current_visitor(),
    )


def pack_of(asked: Asked) -> str:
    """Return the id of the analysed pair of the models; empty if there is none."""
    for entry in list_packs():
        with contextlib.suppress(PlanError):
            sources = analysis_of(entry.id).sources
            experts = {expert.location for expert in sources.math}
            if sources.mllm.location == asked.mllm and asked.math in experts:
                return entry.id
    return ""


def found_html(found: DriftCheck, out: str) -> str:
    """Format the findings of a check: facts, warnings, and the first examples."""
    facts = (
        ("Prior", f"acts on {found.parameters} parameters: {found.description}"),
        ("Distance", f"the expert differs by {found.relative_norm:.2%} of the weights (sampled)"),
        ("Memory", found.memory.describe()),
        ("Data", found.data),
        ("Output", out),
    )
    rows = "".join(f"<dt>{name}</dt><dd>{as_html(text)}</dd>" for name, text in facts)
    notes = "".join(f'<li class="warning">{as_html(text)}</li>' for text in found.warnings)
    shown = "".join(f"<li><pre>{_marked(text)}</pre></li>" for text in found.examples)
    return (
        f'<dl class="facts">{rows}</dl>'
        + (f'<ul class="findings">{notes}</ul>' if notes else "")
        + f"<p>First examples; the loss is on the marked text:</p><ol>{shown}</ol>"
    )


def _marked(text: str) -> str:
    """Escape an example, and mark its learned parts, which `show_masked` puts in brackets."""
    from ipmerge_core.finetuning.examples import CLOSE, OPEN

    return as_html(text).replace(OPEN, "<mark>").replace(CLOSE, "</mark>")


def _request(backend: Backend, asked: Asked) -> DriftRequest:
    from ipmerge_core.finetuning.train import DriftRequest

    out = str(backend.output_folder(asked.name))
    return DriftRequest(
        asked.mllm, asked.math, asked.data, out, asked.settings, asked.math_base, asked.limit
    )


def _refuse_hosted(backend: Backend) -> None:
    if backend.hosted:
        raise RunError(f"This Space does not fine-tune. Run it on your machine: {COMMAND}")
