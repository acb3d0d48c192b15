"""Layer knock-out: evaluate a model with one module of one block replaced at a time.

In: a model, or a plan whose unmerged and merged models are compared; cuts and tasks. Out: a step
per batch, and a `Knockout`: one `Report` for each model, in which every cut is compared with the
uncut model on the same items. Cuts follow the merge: the merged weights are in place before a
module is replaced. No model is written.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import PlanError
from ipmerge_core.evaluation.cuts import BLOCKS, Cut, CutMatrix, CutValue, list_cuts, strided
from ipmerge_core.evaluation.evaluate import EvaluationSettings, EvaluationStep, iter_evaluation
from ipmerge_core.evaluation.points import UNMERGED, Point
from ipmerge_core.evaluation.report import WHOLE, Report
from ipmerge_core.evaluation.result_files import ResultFile
from ipmerge_core.methods.declarations import relayed
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.runtime.input_files import CLOSED, InvalidContentError, Schema
from ipmerge_core.runtime.paths import resolve_path
from ipmerge_core.tasks.registry import find_tasks

if TYPE_CHECKING:
    from ipmerge_core.evaluation.replies import ReplyStore
    from ipmerge_core.evaluation.subjects import Subject
    from ipmerge_core.tasks.items import Task

MERGED = "merged"  # the name of the merged model in a result
Steps = Generator[EvaluationStep, None, "Knockout | None"]


@dataclass(frozen=True)
class CutFacts:
    """A cut of a result."""

    layer: int
    module: str
    value: str

    @classmethod
    def of(cls, cut: Cut) -> CutFacts:
        """Describe a cut."""
        return cls(cut.layer, cut.module, cut.value)


@dataclass(frozen=True)
class Knockout(ResultFile):
    """The result of a knock-out.

    `reports` has one report per model ("unmerged", "merged", or the name of a folder); its first
    subject is the uncut model, and the others are the cuts in their order.
    """

    FORMAT = "ipmerge-knockout"

    name: str
    plan: str  # the hash; "" without a plan
    digest: str
    cuts: tuple[CutFacts, ...]
    reports: dict[str, Report]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row per model, cut, task and part: scores, paired test, and growth of replies.

        `accuracy_change` is the paired difference of shares in [-1, 1], `length_change` that of the
        mean lengths relative to the uncut model.
        """
        for model, report in self.reports.items():
            uncut, *others = report.subjects
            for cut, name in zip(self.cuts, others, strict=True):
                for task in report.tasks:
                    found = _rows_of(report, uncut, name, task.name)
                    yield from ({"model": model, **_described(cut), **row} for row in found)

    def summary(self) -> KnockoutMap:
        """Return the changes of the scores alone, which the layer map draws."""
        changes: dict[str, dict[str, float]] = {}
        for row in self.rows():
            if row["part"] in ("math", "perception") and row["n"]:
                place = f"{row['layer']}.{row['module']}"
                changes.setdefault(f"{row['model']} {row['part']}", {})[place] = round(
                    row["accuracy_change"], 6
                )
        return KnockoutMap(self.name, self.plan, changes)

    def to_csv(self) -> str:
        """Return the rows as CSV."""
        rows = list(self.rows())
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


@dataclass(frozen=True)
class KnockoutMap(ResultFile):
    """The change of the score of every model and group of items, by "layer.module"."""

    FORMAT = "ipmerge-knockout-map"

    name: str
    plan: str
    changes: dict[str, dict[str, float]]


def _described(cut: CutFacts) -> dict[str, Any]:
    return {"layer": cut.layer, "module": cut.module, "replaced_by": cut.value}


def _rows_of(report: Report, uncut: str, cut: str, task: str) -> Iterator[dict[str, Any]]:
    before, after = report.result(uncut, task), report.result(cut, task)
    known = [each for each in report.comparisons if (each.second, each.task) == (cut, task)]
    tests = {each.part: each for each in known}
    mean, length = after.length.mean_tokens, before.length.mean_tokens
    for part in after.parts:
        found, first = tests[part.part], before.part(part.part)
        whole = part.part == WHOLE  # lengths are those of all replies to a task
        yield {
            "task": task,
            "part": part.part,
            "right": part.right,
            "n": part.n,
            "low": part.low,
            "high": part.high,
            "uncut_right": first.right if first else "",
            "fixed": found.test.fixed,
            "broken": found.test.broken,
            "p": found.test.p_value,
            "p_holm": found.p_holm,
            "accuracy_change": found.test.difference if found.test.n else "",
            "mean_tokens": mean if whole else "",
            "length_change": mean / length - 1 if whole and length else "",
        }


@dataclass(frozen=True)
class CutChoice:
    """Which modules are knocked out, and what replaces them.

    Attributes:
        value: what replaces the weights.
        modules: "attention", "mlp", or single modules such as "q".
        layers: only these layers; None for all.
        stride: every `stride`-th of the layers.
    """

    __pydantic_config__ = CLOSED

    value: CutValue = "constant"
    modules: tuple[str, ...] = BLOCKS
    layers: tuple[int, ...] | None = None
    stride: int = 1

    def list(self, matrices: Sequence[CutMatrix]) -> list[Cut]:
        """Return the cuts of a model. Raises: PlanError."""
        known = sorted({m.layer for m in matrices} if self.layers is None else set(self.layers))
        layers = strided(known, self.stride)
        return list_cuts(matrices, self.value, layers=layers, modules=self.modules)


def iter_knockout(
    plan: MergePlan,
    tasks: Sequence[Task],
    choice: CutChoice | None = None,
    settings: EvaluationSettings | None = None,
    store: ReplyStore | None = None,
    *,
    force: bool = False,
    stops: Sequence[threading.Event] = (),
) -> Steps:
    """Knock out modules of the unmerged and of the merged model of a plan.

    Replacing weights by those of the unmerged model ("update") is evaluated for the merged model
    alone, since it changes nothing in the other one.

    Args:
        plan: the merge.
        tasks: the tasks; perception guards are not added here.
        choice: the modules and their replacement; by default 1/N for attention and MLP everywhere.
        settings: limits and the device.
        store: where replies are stored; by default in the home folder.
        force: evaluate even if the sibling check refuses the models.
        stops: events that cancel.

    Returns: the result; None in processes of other ranks than 0.

    Raises: as `list_cuts` and `iter_evaluation`.
    """
    from ipmerge_core.evaluation.merged_models import MergedModels

    choice = choice or CutChoice()
    points = [Point(UNMERGED), Point(MERGED, plan)]
    with MergedModels(plan.sources, force=force, stops=stops) as models:
        cuts = choice.list(models.matrices)
        named = {
            point.label: [models.subject(point, cut) for cut in (None, *cuts)]
            for point in (points[1:] if choice.value == "update" else points)
        }
        reports = yield from _evaluated(named, tasks, settings, store, stops)
    if reports is None:
        return None
    return Knockout(plan.name, plan.hash, plan.digest, tuple(map(CutFacts.of, cuts)), reports)


def iter_model_knockout(
    folder: str | Path,
    tasks: Sequence[Task],
    choice: CutChoice | None = None,
    settings: EvaluationSettings | None = None,
    store: ReplyStore | None = None,
    *,
    stops: Sequence[threading.Event] = (),
) -> Steps:
    """Knock out modules of a model folder; arguments as for `iter_knockout`.

    Weights are replaced by those of other models only if the folder is a merge.

    Raises: PlanError for another replacement; CheckpointError if it is not a model.
    """
    from ipmerge_core.evaluation.merged_models import StoredModel

    choice, path = choice or CutChoice(), resolve_path(folder)
    with StoredModel(path, stops) as model:
        cuts = choice.list(model.matrices)
        named = {path.name: [model.subject(cut) for cut in (None, *cuts)]}
        reports = yield from _evaluated(named, tasks, settings, store, stops)
    if reports is None:
        return None
    return Knockout(path.name, "", "", tuple(map(CutFacts.of, cuts)), reports)


def _evaluated(
    named: Mapping[str, Sequence[Subject]],
    tasks: Sequence[Task],
    settings: EvaluationSettings | None,
    store: ReplyStore | None,
    stops: Sequence[threading.Event],
) -> Generator[EvaluationStep, None, dict[str, Report] | None]:
    """Evaluate the cuts of every model, counted together, each against its uncut model."""
    from ipmerge_core.evaluation.answering import Caches

    caches, reports = Caches(), {}
    for number, (model, subjects) in enumerate(named.items()):
        steps = iter_evaluation(subjects, tasks, settings, store, caches=caches, stops=stops)
        found = yield from relayed(steps, partial(_counted, number, len(named)))
        if found is not None:
            reports[model] = found
    return reports or None  # rank 0 has them


def _counted(number: int, models: int, step: EvaluationStep) -> EvaluationStep:
    """Count a step of one model among those of all, which answer equally many items."""
    return step._replace(done=number * step.total + step.done, total=models * step.total)


def iter_knockout_to(
    plan: MergePlan,
    out: str,
    tasks: Sequence[str],
    *,
    choice: Mapping[str, Any] | None = None,
    device: str = "cpu",
    **limits: Any,  # noqa: ANN401 (fields of EvaluationSettings)
) -> Generator[EvaluationStep]:
    """Knock out modules of a plan's models and write the result; a run of the app.

    Args:
        plan: the merge.
        out: file of the result, written at the end.
        tasks: names of tasks; perception guards are added.
        choice: fields of `CutChoice`.
        device: a torch device name.
        **limits: limit, seed, max_new_tokens, batch_size.

    Raises: as `iter_knockout`.
    """
    chosen, settings = read_choice(choice or {}), EvaluationSettings(device=device, **limits)
    result = yield from iter_knockout(plan, find_tasks(tasks), chosen, settings)
    if result is not None:
        result.save(out)


def read_choice(values: Mapping[str, Any]) -> CutChoice:
    """Return a choice from plain values. Raises: PlanError for one that is not valid.

    >>> read_choice({"value": "zero", "modules": ["mlp"], "layers": [0, 2]}).layers
    (0, 2)
    """
    try:
        return Schema[CutChoice](CutChoice).validate(dict(values))
    except InvalidContentError as error:
        raise PlanError(f"The choice of modules to knock out is not valid: {error}.") from error
