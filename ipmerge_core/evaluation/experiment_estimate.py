"""Estimate what an experiment downloads, writes and takes, from headers, before it starts.

In: an `Experiment` and its folder. Out: an `ExperimentEstimate`. Nothing is written or downloaded
but headers, configurations and the rows of the sibling check. The sizes of data sets and the time
of generation are not known before the data and a first batch.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.analysis.analyse import describe
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.evaluation.experiment_folder import ExperimentFolder
from ipmerge_core.merging.estimates import (
    HUB_RATE,
    AnalysisEstimate,
    Estimate,
    check_space,
    estimate_analysis,
    estimate_pair,
)
from ipmerge_core.merging.provenance import is_finished
from ipmerge_core.methods import find_method
from ipmerge_core.models.pairing import TO_FORCE
from ipmerge_core.planning.plan import make_plan
from ipmerge_core.runtime.paths import existing_parent

if TYPE_CHECKING:
    from ipmerge_core.analysis.records import Analysis
    from ipmerge_core.evaluation.experiment import Experiment
    from ipmerge_core.models.pairing import ModelPair


class ExperimentEstimate(NamedTuple):
    """Estimated resources of what an experiment has not done yet. Bytes and seconds.

    Attributes:
        nbytes_models: the MLLM, and the other models if the merge needs their weights again;
            downloaded to the hub's cache unless they are there.
        nbytes_analysis: read over the network by the analysis, and not stored.
        nbytes_merge: at most read again by the merge: matrices whose update is too large to keep.
        nbytes_written: the pack and the merged model, in the folder.
        nbytes_free: on the disk of the folder.
        nbytes_memory: the largest of what a stage needs, excluding the interpreter.
        seconds_download: at the usual rate of the hub.
        seconds_analysis: rough, on the device.
        seconds_merge: rough, on the device; an upper bound unless `is_exact`.
        is_exact: whether the selection of matrices is known.
        tasks: names of the tasks, whose data are downloaded.
        limit: items per task; None for the default of each.
        replies: models that answer each item and prompt.
    """

    nbytes_models: int
    nbytes_analysis: int
    nbytes_merge: int
    nbytes_written: int
    nbytes_free: int
    nbytes_memory: int
    seconds_download: float
    seconds_analysis: float
    seconds_merge: float
    is_exact: bool
    tasks: tuple[str, ...]
    limit: int | None
    replies: int = 2


def estimate_experiment(experiment: Experiment, out: str | Path) -> ExperimentEstimate:
    """Estimate an experiment, or what is left of it in its folder.

    Raises: as the first stages of `iter_experiment`: what they refuse is refused here.
    """
    folder, device = ExperimentFolder(out), experiment.evaluation.device
    pair, _ = folder.open(experiment.models)
    pair.require_common_base(TO_FORCE, force=experiment.force)
    if not folder.model.exists():
        check_space(pair, folder.model)
    pack = folder.finished_pack(describe(pair)[0], Options()._asdict())
    analysis = estimate_analysis(pair, Options(), device)
    merge, is_exact = _merge_of(experiment, folder, pair, pack, analysis.seconds)
    nbytes_read = _read_only(experiment, pair, analysis)
    stored = [model for model in experiment.downloaded(pair) if model.files.remote]
    nbytes_models = sum(model.nbytes for model in stored)
    nbytes_pack = analysis.nbytes_written if pack is None else 0
    return ExperimentEstimate(
        nbytes_models=nbytes_models,
        nbytes_analysis=nbytes_read if pack is None else 0,
        nbytes_merge=min(nbytes_read, merge.nbytes_fetched),
        nbytes_written=nbytes_pack + merge.nbytes_written,
        nbytes_free=shutil.disk_usage(existing_parent(folder.path)).free,
        nbytes_memory=max(analysis.nbytes_memory, merge.nbytes_memory, pair.mllm.nbytes),
        seconds_download=nbytes_models / HUB_RATE,
        seconds_analysis=analysis.seconds if pack is None else 0.0,
        seconds_merge=merge.seconds,
        is_exact=is_exact,
        tasks=tuple(task.name for task in experiment.tasks),
        limit=experiment.evaluation.limit,
    )


def _read_only(experiment: Experiment, pair: ModelPair, analysis: AnalysisEstimate) -> int:
    """Return the bytes of the analysed matrices of models that are not downloaded."""
    if not experiment.keeps_updates:
        return 0
    mllm = sum(pair.mllm.read_size(matrix.mllm) for matrix in pair.matrices)
    return analysis.nbytes_fetched - mllm * pair.mllm.files.remote


def _merge_of(
    experiment: Experiment,
    folder: ExperimentFolder,
    pair: ModelPair,
    pack: Analysis | None,
    seconds: float,
) -> tuple[Estimate, bool]:
    """Estimate the merge, and whether its matrices are known; all of them before the analysis."""
    method, device = find_method(experiment.plan["method"]), experiment.evaluation.device
    if pack is not None or not method.needs_analysis:
        source = pair if pack is None else pack
        plan = make_plan(source, options=experiment.options, **experiment.plan)
        if is_finished(plan, folder.model):
            return Estimate(0, 0, 0, 0, 0, 0), True
        return estimate_pair(plan, pair, folder.model, device), True
    most = make_plan(pair, method="task_arithmetic")
    found = estimate_pair(most, pair, folder.model, device)
    return found._replace(seconds=found.seconds + seconds), False
