"""Read the file "Plan as JSON" of the app: the choice of a user for an analysed pair.

In: the file, and the pack that it was made from. Out: the `MergePlan` of that choice. The file is
small: it names the pair, but has no records. Imports torch only to make the plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.analysis.records import Analysis, read_pack
from ipmerge_core.errors import PlanError

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan

FORMAT, VERSION = "ipmerge-choice", 1
_LARGEST = 4_000_000  # bytes; a choice with thousands of overrides has less than one million
_COMPARED = ("name", "created", "parameters")  # of the pack


def read_choice(path: Path) -> Mapping[str, Any] | None:
    """Return the content of a "Plan as JSON" file; None for another file, such as a plan."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_choice = isinstance(content, dict) and content.get("format") == FORMAT
    return content if is_choice else None


def pair_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the description of the pair in a choice: its id, name, date and parameters.

    Raises: PlanError if the file is of another version, or incomplete.
    """
    pair = content.get("pair")
    named = isinstance(pair, dict) and isinstance(pair.get("id"), str)
    complete = named and isinstance(content.get("arguments"), dict)
    if content.get("version") != VERSION or not complete or not isinstance(pair, dict):
        raise PlanError(
            f"The file is not a plan of this version of the app: expected version {VERSION} with "
            f"'pair' and 'arguments'. Copy it again from API & cite."
        )
    return dict(pair)


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
