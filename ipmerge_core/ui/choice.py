"""From what a visitor has chosen to the plan it stands for, and to words about it.

In: the id of a pair and a `PlanChoice`, small plain values that fit in gr.State. Out: a
`MergePlan`, made on demand (this loads torch), and short descriptions. Checks nothing: that is done
where the values arrive.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.records import Analysis
from ipmerge_core.ui.layer_map import PlanChoice
from ipmerge_core.ui.packs import find_pack

if TYPE_CHECKING:
    from ipmerge_core.plan import MergePlan

VARIANT_WORDS = {
    "sum": "IP-Merging",
    "max": "gamma max",
    "rescale_only": "rescaled only",
    "select_only": "selected only",
}


def plan_of(pack_id: str, choice: PlanChoice, **more: Any) -> MergePlan:  # noqa: ANN401
    """Make the plan that a choice stands for, with more arguments of it. Raises: PlanError."""
    from ipmerge_core.plan import make_plan

    return make_plan(analysis_of(pack_id), **choice.arguments, **more)


def describe_choice(choice: PlanChoice) -> str:
    """Say in a few words what is chosen.

    >>> describe_choice(PlanChoice(0.1, 4.0, variant="max"))
    'S_α 0.1, λ 4, gamma max'
    """
    words = [f"S_α {choice.similarity_threshold:.3g}", f"λ {choice.lambda_:.3g}"]
    if choice.similarity != "first":
        words.append(f"similarity {choice.similarity}")
    if choice.variant != "sum":
        words.append(VARIANT_WORDS[choice.variant])
    if choice.overrides:
        words.append(f"{len(choice.overrides)} set by hand")
    return ", ".join(words)


def choice_digest(pack_id: str, plan: MergePlan, device: str) -> str:
    """Return the SHA-256 of exactly what a merge would do: pair, plan and device.

    Unlike the plan's own digest it covers how the plan came about, as it is shown to people.
    """
    content = [pack_id, device, plan.to_dict()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def analysis_of(pack_id: str) -> Analysis:
    """Return a pair's analysis, read once per version of its file. Raises: PlanError."""
    path = find_pack(pack_id).path
    return _load(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(path: Path, _modified: int) -> Analysis:
    return Analysis.load(path)
