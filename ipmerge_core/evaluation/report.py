"""The result of an evaluation: scores with intervals, paired tests, and the verdict of each reply.

In: the items of tasks and the replies of models. Out: a `Report` of plain values, which is written
and read as JSON. Scores are computed from judged replies only: an item without a reply is missing,
one that rules cannot judge is unjudged, and neither counts as right or wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ipmerge_core.errors import RunError
from ipmerge_core.evaluation.comparisons import SMALL_SAMPLE, PairedTest, holm, paired_test
from ipmerge_core.evaluation.replies import Reply
from ipmerge_core.evaluation.scores import Score
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.input_files import MEGABYTE, FileKind, Schema
from ipmerge_core.tasks.items import Fault, Item, Task
from ipmerge_core.tasks.judging import judge

FORMAT, VERSION = "ipmerge-evaluation", 1
WHOLE = "all"  # the part of a task that has all its items
REPORT_FILE = FileKind(
    "an evaluation report", "Evaluate the models again.", RunError, largest=512 * MEGABYTE
)


@dataclass(frozen=True)
class Judged:
    """One reply with its verdict; `outcome` is "missing" if there is no reply, for `reason`."""

    outcome: str
    text: str = ""
    found: str | None = None
    reason: str = ""
    tokens: int = 0
    cut: bool = False

    @property
    def is_right(self) -> bool:
        """Whether the reply is correct."""
        return self.outcome == "right"

    @property
    def counts(self) -> bool:
        """Whether the reply counts as right or wrong."""
        return self.outcome in ("right", "wrong")


@dataclass(frozen=True)
class PartScore:
    """The score of a part of a task: all of it, its math or perception items, or one skill.

    `low` and `high` are the 95 % Wilson interval. `unjudged` and `missing` items are not in `n`.
    """

    part: str
    kind: str  # all | group | skill
    right: int
    n: int
    low: float
    high: float
    unjudged: int
    missing: int

    @property
    def share(self) -> float:
        """Share of right items; NaN for none."""
        return Score(self.right, self.n).share

    @property
    def is_small(self) -> bool:
        """Whether the sample is small: fewer than `SMALL_SAMPLE` judged items."""
        return self.n < SMALL_SAMPLE


@dataclass(frozen=True)
class Length:
    """How long the replies of a model to a task are, and what they cost."""

    replies: int
    empty: int
    without_answer: int  # in which the rules find no answer
    cut: int  # by the token limit
    tokens: int
    characters: int
    seconds: float  # of generation

    @property
    def mean_tokens(self) -> float:
        """Mean length in tokens; 0 for no replies."""
        return self.tokens / self.replies if self.replies else 0.0


@dataclass(frozen=True)
class TaskResult:
    """The scores of one model on one task. `facts` describe the model as it was run."""

    subject: str
    task: str
    parts: tuple[PartScore, ...]
    length: Length
    facts: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str = WHOLE) -> PartScore | None:
        """Return the score of a part by name; None if the task has no such part.

        The groups of a task are parts only if it has several; otherwise `WHOLE` is its only group.
        """
        return next((part for part in self.parts if part.part == name), None)


@dataclass(frozen=True)
class Comparison:
    """A model against the first one, on a part of a task."""

    first: str
    second: str
    task: str
    part: str
    kind: str
    test: PairedTest
    p_holm: float  # adjusted over all comparisons of this kind in the report


@dataclass(frozen=True)
class TaskFacts:
    """What is needed to repeat a task, and which rows could not be used."""

    name: str
    label: str
    group: str
    source: str
    prompt: str
    max_new_tokens: int
    unofficial: str
    total: int | None
    items: tuple[dict[str, Any], ...]
    faults: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    `replies[subject][task]` has one entry per item of the task, in the order of its facts.
    """

    created: str
    settings: dict[str, Any]
    versions: dict[str, str]
    subjects: dict[str, dict[str, Any]]
    tasks: tuple[TaskFacts, ...]
    results: tuple[TaskResult, ...]
    comparisons: tuple[Comparison, ...]
    replies: dict[str, dict[str, list[Judged]]]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON. Raises: RunError if the disk is full or read-only."""
        import json

        write_whole(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report. Raises: RunError if the file is not one of this version."""
        content = REPORT_FILE.content(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise REPORT_FILE.refusal(path, f"its format is not {FORMAT}")
        if content.get("version") != VERSION:
            raise REPORT_FILE.refusal(path, f"its version is {str(content.get('version'))[:20]}")
        plain = {key: value for key, value in content.items() if key not in ("format", "version")}
        return REPORT_FILE.validate(_REPORT, plain, path)

    def result(self, subject: str, task: str) -> TaskResult:
        """Return the scores of a model on a task."""
        return next(r for r in self.results if (r.subject, r.task) == (subject, task))

    def changed(self, second: str, task: str) -> Iterator[tuple[dict[str, Any], Judged, Judged]]:
        """Yield the items that a model fixes or breaks, with both replies, broken ones first."""
        facts = next(each for each in self.tasks if each.name == task)
        first = next(iter(self.subjects))
        rows = list(
            zip(facts.items, self.replies[first][task], self.replies[second][task], strict=True)
        )
        for broken in (True, False):
            for item, before, after in rows:
                both = before.counts and after.counts
                if both and before.is_right == broken and after.is_right != broken:
                    yield item, before, after


_REPORT = Schema[Report](Report)


def judged(item: Item, reply: Reply | None, fault: str = "") -> Judged:
    """Judge the reply to an item; without one it is missing, for a reason."""
    if reply is None:
        return Judged("missing", reason=fault or "not answered")
    verdict = judge(item, reply.text)
    return Judged(
        verdict.outcome, reply.text, verdict.found, verdict.reason, reply.tokens, reply.cut
    )


def task_facts(
    task: Task, items: Sequence[Item], faults: Sequence[Fault], total: int | None, limit: int
) -> TaskFacts:
    """Describe a task as it was used; `limit` is the token limit of its replies."""
    return TaskFacts(
        name=task.name,
        label=task.label,
        group=task.group,
        source=task.source,
        prompt=task.prompt,
        max_new_tokens=limit,
        unofficial=task.unofficial,
        total=total,
        items=tuple(map(_described, items)),
        faults=tuple((fault.id, fault.reason) for fault in faults),
    )


def _described(item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "skill": item.skill,
        "group": item.group,
        "question": item.shown or item.question,
        "references": list(item.answers),
        "choices": list(item.choices),
    }


def parts_of(items: Sequence[Item], replies: Sequence[Judged]) -> tuple[PartScore, ...]:
    """Return the scores of the whole, and of its groups and skills if there are several."""
    parts = [_part(WHOLE, "all", replies)]
    groups = dict.fromkeys(item.group for item in items)
    for group in groups if len(groups) > 1 else ():
        chosen = [r for i, r in zip(items, replies, strict=True) if i.group == group]
        parts.append(_part(group, "group", chosen))
    skills = dict.fromkeys(item.skill for item in items if item.skill)
    for skill in skills if len(skills) > 1 else ():
        chosen = [r for i, r in zip(items, replies, strict=True) if i.skill == skill]
        parts.append(_part(skill, "skill", chosen))
    return tuple(parts)


def _part(name: str, kind: str, replies: Sequence[Judged]) -> PartScore:
    right = sum(reply.is_right for reply in replies)
    score = Score(right, sum(reply.counts for reply in replies))
    low, high = score.interval
    unjudged = sum(reply.outcome == "unjudged" for reply in replies)
    missing = sum(reply.outcome == "missing" for reply in replies)
    return PartScore(name, kind, right, score.n, low, high, unjudged, missing)


def length_of(replies: Sequence[Judged], seconds: float) -> Length:
    """Summarize the lengths of replies."""
    given = [reply for reply in replies if reply.outcome != "missing"]
    return Length(
        replies=len(given),
        empty=sum(not reply.text.strip() for reply in given),
        without_answer=sum(reply.found is None for reply in given),
        cut=sum(reply.cut for reply in given),
        tokens=sum(reply.tokens for reply in given),
        characters=sum(len(reply.text) for reply in given),
        seconds=round(seconds, 3),
    )


def compare_all(
    items: Mapping[str, Sequence[Item]], replies: Mapping[str, Mapping[str, Sequence[Judged]]]
) -> tuple[Comparison, ...]:
    """Compare every model with the first one, on every task, its groups and its skills.

    Holm's correction covers all comparisons of groups and wholes together, and all of skills.
    """
    first, *others = replies
    found = [
        (second, task, part, kind, paired_test(before, after))
        for second in others
        for task in items
        for part, kind, before, after in _outcomes(
            items[task], replies[first][task], replies[second][task]
        )
    ]
    adjusted: dict[int, float] = {}
    for is_skill in (False, True):
        chosen = [n for n, each in enumerate(found) if (each[3] == "skill") == is_skill]
        p_values = holm([found[n][4].p_value for n in chosen])
        adjusted |= dict(zip(chosen, p_values, strict=True))
    return tuple(
        Comparison(first, second, task, part, kind, test, adjusted[n])
        for n, (second, task, part, kind, test) in enumerate(found)
    )


def _outcomes(
    items: Sequence[Item], first: Sequence[Judged], second: Sequence[Judged]
) -> Iterator[tuple[str, str, list[bool], list[bool]]]:
    """Yield the parts of a task with the outcomes of the items that count for both models."""
    rows = [
        (item, a.is_right, b.is_right)
        for item, a, b in zip(items, first, second, strict=True)
        if a.counts and b.counts
    ]
    names = [(part.part, part.kind) for part in parts_of(items, first)]
    for name, kind in names:
        chosen = [
            row
            for row in rows
            if kind == "all" or name == (row[0].group if kind == "group" else row[0].skill)
        ]
        yield name, kind, [a for _, a, _ in chosen], [b for _, _, b in chosen]
