"""Read the file "Plan as JSON" of the app: the choice of a user for an analysed pair.

In: the file, and the pack that it was made from. Out: the `MergePlan` of that choice. The file is
small: it names the pair, but has no records. Imports torch only to make the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.analysis.records import Analysis, read_pack
from ipmerge_core.errors import PlanError
from ipmerge_core.runtime.input_files import (
    InvalidContentError,
    Name,
    Schema,
    parse_json,
    read_bounded,
    versioned,
)

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan

FORMAT, VERSION = "ipmerge-choice", 1
_LARGEST = 4_000_000  # bytes; a choice with thousands of overrides has less than one million
_COMPARED = ("name", "created", "parameters")  # of the pack


@dataclass(frozen=True)
class _Pair:
    """The pack of a choice: its id in the app, and what identifies its analysis."""

    id: Name
    name: Any = None
    created: Any = None
    parameters: Any = None


@dataclass(frozen=True)
class _Choice:
    """Contents of the file after its format; other fields are for the app."""

    pair: _Pair
    arguments: dict[str, Any]


_CHOICE = Schema[_Choice](_Choice)


def read_choice(path: Path) -> Mapping[str, Any] | None:
    """Return the content of a "Plan as JSON" file; None for another file, such as a plan."""
    try:
        if not path.is_file():
            return None
        content = parse_json(read_bounded(path, _LARGEST), _LARGEST)
    except (OSError, InvalidContentError):
        return None
    is_choice = isinstance(content, dict) and content.get("format") == FORMAT
    return content if is_choice else None


def pair_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the description of the pair in a choice: its id, name, date and parameters.

    Raises: PlanError if the file is of another version, or incomplete.
    """
    try:
        found = _CHOICE.validate(versioned(content, FORMAT, (VERSION,))[1])
    except InvalidContentError as error:
        raise PlanError(
            f"The file is not a plan of this version of the app: {error}; expected version "
            f"{VERSION} with 'pair' and 'arguments'. Copy it again from API & cite."
        ) from error
    return asdict(found.pair)


def plan_of_choice(content: Mapping[str, Any], pack: Path) -> MergePlan:
    """Make the plan of a choice from the pack of its pair.

    Raises: PlanError if the file is invalid, or the pack is of another analysis.
    """
    from ipmerge_core.planning.plan import make_plan

    pair, found = pair_of(content), read_pack(pack)[0]
    for name in _COMPARED:
        if pair.get(name) != found[name]:
            raise PlanError(
                f"The plan was made from another analysis: its {name} is "
                f"{str(pair.get(name))[:80]!r}, and that of the pack '{pack}' is "
                f"{str(found[name])[:80]!r}. Specify its own pack with --pack."
            )
    try:
        return make_plan(Analysis.load(pack), **content["arguments"])
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            f"The plan has invalid arguments ({str(error)[:200]}). Copy it again from API & cite."
        ) from error
