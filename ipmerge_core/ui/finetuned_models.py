"""Find the fine-tuned models that a user may use, described by the manifests in their folders.

In: a pair, the runs of a `Backend`, and the keys that a browser holds. Out: small plain values. A
model belongs to every pair with the vision-language model that its training started from. In a
dropdown it is the id of its run after `PREFIX`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.finetuning.provenance import FinetunedBy, read_finetuning
from ipmerge_core.ui.finished_merges import Keys, visible_statuses
from ipmerge_core.ui.pairs import list_packs, pair_name
from ipmerge_core.ui.plan_choice import analysis_of

if TYPE_CHECKING:
    from ipmerge_core.runtime.jobs import JobStatus
    from ipmerge_core.ui.backend import Backend

PREFIX = "finetuned:"
REMEDY = "Choose another model, or fine-tune again in the Fine-tune tab."


class FinetunedModel(NamedTuple):
    """The model of a finished run, in a folder that still exists."""

    run: str
    folder: Path
    made: FinetunedBy

    @property
    def value(self) -> str:
        """The value of this model in a dropdown."""
        return f"{PREFIX}{self.run}"

    @property
    def label(self) -> str:
        """Folder, rule and number of steps."""
        rule = "plain fine-tuning" if self.made.rule == "none" else f"DRIFT {self.made.rule}"
        return f"{self.folder.name} · {rule} · {self.made.steps} steps"


def finetuned_of_pair(backend: Backend, pack_id: str, keys: Keys) -> list[FinetunedModel]:
    """List the fine-tuned models of a pair that a user may use, newest first.

    Of several runs that wrote to one folder, the last one counts. Raises: PlanError for an unknown
    pair or one whose analysis has not finished.
    """
    wanted = analysis_of(pack_id).sources.mllm.fingerprint
    found: dict[Path, FinetunedModel] = {}
    for model in map(_opened, visible_statuses(backend, keys)):
        if model and model.made.mllm == wanted:
            found.setdefault(model.folder, model)
    return list(found.values())


def find_finetuned(backend: Backend, pack_id: str, wanted: str, keys: Keys) -> FinetunedModel:
    """Find a fine-tuned model of a pair by its run, or by its value in a dropdown.

    Raises: RunError if there is none that the user may use, or it is of another pair; PlanError for
        an unknown pair.
    """
    run = wanted.removeprefix(PREFIX)
    model = _find(backend, run, keys)
    if model.made.mllm != analysis_of(pack_id).sources.mllm.fingerprint:
        raise RunError(
            f"'{model.folder.name}' was fine-tuned from another vision-language model than that "
            f"of the pair '{pair_name(pack_id)}'. Select its pair, or choose another model."
        )
    return model


def pair_of_finetuned(backend: Backend, run: str, keys: Keys, preferred: str) -> str:
    """Return the id of a pair that a fine-tuned model belongs to, `preferred` if it does.

    Raises: RunError if the model does not exist, or no analysed pair has its MLLM.
    """
    model = _find(backend, run, keys)
    packs = sorted((entry.id for entry in list_packs()), key=lambda pack_id: pack_id != preferred)
    for pack_id in packs:
        with contextlib.suppress(PlanError):  # a pack that cannot be read
            if model.made.mllm == analysis_of(pack_id).sources.mllm.fingerprint:
                return pack_id
    raise RunError(
        f"No analysed pair has the vision-language model that '{model.folder.name}' was fine-tuned "
        f"from. Analyse one first."
    )


def _find(backend: Backend, run: str, keys: Keys) -> FinetunedModel:
    statuses = visible_statuses(backend, keys)
    model = next((_opened(status) for status in statuses if status.id == run), None)
    if model is None:
        raise RunError(
            f"There is no fine-tuned model '{run[:80]}' that this browser may use: its run has not "
            f"finished, or its folder was deleted. {REMEDY}"
        )
    return model


def _opened(status: JobStatus) -> FinetunedModel | None:
    folder = Path(str(status.arguments.get("out", "")))
    made = read_finetuning(folder) if status.state == "finished" else None
    return FinetunedModel(status.id, folder, made) if made else None
