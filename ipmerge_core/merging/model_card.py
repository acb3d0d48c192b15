"""Create the model card of a merged model: sources, method, parameters.

In: a plan. Out: the text of a README.md with hub metadata. Names are untrusted and therefore quoted
or escaped.
"""

from __future__ import annotations

import json
from pathlib import Path

from ipmerge_core.analysis.records import Source
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import find_method
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.version import __version__


def write_card(plan: MergePlan) -> str:
    """Return the model card of a plan's result as Markdown with YAML front matter."""
    method = find_method(plan.method)
    on_hub = [source.id for source in plan.sources.all() if source.revision]
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [merge, ipmerge]",
        *([f"base_model: {json.dumps(on_hub)}"] if on_hub else []),
        "---",
    ]
    settings = {**plan.parameters, "similarity": plan.similarity}
    settings["similarity_threshold"] = plan.similarity_threshold
    settings["anchor"] = plan.anchor
    lines = [
        "# A merged vision-language model",
        "",
        f"Made by IPMerge {__version__} with **{method.label}** ({method.source}), "
        f"plan `{plan.hash}`.",
        "",
        f"    {method.formula}",
        "",
        "| role | model | revision or fingerprint |",
        "|---|---|---|",
        *(_row(role, source) for role, source in _roles(plan)),
        "",
        f"{len(plan.selected)} of {len(plan.decisions)} decoder matrices were merged"
        f"{''.join(f', and {what}' for what in plan.extras)}; every other "
        f"tensor, the tokenizer and the processor are byte-identical to the MLLM's.",
        *_geometry(plan),
        "",
        "| parameter | value |",
        "|---|---|",
        *(f"| {name.rstrip('_')} | {value} |" for name, value in settings.items()),
        "",
        "`ipmerge.json` lists every tensor with its hash and treatment. The merge ran no "
        "benchmark: evaluate perception and reasoning before using the model.",
    ]
    return "\n".join([*front, "", *lines]) + "\n"


def _roles(plan: MergePlan) -> list[tuple[str, Source]]:
    sources = plan.sources
    rows = [("MLLM", sources.mllm), ("base", sources.base)]
    if sources.base_mllm:
        rows.append(("base of the MLLM", sources.base_mllm))
    return rows + [("math expert", expert) for expert in sources.math]


def _row(role: str, source: Source) -> str:
    name = source.id if source.revision else Path(source.id).name
    safe = "".join(c if c.isalnum() or c in "/._- " else "_" for c in name)
    return f"| {role} | `{safe}` | `{(source.revision or source.fingerprint)[:12]}` |"


def _geometry(plan: MergePlan) -> list[str]:
    try:
        preview = plan.preview()
    except PlanError:  # no analysis, or the change is not affine
        return []
    loose = f" (approximate: {preview.approximate})" if preview.approximate else ""
    change = f"{preview.relative_change:.3%} (relative Frobenius norm{loose})"
    return [f"The decoder weights changed by {change}."]
