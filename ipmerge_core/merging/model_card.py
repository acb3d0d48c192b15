"""Create the model card of a merged model: sources, method, parameters.

In: a plan. Out: the text of a README.md with hub metadata. Names are untrusted and therefore quoted
or escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ipmerge_core.analysis.records import Source
from ipmerge_core.errors import PlanError
from ipmerge_core.merging.manifest import remarks_of
from ipmerge_core.merging.parts import count_extras
from ipmerge_core.methods import find_method
from ipmerge_core.models.files import is_hub_id
from ipmerge_core.models.pairing import Finding, ModelPair
from ipmerge_core.planning.description import describe_change, describe_selection, settings_of
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.version import __version__


def write_card(
    plan: MergePlan, pair: ModelPair | None = None, findings: Sequence[Finding] = ()
) -> str:
    """Return the model card of a plan's result as Markdown with YAML front matter.

    Args:
        plan: the plan, described by `settings_of`.
        pair: its opened models, which determine what is merged besides decoder matrices.
        findings: the results of the sibling check; refusals of a forced merge are quoted.
    """
    method = find_method(plan.method)
    front = front_matter(
        plan.sources.all(),
        library="transformers",
        task="image-text-to-text",
        tags=["merge", "ipmerge"],
    )
    extras = plan.extras if pair is None else count_extras(plan, pair)
    forced = [finding for finding in findings if finding.level == "refusal"]
    computed = {} if pair is None else remarks_of(pair)
    notes = [f"- {role}: {_cell(message)}" for role, message in computed.items()]
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
        *(["", *notes] if notes else []),
        "",
        f"{describe_selection(plan)} were merged{''.join(f', and {what}' for what in extras)}; "
        f"every other tensor, the tokenizer and the processor are byte-identical to the MLLM's.",
        *_geometry(plan),
        *(f"\nMerged although the sibling check failed: {_cell(f.message)}" for f in forced),
        "",
        *settings_table(plan),
        "",
        "`ipmerge.json` lists every tensor with its hash and treatment. The merge ran no "
        "benchmark: evaluate perception and reasoning before using the model.",
    ]
    return "\n".join([front, *lines]) + "\n"


def settings_table(plan: MergePlan) -> list[str]:
    """Return the settings of a plan as the lines of a Markdown table."""
    rows = (f"| {name} | {_cell(value)} |" for name, value in settings_of(plan).items())
    return ["| parameter | value |", "|---|---|", *rows]


def front_matter(
    parents: Iterable[Source], *, library: str, tags: Sequence[str], task: str | None = None
) -> str:
    """Return the metadata that a model card starts with, as YAML between two lines of dashes.

    Args:
        parents: the models that this one was made of; those on the hub become `base_model`.
        library: what loads the model, by its name on the hub.
        tags: what the hub files the model under.
        task: the hub's name for what the model does.
    """
    from huggingface_hub import ModelCardData

    on_hub = [parent.id for parent in parents if parent.revision and is_hub_id(parent.id)]
    data = ModelCardData(
        library_name=library, pipeline_tag=task, tags=list(tags), base_model=on_hub or None
    )
    return f"---\n{data.to_yaml()}\n---\n"


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


def _cell(value: object) -> str:
    """Show a value of the plan; a pattern as code, so that it is no markup and no cell's end."""
    text = str(value)
    if all(c.isalnum() or c in "/._-+ " for c in text):
        return text
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"


def _geometry(plan: MergePlan) -> list[str]:
    try:
        plan.preview()
    except PlanError:  # no analysis, or the change is not affine
        return []
    return [f"The {describe_change(plan, 'changed')}."]
