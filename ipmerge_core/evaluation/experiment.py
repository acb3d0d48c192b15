"""Driver of an experiment: check, analyse, plan, merge, record and evaluate a pair in one run.

In: models by folder or hub id, the arguments of a plan, tasks and prompts. Out: a folder with the
pack, the plan, the merged model, recorded replies, the report as JSON and as one HTML file, and a
summary. Everything that can be refused is refused before the analysis. Each stage compares the
content of what it finds with its inputs and continues there, so that a run after an interruption
repeats at most the matrix, the tensor or the batch in progress.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ipmerge_core.analysis.analyse import AnalysisStep, describe, iter_pack_of, kept_variants
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.analysis.updates import Variant, has_updates
from ipmerge_core.errors import IPMergeError, PlanError, RunError
from ipmerge_core.evaluation.evaluate import EvaluationSettings, EvaluationStep, iter_evaluation
from ipmerge_core.evaluation.experiment_folder import ExperimentFolder, Models
from ipmerge_core.evaluation.experiment_summary import summary_of
from ipmerge_core.evaluation.points import UNMERGED, Point
from ipmerge_core.evaluation.recording import (
    Prompt,
    RecordStep,
    iter_model_recording,
    read_prompts,
)
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.report import Report
from ipmerge_core.evaluation.subjects import Subject, subject_of_folder
from ipmerge_core.evaluation.sweeps import Sweep, swept_point
from ipmerge_core.inference.sampling import GenerationSettings
from ipmerge_core.merging.estimates import check_space
from ipmerge_core.merging.merge import iter_merge
from ipmerge_core.merging.provenance import is_finished, read_provenance
from ipmerge_core.merging.steps import MergeStep
from ipmerge_core.methods import find_method
from ipmerge_core.methods.declarations import relayed
from ipmerge_core.models.pairing import TO_FORCE, Finding, ModelPair
from ipmerge_core.planning.options import PlanOptions
from ipmerge_core.planning.plan import MergePlan, make_plan
from ipmerge_core.planning.scope import choose_anchor
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.processes import Ranks

if TYPE_CHECKING:
    from ipmerge_core.models.checkpoint import Checkpoint
    from ipmerge_core.tasks.items import Task

Stage = Literal["check", "download", "analysis", "plan", "merge", "records", "evaluation", "report"]
STAGES: tuple[Stage, ...] = (
    "check", "download", "analysis", "plan", "merge", "records", "evaluation", "report",
)  # fmt: skip
MERGED = "merged"
Page = Callable[[Sweep, Path], str]  # a result and the file of its pack, as one HTML file


@dataclass(frozen=True)
class Experiment:
    """What an experiment does.

    Attributes:
        models: the pair.
        tasks: the tasks, with their guards.
        plan: arguments of `make_plan` other than its options.
        options: the options of the plan.
        evaluation: items, limits and the device of the evaluation.
        prompts: a jsonl file of prompts to record; None for the built-in ones.
        lengths: limits of recorded replies.
        force: continue even if the sibling check refuses the models.
    """

    models: Models
    tasks: Sequence[Task]
    plan: Mapping[str, Any] = field(default_factory=dict)
    options: PlanOptions = field(default_factory=PlanOptions)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    prompts: str | Path | None = None
    lengths: GenerationSettings = field(default_factory=GenerationSettings)
    force: bool = False

    @property
    def keeps_updates(self) -> bool:
        """Whether the analysis keeps the updates that the merge adds. Raises: PlanError."""
        method = find_method(self.plan["method"])
        names = {parameter.name for parameter in method.parameters}
        own = method.complete({n: v for n, v in self.plan.items() if n in names})
        if not has_updates(method.name, own):
            return False
        anchor = choose_anchor(method, self.options.anchor, own)
        return Variant.of(own, anchor) in kept_variants(Options()).values()

    def downloaded(self, pair: ModelPair) -> list[Checkpoint]:
        """Return the models whose files are downloaded; tensors of the others are only read."""
        return [pair.mllm] if self.keeps_updates else [model for _, model in pair.roles()]


class ExperimentStep(NamedTuple):
    """Progress of one stage: `done` of `total` in its own unit; `resumed` work is of earlier runs.

    `number` counts stages from 1.
    """

    stage: Stage
    number: int
    done: int
    total: int
    what: str
    resumed: bool = False


Steps = Generator[ExperimentStep, None, dict[str, Any]]


def iter_experiment(
    experiment: Experiment,
    out: str | Path,
    page: Page | None = None,
    *,
    stops: Sequence[threading.Event] = (),
) -> Steps:
    """Run an experiment in the folder `out`, or continue it there, and return its summary.

    Args:
        experiment: what to do.
        out: the folder.
        page: makes the HTML file of the result; without it, none is written.
        stops: events that cancel models and evaluations.

    Raises: IPMergeError of the stage that fails, whose message begins with the name of the stage;
        RunError under a launcher of several processes.
    """
    with Ranks() as ranks:
        if ranks.size > 1:
            raise RunError(
                f"An experiment runs in one process, not in {ranks.size}. Run its stages by "
                f"themselves (analyse, plan, merge, evaluate) under a launcher."
            )
    run = _Run(experiment, ExperimentFolder(out), stops)
    with _named("check"):
        pair, commits, findings, prompts = yield from run.check()
    with _named("download"):
        run.folder.keep(experiment.models, commits)
        folder = yield from run.download(pair)
    with _named("analysis"):
        analysis = yield from run.analyse(pair)
    with _named("plan"):
        plan = yield from run.make_plan(analysis)
    with _named("merge"):
        yield from run.merge(plan)
        subjects = [
            subject_of_folder(folder, UNMERGED),
            subject_of_folder(run.folder.model, MERGED),
        ]
    with _named("records"):
        yield from run.record(plan, subjects, prompts or run.folder.built_in_prompts())
    with _named("evaluation"):
        report = yield from run.evaluate(subjects)
    with _named("report"):
        return (yield from run.report(analysis, plan, findings, report, page))


@contextlib.contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Begin the message of an error with the name of the stage."""
    try:
        yield
    except IPMergeError as error:
        error.args = (f"Stage {stage}: {IPMergeError.__str__(error)}",)
        raise


@dataclass(frozen=True)
class _Run:
    """The arguments of an experiment, a method for each stage."""

    experiment: Experiment
    folder: ExperimentFolder
    stops: Sequence[threading.Event]

    def check(
        self,
    ) -> Generator[
        ExperimentStep, None, tuple[ModelPair, Models, Sequence[Finding], list[Prompt] | None]
    ]:
        """Open the models, run the sibling check, and read the prompts, before any download."""
        yield _step("check", 0, 2, "opening the models")
        given = self.experiment.prompts
        prompts = None if given is None else read_prompts(given)
        pair, commits = self.folder.open(self.experiment.models)
        yield _step("check", 1, 2, "comparing the models")
        findings = pair.require_common_base(TO_FORCE, force=self.experiment.force)
        if not self.folder.model.exists():
            check_space(pair, self.folder.model)
        yield _step("check", 2, 2, "")
        return pair, commits, findings, prompts

    def download(self, pair: ModelPair) -> Generator[ExperimentStep, None, Path]:
        """Download the data of the tasks and the MLLM, which answers; return its folder.

        Of the other models the analysis reads what it compares, and keeps the updates of a merge.
        A plan whose change is not kept reads their weights again, so that they are downloaded.
        """
        tasks = self.experiment.tasks
        models = self.experiment.downloaded(pair)
        total = len(tasks) + len(models)
        for number, task in enumerate(tasks):
            yield _step("download", number, total, task.source)
            task.load(self.experiment.evaluation.draw)
        for number, model in enumerate(models, len(tasks)):
            yield _step("download", number, total, model.id)
            model.files.local_folder()
        yield _step("download", total, total, "")
        return pair.mllm.files.local_folder()

    def analyse(self, pair: ModelPair) -> Generator[ExperimentStep, None, Analysis]:
        """Write the pack, or read that of an earlier run."""
        how = Options().check()
        found = self.folder.finished_pack(describe(pair)[0], how._asdict())
        if found is not None:
            yield _step("analysis", 1, 1, "already complete", resumed=True)
            return found

        def step_of(step: AnalysisStep) -> ExperimentStep:
            resumed = step.cost_done == step.cost_before
            what = f"{step.number}/{step.total} {step.matrix}"
            return _step("analysis", step.cost_done, step.cost_total, what, resumed=resumed)

        device, kept = self.experiment.evaluation.device, self._kept_updates
        steps = iter_pack_of(pair, self.folder.pack, how, device=device, updates=kept)
        yield from map(step_of, steps)
        return Analysis.load(self.folder.pack)

    def make_plan(self, analysis: Analysis) -> Generator[ExperimentStep, None, MergePlan]:
        """Make the plan and write it.

        Raises: PlanError if the folder has the model of another plan.
        """
        plan = make_plan(analysis, options=self.experiment.options, **self.experiment.plan)
        made = read_provenance(self.folder.model)
        if made is not None and made.digest != plan.digest:
            raise PlanError(
                f"'{self.folder.model}' is the merge of plan {made.plan}, not of plan {plan.hash}. "
                f"Choose another folder, or delete that model."
            )
        known = self.folder.plan.exists() and MergePlan.load(self.folder.plan).digest == plan.digest
        if not known:
            plan.save(self.folder.plan)
        yield _step("plan", 1, 1, f"plan {plan.hash}", resumed=known)
        return plan

    def merge(self, plan: MergePlan) -> Iterator[ExperimentStep]:
        """Write the merged model, or find it complete."""
        known = is_finished(plan, self.folder.model)

        def step_of(step: MergeStep) -> ExperimentStep:
            what = f"{step.index}/{step.total} {step.action} {step.tensor}"
            resumed = known or step.action == "resumed"
            return _step("merge", step.nbytes_done, step.nbytes_total, what, resumed=resumed)

        device, force = self.experiment.evaluation.device, self.experiment.force
        steps = iter_merge(
            plan, self.folder.model, device=device, force=force, updates=self._kept_updates
        )
        yield from map(step_of, steps)

    @property
    def _kept_updates(self) -> Path | None:
        return self.folder.updates if self.experiment.keeps_updates else None

    def record(
        self, plan: MergePlan, subjects: Sequence[Subject], prompts: Sequence[Prompt]
    ) -> Iterator[ExperimentStep]:
        """Record the replies of both models to the prompts."""

        def step_of(step: RecordStep) -> ExperimentStep:
            resumed = step.what not in (UNMERGED, MERGED)
            return _step("records", step.number, step.total, step.what, resumed=resumed)

        store, device = ReplyStore(self.folder.replies), self.experiment.evaluation.device
        steps = iter_model_recording(
            subjects,
            plan,
            prompts,
            self.folder.records,
            store,
            settings=self.experiment.lengths,
            device=device,
        )
        yield from map(step_of, steps)

    def evaluate(self, subjects: Sequence[Subject]) -> Generator[ExperimentStep, None, Report]:
        """Evaluate both models on the tasks and write the report."""

        def step_of(step: EvaluationStep) -> ExperimentStep:
            what = f"{step.subject} {step.task} {step.done}/{step.total}"
            resumed = step.action != "answered"
            return _step("evaluation", step.done, step.total, what, resumed=resumed)

        settings, store = self.experiment.evaluation, ReplyStore(self.folder.replies)
        steps = iter_evaluation(subjects, self.experiment.tasks, settings, store, stops=self.stops)
        report = yield from relayed(steps, step_of)
        assert report is not None, "there is one process"
        report.save(self.folder.report)
        return report

    def report(
        self,
        analysis: Analysis,
        plan: MergePlan,
        findings: Sequence[Finding],
        report: Report,
        page: Page | None,
    ) -> Steps:
        """Write the comparison, its page and the summary."""
        yield _step("report", 0, 1, "")
        points = (swept_point(Point(UNMERGED)), swept_point(Point(MERGED, plan)))
        found = Sweep("models", analysis.name, analysis.sources, (), points, report)
        found.save(self.folder.result)
        if page is not None:
            write_whole(self.folder.page, page(found, self.folder.pack))
        summary = summary_of(self.folder, plan, findings, report)
        summary.save(self.folder.summary)
        yield _step("report", 1, 1, "")
        return summary.to_dict()


def _step(
    stage: Stage, done: int, total: int, what: str, *, resumed: bool = False
) -> ExperimentStep:
    return ExperimentStep(stage, STAGES.index(stage) + 1, done, total, what, resumed)


__all__ = [
    "MERGED",
    "STAGES",
    "Experiment",
    "ExperimentStep",
    "Models",
    "iter_experiment",
]
