"""Driver of an evaluation: every model answers every item once; the rest is read from the store.

In: `Subject`s, `Task`s and settings. Out: a step per batch, and a `Report` at the end. Closing the
generator, an error or a kill loses at most the batches in progress: the next evaluation of the same
model content answers only what is missing. Under `torchrun` or `accelerate launch` the items are
split over the processes; each writes its replies to the store, and rank 0 makes the report.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.replies import Journal, Reply, ReplyStore
from ipmerge_core.evaluation.report import (
    Judged,
    Report,
    TaskFacts,
    TaskResult,
    compare_all,
    judged,
    length_of,
    parts_of,
    task_facts,
)
from ipmerge_core.runtime.imports import find_torchvision
from ipmerge_core.runtime.processes import Ranks
from ipmerge_core.tasks.items import Draw, Fault, Item, Task
from ipmerge_core.tasks.registry import missing_guards
from ipmerge_core.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from ipmerge_core.evaluation.answering import Caches
    from ipmerge_core.evaluation.subjects import Subject

MOST_NEW_TOKENS = 32_768
MOST_ROWS = 4096  # of a batch
BATCH_SIZE = 64


@dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation runs.

    Attributes:
        limit: items per task (per skill of the demo task); None is the task's default.
        seed: selects the items.
        max_new_tokens: token limit of all tasks; None is each task's own.
        batch_size: prompts per batch. Replies do not depend on it, apart from rounding.
        device: a torch device name; "auto" selects the fastest.
        resume: use stored replies. False answers every item again and replaces them.
    """

    limit: int | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    batch_size: int = BATCH_SIZE
    device: str = "cpu"
    resume: bool = True

    def __post_init__(self) -> None:
        """Validate the values. Raises: RunError."""
        self.draw  # noqa: B018 (validates the limit and the seed)
        if self.max_new_tokens is not None and not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise RunError(
                f"The token limit is {self.max_new_tokens}; expected an integer from 1 to "
                f"{MOST_NEW_TOKENS}."
            )
        if not 1 <= self.batch_size <= MOST_ROWS:
            raise RunError(
                f"The batch size is {self.batch_size}; expected an integer from 1 to {MOST_ROWS}."
            )

    @property
    def draw(self) -> Draw:
        """Which items are used."""
        return Draw(self.limit, self.seed)


class EvaluationStep(NamedTuple):
    """Progress: `done` of `total` replies of all models and tasks are known."""

    action: Literal["resumed", "loading", "answered"]
    subject: str
    task: str
    done: int
    total: int


class _Work(NamedTuple):
    """A task with the items of its draw by key, and its faulty rows."""

    task: Task
    items: dict[str, Item]
    faults: tuple[Fault, ...]
    total: int | None
    max_new_tokens: int


class _Answered(NamedTuple):
    """The replies of one model to one task, and the reasons for those that are missing."""

    replies: dict[str, Reply]
    faults: dict[str, str]
    facts: dict[str, Any]


def iter_evaluation(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    settings: EvaluationSettings | None = None,
    store: ReplyStore | None = None,
    *,
    caches: Caches | None = None,
    stops: Sequence[threading.Event] = (),
) -> Generator[EvaluationStep, None, Report | None]:
    """Evaluate models on tasks; yield a step per batch and return the report.

    Args:
        subjects: the models; all are compared with the first one. Names are unique.
        tasks: the tasks, see `tasks.registry.find_tasks`.
        settings: limits and the device.
        store: where replies are stored; by default in the home folder.
        caches: prompts and image features to share with other evaluations.
        stops: events that cancel.

    Returns: the report; None in processes of other ranks than 0.

    Raises:
        RunError: no or duplicate models or tasks, or data that cannot be loaded.
        ModelLoadError: a model cannot be loaded or fails.
        RunCancelled: one of the events was set.
    """
    from ipmerge_core.evaluation.answering import Caches
    from ipmerge_core.runtime.devices import resolve_device

    settings, store = settings or EvaluationSettings(), store or ReplyStore()
    caches = caches or Caches()
    _check(subjects, tasks)
    with Ranks() as ranks:
        device = ranks.device(resolve_device(settings.device, fp64=False))
        work = [_prepared(task, settings) for task in tasks]
        run = _Run(work, settings, store, caches, device, ranks, stops)
        answered: dict[str, dict[str, _Answered]] = {}
        run.total = len(subjects) * sum(len(each.items) for each in work)
        for subject in subjects:
            answered[subject.name] = yield from run.evaluate(subject)
        every = ranks.gather(answered)
        if ranks.rank:
            return None
        return _report(subjects, run, settings, every)


class _Run:
    """What all models of an evaluation share, and how many replies are known."""

    def __init__(
        self,
        work: Sequence[_Work],
        settings: EvaluationSettings,
        store: ReplyStore,
        caches: Caches,
        device: str,
        ranks: Ranks,
        stops: Sequence[threading.Event],
    ) -> None:
        self.work, self.settings, self.store, self.caches = work, settings, store, caches
        self.device, self.ranks, self.stops = device, ranks, stops
        self.done = self.total = 0

    def evaluate(self, subject: Subject) -> Generator[EvaluationStep, None, dict[str, _Answered]]:
        """Answer what is not stored with one model, which is loaded if anything is missing."""
        known = {each.task.name: self._stored(subject, each) for each in self.work}
        # Rank 0 decides, since the store changes while other processes read it.
        missing: dict[str, list[str]] = self.ranks.led(
            lambda: {
                each.task.name: [key for key in each.items if key not in known[each.task.name]]
                for each in self.work
            }
        )
        self.done += sum(len(each.items) - len(missing[each.task.name]) for each in self.work)
        yield EvaluationStep("resumed", subject.name, "", self.done, self.total)
        found: dict[str, _Answered] = {}
        with contextlib.ExitStack() as stack:
            loaded = None
            for each in self.work:
                name = each.task.name
                mine = missing[name][self.ranks.rank :: self.ranks.size]  # skills spread evenly
                if mine and loaded is None:
                    yield EvaluationStep("loading", subject.name, name, self.done, self.total)
                    loaded = stack.enter_context(subject.loaded(self.device))
                answered = _Answered(known[name], {}, {})
                if mine:
                    yield from self._answer(subject, loaded, each, mine, answered)
                found[name] = answered
        return found

    def _answer(
        self,
        subject: Subject,
        loaded: Any,  # noqa: ANN401 (a LoadedModel, whose module imports the libraries)
        work: _Work,
        missing: Sequence[str],
        answered: _Answered,
    ) -> Iterator[EvaluationStep]:
        """Answer items of one task, store the replies, and add them to `answered`."""
        from ipmerge_core.evaluation.answering import Answerer

        size, journal = self.settings.batch_size, self._journal(subject, work)
        answerer = Answerer(loaded, work.max_new_tokens, size, self.caches, self.stops)
        for batch in answerer.answer({key: work.items[key] for key in missing}):
            journal.append(batch.replies)
            answered.replies.update({reply.item: reply for reply in batch.replies})
            answered.faults.update(batch.faults)
            self.done += len(batch.replies) + len(batch.faults)
            yield EvaluationStep("answered", subject.name, work.task.name, self.done, self.total)
        answered.facts.update(_facts(loaded), generation=answerer.way)
        journal.write_facts(answered.facts)

    def _stored(self, subject: Subject, work: _Work) -> dict[str, Reply]:
        if not self.settings.resume:
            return {}
        replies = self._journal(subject, work).read()
        return {key: reply for key, reply in replies.items() if key in work.items}

    def facts(self, subject: Subject, work: _Work) -> dict[str, Any]:
        """Return how stored replies were made."""
        return self._journal(subject, work).read_facts()

    def _journal(self, subject: Subject, work: _Work) -> Journal:
        how = {
            "max_new_tokens": work.max_new_tokens,
            "device": self.device.partition(":")[0],
            "torchvision": find_torchvision().works,  # it resizes with other pixels
        }
        family = re.split("[:@]", work.task.name)[0]
        return self.store.journal(subject.key, family, how)


def _check(subjects: Sequence[Subject], tasks: Sequence[Task]) -> None:
    """Check that there are models and tasks, each once. Raises: RunError."""
    for what, names in (
        ("model", [subject.name for subject in subjects]),
        ("task", [task.name for task in tasks]),
    ):
        if not names:
            raise RunError(f"There is no {what} to evaluate; expected at least one.")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RunError(f"Two {what}s are named '{twice}'. Give each another name.")


def _prepared(task: Task, settings: EvaluationSettings) -> _Work:
    """Load a task and key its items; one whose picture cannot be read is a fault."""
    found = task.load(settings.draw)
    items: dict[str, Item] = {}
    faults = list(found.faults)
    for item in found.items:
        try:
            items.setdefault(item.key(), item)
        except RunError as error:
            faults.append(Fault(item.id, str(error)))
    if not items:
        why = f" The first of {len(faults)} faulty rows: {faults[0].reason}" if faults else ""
        raise RunError(f"The task '{task.name}' has no items that can be evaluated.{why}")
    limit = settings.max_new_tokens or task.max_new_tokens
    return _Work(task, items, tuple(faults), found.total, limit)


def _facts(loaded: Any) -> dict[str, Any]:  # noqa: ANN401
    """Describe a model as it runs."""
    pictures = _picture_settings(loaded.folder) if loaded.takes_images else {}
    return {
        "class": type(loaded.model).__name__,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.model.device),
        "image_processor": loaded.processor.image_processor,
        "picture_size": pictures,
        "transformers": version("transformers"),
    }


_SIZES = ("size", "min_pixels", "max_pixels", "crop_size", "patch_size", "max_image_size")


def _picture_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a processor that determine the number of pixels."""
    from ipmerge_core.inference.processor_loading import read_picture_settings

    found = read_picture_settings(folder)
    return {name: found[name] for name in _SIZES if name in found}


def _report(
    subjects: Sequence[Subject],
    run: _Run,
    settings: EvaluationSettings,
    every: Sequence[Mapping[str, Mapping[str, _Answered]]],
) -> Report:
    """Join what all processes have answered and compute the scores."""
    replies: dict[str, dict[str, list[Judged]]] = {}
    results: list[TaskResult] = []
    facts: list[TaskFacts] = [
        task_facts(w.task, list(w.items.values()), w.faults, w.total, w.max_new_tokens)
        for w in run.work
    ]
    for subject in subjects:
        replies[subject.name] = {}
        for work in run.work:
            shares = [mine[subject.name][work.task.name] for mine in every]
            rows = _judged(work, shares)
            replies[subject.name][work.task.name] = rows
            seconds = sum(r.seconds for r in _joined(shares).values())
            items = list(work.items.values())
            how = next((s.facts for s in shares if s.facts), None) or run.facts(subject, work)
            length = length_of(rows, seconds)
            parts = parts_of(items, rows)
            results.append(TaskResult(subject.name, work.task.name, parts, length, how))
    tasks = {work.task.name: list(work.items.values()) for work in run.work}
    return Report(
        created=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        settings={**asdict(settings), "device": run.device, "processes": run.ranks.size},
        versions={"ipmerge": __version__, **{n: version(n) for n in ("torch", "transformers")}},
        subjects={each.name: {"key": each.key, **each.details} for each in subjects},
        tasks=tuple(facts),
        results=tuple(results),
        comparisons=compare_all(tasks, replies),
        replies=replies,
        notes=tuple(_guard_notes(run.work)),
    )


def _guard_notes(work: Sequence[_Work]) -> Iterator[str]:
    """Yield what a score of mathematics lacks: its perception guard."""
    for guard in missing_guards([each.task for each in work]):
        yield (
            f"The perception guard '{guard}' was left out: a gain in math may have cost perception."
        )
    groups = {item.group for each in work for item in each.items.values()}
    if (
        "math" in groups
        and "perception" not in groups
        and all(w.task.group != "math" for w in work)
    ):
        yield "No item of this evaluation measures perception, which a gain in math may have cost."


def _joined(shares: Sequence[_Answered]) -> dict[str, Reply]:
    return {key: reply for share in shares for key, reply in share.replies.items()}


def _judged(work: _Work, shares: Sequence[_Answered]) -> list[Judged]:
    """Judge the replies to the items of a task, in order."""
    replies = _joined(shares)
    faults = {key: reason for share in shares for key, reason in share.faults.items()}
    return [judged(item, replies.get(key), faults.get(key, "")) for key, item in work.items.items()]
