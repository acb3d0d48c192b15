"""Run a fine-tuning from model folders to a model folder: the driver of DRIFT.

In: an MLLM, an expert, conversations and `DriftSettings`. Out: a complete model folder in the
MLLM's own layout. Until it is complete, checkpoints are in `OUT.training`; a run that was stopped
at any time continues from the newest complete one. A generator: each step reports what was done,
closing it stops training after the current step, with a checkpoint. Under `torchrun` or
`accelerate launch` each process trains on its share, and the first writes the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Event, Semaphore
from typing import Any, NamedTuple

import torch
from torch import nn

from ipmerge_core.errors import PairingError
from ipmerge_core.finetuning.checkpoints import TrainingFolder
from ipmerge_core.finetuning.conversations import load_conversations
from ipmerge_core.finetuning.curves import FIGURES, StepFigures
from ipmerge_core.finetuning.dataset import Datasets, first_examples
from ipmerge_core.finetuning.estimates import MemoryEstimate, estimate_memory
from ipmerge_core.finetuning.examples import Encoder, show_masked
from ipmerge_core.finetuning.guidance import GradientGuide, find_guided
from ipmerge_core.finetuning.matching import PriorMatch, match_prior
from ipmerge_core.finetuning.prior import ReasoningPrior
from ipmerge_core.finetuning.result import documents_of, iter_write, stored_parameters
from ipmerge_core.finetuning.settings import DriftSettings, training_folder
from ipmerge_core.finetuning.trainer import (
    TrainerHooks,
    join_processes,
    load_finished,
    make_trainer,
    refuse_integrations,
    refuse_partitioning,
    resolve_precision,
    without_progress_bars,
)
from ipmerge_core.finetuning.validation import check_integer
from ipmerge_core.finetuning.vocabulary import (
    add_tokens,
    missing_tokens,
    refuse_resized,
    write_with_tokens,
)
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.loading import load_weights
from ipmerge_core.inference.module_names import parameter_names
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.files import LocalFiles
from ipmerge_core.models.opening import open_model
from ipmerge_core.models.writer import check_output
from ipmerge_core.runtime.devices import resolve_device
from ipmerge_core.runtime.paths import resolve_path
from ipmerge_core.runtime.pipeline import with_reports
from ipmerge_core.runtime.processes import Ranks

_START = "start"  # the model with added tokens
_MOST_SHOWN = 1000


@dataclass(frozen=True)
class DriftStep(StepFigures):
    """One step of a run, with the figures of the optimizer step if it is one.

    `action` is "prior", "encoded", "trained" (a point of the curves), "evaluated" or "written".
    """

    action: str
    done: int
    total: int
    what: str = ""


@dataclass(frozen=True)
class DriftRequest:
    """What a run needs: the models, the data, the output and the settings.

    `math_base` is the base of the expert, for a hierarchical prior. `limit` is the number of rows.
    """

    mllm: str
    math: str
    data: str
    out: str
    settings: DriftSettings = field(default_factory=DriftSettings)
    math_base: str | None = None
    limit: int | None = None

    def match(self) -> PriorMatch:
        """Open the models by their headers and match their parameters. Raises: PairingError."""
        mllm = open_model(self.mllm)
        if not isinstance(mllm.files, LocalFiles) or type(mllm) is not Checkpoint:
            raise PairingError(
                f"'{mllm.id}' is not a local folder with full weights, which fine-tuning needs. "
                f"Download it first (hf download); merge a LoRA adapter into its base first: the "
                f"rules need the gradient of whole matrices, which the training of an adapter does "
                f"not compute."
            )
        base = None if self.math_base is None else open_model(self.math_base)
        return match_prior(mllm, open_model(self.math), self.settings.prior.scope, base)

    @property
    def folder(self) -> Path:
        """The folder of the unfinished run."""
        return training_folder(resolve_path(self.out))


class DriftCheck(NamedTuple):
    """What can be checked without a step."""

    parameters: int
    description: str  # how many parameters of which kind have a prior
    relative_norm: float  # ||D|| / ||W||, of a sample of the parameters
    memory: MemoryEstimate
    data: str
    examples: list[str]  # with the learned parts in brackets
    warnings: list[str]


def check_drift(request: DriftRequest, *, device: str = "cpu", shown: int = 2) -> DriftCheck:
    """Check models, names, shapes, memory, data and the tokens of the first examples.

    Raises: as `iter_drift` before its first step.
    """
    refuse_partitioning()
    refuse_integrations(request.settings.training.report_to)
    check_integer("number of examples to show", shown, 0, _MOST_SHOWN)
    device = resolve_device(device, fp64=False)
    check_output(request.out)
    match = request.match()
    rows = load_conversations(request.data, request.limit)
    encoder = _encoder(request, match)
    examples = first_examples(rows, encoder, shown)
    texts = [f"{e.length} tokens: {show_masked(e, encoder.processor)}" for e in examples]
    return DriftCheck(
        len(match.entries),
        match.describe(),
        _sampled_norm(match),
        estimate_memory(match, request.settings, device),
        rows.describe(),
        texts,
        request.settings.prior.warnings,
    )


def iter_drift(
    request: DriftRequest,
    *,
    device: str = "auto",
    resume: bool = True,
    force: bool = False,
    keep_checkpoints: bool = False,
) -> Generator[DriftStep]:
    """Fine-tune and write the result; yield a step for everything that is done.

    Args:
        request: models, data, output folder and settings.
        device: a torch device, or "auto".
        resume: continue an unfinished run of the same work; otherwise start over.
        force: start although the memory does not suffice or the models seem unrelated.
        keep_checkpoints: keep `OUT.training` after the result is written.

    Raises:
        PairingError: the models do not match, or a parameter cannot be trained.
        RunError: the data is unusable, the loss is not finite, the disk is full, or an unfinished
            run of other work exists.
        CheckpointError: the output folder exists and is not empty.
    """
    refuse_partitioning()
    refuse_integrations(request.settings.training.report_to)
    device = resolve_device(device, fp64=False)
    TrainingFolder(request.folder).tidy()
    check_output(request.out)
    match = request.match()
    memory = estimate_memory(match, request.settings, device)
    if not force:
        memory.refuse_too_large()
    ranks = Ranks()
    join_processes(device)
    with ranks:
        run = _Run(request, match, ranks.device(device), ranks.rank, force=force)
        newest = ranks.led(lambda: run.open_folder(resume=resume))
    try:
        with ranks:
            run.start_from(ranks.led(run.extend_vocabulary))
        with without_progress_bars():
            yield from run.prepare()
            stopped = yield from _reported(partial(run.train, newest))
            if not stopped:
                yield from run.write(memory, keep_checkpoints=keep_checkpoints)
    finally:
        run.place.release()


def _reported(
    work: Callable[[Callable[[DriftStep], None], Event], bool],
) -> Generator[DriftStep, None, bool]:
    """Run `work(report, stop)` in a thread and yield what it reports; closing sets `stop`.

    The thread waits in `report` until the next step is requested, so that it is never ahead.
    """
    stop, taken = Event(), Semaphore(0)

    def run(report: Callable[[DriftStep], None]) -> bool:
        def wait_after(step: DriftStep) -> None:
            if not stop.is_set():
                report(step)
                taken.acquire()

        return work(wait_after, stop)

    steps = with_reports(run)
    try:
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return bool(end.value)
            yield step
            taken.release()
    finally:
        stop.set()
        taken.release()
        steps.close()


class _Run:
    """A run in this process."""

    def __init__(
        self, request: DriftRequest, match: PriorMatch, device: str, rank: int, *, force: bool
    ) -> None:
        self.request, self.match, self.device, self.force = request, match, device, force
        self.settings, self.rank = request.settings, rank
        self.place = TrainingFolder(request.folder)
        self.requested = match
        self.started = time.monotonic()
        self.trainer: Any = None
        sources = {"mllm": match.mllm.fingerprint, "math": match.expert.fingerprint}
        if match.expert_base is not None:
            sources["math_base"] = match.expert_base.fingerprint
        self.rows = load_conversations(request.data, request.limit)
        self.digest = self.settings.digest({**sources, "data": self.rows.fingerprint})

    def open_folder(self, *, resume: bool) -> str | None:
        """Return the newest checkpoint of the same work, or start over."""
        return self.place.open(self.digest, self.settings.as_json(), resume=resume)

    def extend_vocabulary(self) -> str | None:
        """Write a model with the new tokens next to the checkpoints; None if there are none."""
        tokens, mllm = self.settings.training.tokens, self.match.mllm
        if not tokens:
            return None
        processor = ModelProcessor(mllm.id, takes_images=True)
        new = missing_tokens(processor, tokens)
        refuse_resized(self.match, processor, new)
        start = self.place.path / _START
        if new and not start.exists():
            write_with_tokens(mllm, self.match.prefix, new, start)
        return str(start) if new else None

    def start_from(self, mllm: str | None) -> None:
        """Train another model folder instead of the requested one, if there is one."""
        if mllm is not None:
            self.match = replace(self.request, mllm=mllm).match()
        how = self.settings.training
        encoder = _encoder(self.request, self.match)
        self.data = Datasets(self.rows, encoder, how.held_out, how.seed)

    def prepare(self) -> Iterator[DriftStep]:
        """Load the model, compute the prior, encode the data."""
        for encoded in self.data.iter_encode():
            yield DriftStep("encoded", encoded.done, encoded.total)
        how = self.settings
        self.model = _load_model(self.match.mllm, how, self.device)
        names = parameter_names(self.model, list(self.match.mllm.tensors))
        self.stored = stored_parameters(self.model, self.match.mllm, names)
        prior = ReasoningPrior(
            self.match, how.prior.placement, self.device, normalize=how.prior.normalize
        )
        for step in prior.iter_compute():
            yield DriftStep("prior", step.number, step.total, step.name)
        if not self.force:
            prior.refuse_unrelated()
        guided = find_guided(
            self.model,
            prior,
            names,
            lambda name: how.prior.scope.strength(name, how.prior.strength),
        )
        frozen = next((g.name for g in guided if not g.parameter.requires_grad), None)
        if frozen is not None:
            raise PairingError(f"'{frozen}' has a prior but is not trained; select other modules.")
        rule = None if how.prior.rule == "none" else how.prior.rule
        self.guide = GradientGuide(guided, prior, rule)

    def train(
        self, checkpoint: str | None, report: Callable[[DriftStep], None], stop: Event
    ) -> bool:
        """Train from a checkpoint to the end; return whether it was stopped before it."""

        def log(step: int, total: int, logs: Mapping[str, float]) -> None:
            action = "evaluated" if "eval_loss" in logs else "trained" if "loss" in logs else ""
            if action:
                figures: dict[str, Any] = {name: _number(logs.get(name)) for name in FIGURES}
                report(DriftStep(action, step, total, **figures))

        self.trainer = make_trainer(
            self.model,
            self.guide,
            self.data,
            self.settings,
            self.place.path,
            self.device,
            TrainerHooks(log, stop.is_set),
        )
        if self.settings.prior.per_micro_batch:
            self.guide.act_on_each_backward()
        try:
            if checkpoint is None or not load_finished(self.trainer, checkpoint):
                self.trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            self.guide.release()
            if self.trainer.args.world_size > 1:
                self.trainer.accelerator.end_training()
        return stop.is_set()

    def write(self, memory: MemoryEstimate, *, keep_checkpoints: bool) -> Iterator[DriftStep]:
        """Write the model folder and remove the checkpoints, on the first process."""
        if self.rank:
            return
        state = self.trainer.state
        prior = self.guide.prior
        facts = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.started, 3),
            "device": self.device,
            "processes": self.trainer.args.world_size,
            "precision": memory.precision,
            "steps": state.global_step,
            "best_step": state.best_global_step,
            "prior": {
                "parameters": len(self.match.entries),
                "elements": self.match.numel,
                "relative_norm": prior.relative_norm,
                "hierarchical": self.match.expert_base is not None,
                "nbytes": prior.nbytes,
            },
            "data": {"source": Path(self.request.data).name, "used": self.data.describe()},
            "history": [entry for entry in state.log_history if _is_curve(entry)],
        }
        names = {"mllm": self.requested.mllm.id, "math": self.match.expert.id}
        sources = {"mllm": self.match.mllm, "math": self.match.expert}
        documents = documents_of(sources, names, self.settings.as_json(), facts)
        out = resolve_path(self.request.out)
        steps = iter_write(self.match.mllm, self.model, self.stored, out, self.digest, documents)
        for step in steps:
            yield DriftStep("written", step.nbytes_done, step.nbytes_total, step.name)
        if not keep_checkpoints:
            self.place.remove()


def _encoder(request: DriftRequest, match: PriorMatch) -> Encoder:
    how = request.settings.training
    processor = ModelProcessor(match.mllm.id, takes_images=True)
    if new := missing_tokens(processor, how.tokens):  # of a dry run
        refuse_resized(match, processor, new)
        add_tokens(processor, new)
    return Encoder(processor, how.longest, how.most_pixels, how.tokens)


def _load_model(mllm: Checkpoint, settings: DriftSettings, device: str) -> nn.Module:
    """Load the model in the precision of the weights, with only the trained part unfrozen."""
    precision = resolve_precision(settings.training.precision, device)
    loaded = load_weights(mllm)
    model: nn.Module = loaded.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    loaded.config.use_cache = False
    if settings.training.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    model.requires_grad_(settings.training.trained == "all")
    head = loaded.get_output_embeddings()
    parts = [loaded.get_decoder(), *([head] if head is not None else [])]
    for part in parts:
        part.requires_grad_(True)
    return model


def _sampled_norm(match: PriorMatch, count: int = 3) -> float:
    """Return ||D|| / ||W|| over a few entries: the first, the last and some between.

    If D is zero in all of these, as for an adapter of few matrices, it is measured over all
    entries. Raises: PairingError if it is zero in all entries.
    """
    last = len(match.entries) - 1
    places = sorted({n * last // max(count - 1, 1) for n in range(count)})
    few = replace(match, entries=tuple(match.entries[n] for n in places))
    sampled = ReasoningPrior(few, "files").measure()
    prior = sampled if any(sampled.norms) else ReasoningPrior(match, "files").compute()
    return prior.relative_norm


def _number(value: object) -> float | None:
    """Return a finite number as a float; None for anything else."""
    found = float(value) if isinstance(value, int | float) else None
    return found if found is not None and abs(found) < float("inf") else None


def _is_curve(entry: Mapping[str, Any]) -> bool:
    return "loss" in entry or "eval_loss" in entry
