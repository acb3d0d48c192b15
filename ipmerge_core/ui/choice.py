"""From what a visitor has chosen to the plan it stands for, and to words about it.

In: the id of a pair and a `PlanChoice`, small plain values that fit in gr.State. Out: a
`MergePlan`, made on demand (this loads torch), and short descriptions. Checks nothing: that is done
where the values arrive.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from ipmerge_core.ui.layer_map import PlanChoice
from ipmerge_core.ui.packs import find_pack, model_folder

if TYPE_CHECKING:
    from ipmerge_core.plan import MergePlan
    from ipmerge_core.records import Analysis, Source

VARIANT_WORDS = {
    "sum": "IP-Merging",
    "max": "gamma max",
    "rescale_only": "rescaled only",
    "select_only": "selected only",
}


def plan_of(pack_id: str, choice: PlanChoice) -> MergePlan:
    """Make the plan that a choice stands for. Raises: PlanError."""
    from ipmerge_core.plan import make_plan

    modified = find_pack(pack_id).path.stat().st_mtime_ns
    return make_plan(_analysis(pack_id, modified), **choice.arguments)


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


@lru_cache(maxsize=4)
def _analysis(pack_id: str, _modified: int) -> Analysis:
    """Load a pack's analysis with its bundled models found wherever the app was started."""
    from ipmerge_core.records import Analysis

    def here(source: Source) -> Source:
        return replace(source, id=model_folder(source.id))

    analysis = Analysis.load(find_pack(pack_id).path)
    sources = analysis.sources
    return replace(
        analysis,
        sources=replace(
            sources,
            mllm=here(sources.mllm),
            base=here(sources.base),
            base_mllm=here(sources.base_mllm) if sources.base_mllm else None,
            math=tuple(here(expert) for expert in sources.math),
        ),
    )
