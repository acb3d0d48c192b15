"""Read the recorded examples: answers of both models that are shown without running a model.

In: `recorded.json` in the folder of the demo models, or the records next to a pack. Out: examples
with a question, the correct answer, both replies, their models and the date; and the plan of the
recorded merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.atomic import FileVersion, version_of
from ipmerge_core.runtime.input_files import MEGABYTE, FileKind, Location, Name, Schema
from ipmerge_core.tasks.answers import is_right
from ipmerge_core.ui.finished_merges import describe_unmerged
from ipmerge_core.ui.pairs import PackEntry, find_pack, list_packs, read_pack_file
from ipmerge_core.ui.plan_choice import PlanChoice, read_commit

DEMO_PAIR = "pack"  # the id of the pair that gave the recorded answers
MOST_EXAMPLES = 1000  # of a file; a recording has no more
Text = Annotated[str, Field(max_length=20_000)]  # a question or an answer
RECORDED = FileKind(
    "a file of recorded answers",
    "Record them again with `ipmerge record`, or delete it.",
    PlanError,
    largest=16 * MEGABYTE,
)
OUTCOMES = ("fixed", "broken", "both right", "both wrong")


class Reference(NamedTuple):
    """A question with its correct answer. `is_math`: only the final result counts."""

    question: str
    image: str  # file name
    answer: str
    is_math: bool


class Example(NamedTuple):
    """One recorded pair of answers."""

    reference: Reference
    image: Path
    base: str
    merged: str
    plan: str  # description with the hash
    choice: PlanChoice  # the same plan
    recorded: str  # date
    base_model: str  # label of the model on the left
    pair: str  # name of the pair
    pack_id: str = DEMO_PAIR

    @property
    def outcome(self) -> str:
        """The effect of the merge: fixed, broken, both right or both wrong."""
        right = (is_right(self.reference, self.base), is_right(self.reference, self.merged))
        return {
            (False, True): "fixed",
            (True, False): "broken",
            (True, True): "both right",
            (False, False): "both wrong",
        }[right]


@dataclass(frozen=True)
class _Entry:
    """One recorded pair of answers in the file."""

    question: Text
    image: Location
    answer: Text
    computed: bool
    base: Text
    merged: Text


@dataclass(frozen=True)
class _Recorded:
    """Contents of `recorded.json`."""

    plan: Location
    choice: dict[str, Any]
    recorded: Name
    examples: tuple[_Entry, ...]
    models: tuple[str, ...] = ()  # fingerprints; older files have none, nor the options
    analysis: dict[str, float | int | str | None] = field(default_factory=dict)


_RECORDED = Schema[_Recorded](_Recorded)


def recorded_examples() -> list[Example]:
    """Read the recorded examples of the demo; empty if there are none, or they cannot be read."""
    return records_of(DEMO_PAIR)


def unreadable_records() -> list[str]:
    """Return why the recorded examples of pairs cannot be shown, one sentence per file."""
    faults = []
    for pack in list_packs():
        try:
            _records(pack)
        except PlanError as error:
            faults.append(str(error))
    return faults


def records_of(pack_id: str) -> list[Example]:
    """Read the recorded examples of a pair; empty if there are none, or they cannot be shown.

    Those of the demo are in its folder, those of another pair next to its pack, in the file that
    `ipmerge record` writes: NAME.records.json for NAME.pack.json.gz.
    """
    try:
        return _records(find_pack(pack_id))
    except PlanError:
        return []


def examples_for(pack_id: str) -> list[Example]:
    """Return the recorded examples of a pair; those of the demo if it has none."""
    return records_of(pack_id) or recorded_examples()


def records_name(pack: str) -> str:
    """Return the name of the file of records for the name of a pack's file.

    >>> records_name("mine.pack.json.gz")
    'mine.records.json'
    """
    return pack.partition(".pack.json")[0].removesuffix(".json.gz") + ".records.json"


def _records(pack: PackEntry) -> list[Example]:
    """Read the recorded examples of a pair. Raises: PlanError if they cannot be shown."""
    name = "recorded.json" if pack.id == DEMO_PAIR else records_name(pack.path.name)
    path = pack.path.with_name(name)
    return read_records(path, pack.path, pack.id) if path.is_file() else []


def recorded_choice(pack_id: str) -> PlanChoice | None:
    """Return the plan of a pair's recorded answers; None if there are none."""
    examples = records_of(pack_id)
    return examples[0].choice if examples else None


def read_records(path: Path, pack_path: Path, pack_id: str) -> list[Example]:
    """Read a file of recorded examples and check it against the pack of their pair.

    Raises: PlanError if it cannot be read, or its plan is one of another analysis.
    """
    return list(_read(path, pack_path, pack_id, version_of(path), version_of(pack_path)))


@lru_cache(maxsize=4)
def _read(
    path: Path, pack_path: Path, pack_id: str, *_versions: FileVersion
) -> tuple[Example, ...]:
    content = RECORDED.load(_RECORDED, path)
    pack = read_pack_file(pack_path)
    _check_pair(content, pack, path)
    folder = path.parent.resolve()
    if len(content.examples) > MOST_EXAMPLES:
        raise RECORDED.refusal(
            path, f"it has {len(content.examples)} examples; at most {MOST_EXAMPLES} are shown"
        )
    for entry in content.examples:
        image = (folder / entry.image).resolve()
        if not image.is_relative_to(folder):
            raise RECORDED.refusal(path, f"the image '{entry.image:.80}' is in another folder")
        if not image.is_file():
            raise RECORDED.refusal(
                path, f"its folder does not contain the image '{entry.image:.80}'"
            )
    try:
        choice = read_commit(content.choice, pack)
    except PlanError as error:
        raise RECORDED.refusal(path, error) from error
    examples = [
        Example(
            reference=Reference(
                question=entry.question,
                image=Path(entry.image).name,
                answer=entry.answer,
                is_math=entry.computed,
            ),
            image=path.parent / entry.image,
            base=entry.base,
            merged=entry.merged,
            plan=content.plan,
            choice=choice,
            recorded=content.recorded,
            base_model=describe_unmerged(pack["sources"]["mllm"]["id"]),
            pair=pack["name"],
            pack_id=pack_id,
        )
        for entry in content.examples
    ]
    # Answers that the merge changed come first.
    return tuple(sorted(examples, key=lambda example: OUTCOMES.index(example.outcome)))


def _check_pair(content: _Recorded, pack: Mapping[str, Any], path: Path) -> None:
    """Check that answers are of the models and the analysis of a pack. Raises: PlanError."""
    if content.models and list(content.models) != _fingerprints(pack):
        raise RECORDED.refusal(path, "its answers are of other models than those of the pack")
    for name, value in content.analysis.items():
        if pack["parameters"].get(name) != value:
            raise RECORDED.refusal(
                path,
                f"its plan is of an analysis with {name:.40} {value!s:.40}, and that of the pack "
                f"has {pack['parameters'].get(name)}",
            )


def _fingerprints(pack: Mapping[str, Any]) -> list[str]:
    """Return the fingerprints of a pack's models, sorted."""
    sources = pack["sources"]
    found = [sources["mllm"], sources["base"], sources["base_mllm"], *sources["math"]]
    return sorted(source["fingerprint"] for source in found if source)
