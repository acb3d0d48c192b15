"""The summary of an experiment: models, findings, plan, recorded replies and scores in one file.

In: the folder, the plan and the report of an experiment. Out: a `Summary` of plain values.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipmerge_core.evaluation.result_files import ResultFile
from ipmerge_core.planning.description import describe_empty, facts_of

if TYPE_CHECKING:
    from ipmerge_core.evaluation.experiment_folder import ExperimentFolder
    from ipmerge_core.evaluation.report import Report
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.planning.plan import MergePlan


@dataclass(frozen=True)
class Summary(ResultFile):
    """The outcome of an experiment.

    `models` have their places, commits and fingerprints; `plan` is as in `ipmerge.json`; `records`
    counts the verdicts of recorded replies; `scores` has a row per model, task and part, and
    `comparisons` the paired tests. `files` are relative to the folder.
    """

    FORMAT = "ipmerge-experiment"

    created: str
    models: tuple[dict[str, Any], ...]
    findings: tuple[dict[str, str], ...]
    plan: dict[str, Any]
    records: dict[str, int]
    scores: tuple[dict[str, Any], ...]
    comparisons: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    files: dict[str, str]


def summary_of(
    folder: ExperimentFolder, plan: MergePlan, findings: Sequence[Finding], report: Report
) -> Summary:
    """Summarize a finished experiment."""
    examples = json.loads(folder.records.read_text(encoding="utf-8"))["examples"]
    verdicts = Counter(example["verdict"] for example in examples)
    empty = describe_empty(plan)
    roles = ["mllm", "base", *(["base of the mllm"] if plan.sources.base_mllm else [])]
    roles += [f"math {number + 1}" for number in range(len(plan.sources.math))]
    names = ("pack", "plan", "model", "records", "report", "result", "page", "replies")
    paths = {name: getattr(folder, name) for name in names}
    return Summary(
        created=report.created,
        models=tuple(
            {"role": role, "id": s.id, "revision": s.revision, "fingerprint": s.fingerprint}
            for role, s in zip(roles, plan.sources.all(), strict=True)
        ),
        findings=tuple(finding._asdict() for finding in findings),
        plan=facts_of(plan),
        records=dict(sorted(verdicts.items())),
        scores=tuple(_scores(report)),
        comparisons=tuple(_comparisons(report)),
        notes=(*([empty] if empty else []), *report.notes),
        versions=report.versions,
        files={name: path.name for name, path in paths.items() if path.exists()},
    )


def _scores(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "model": result.subject,
            "task": result.task,
            "part": part.part,
            "right": part.right,
            "n": part.n,
            "low": part.low,
            "high": part.high,
            "unjudged": part.unjudged,
            "missing": part.missing,
            "tokens_per_reply": result.length.mean_tokens,
        }
        for result in report.results
        for part in result.parts
        if part.kind != "skill"
    ]


def _comparisons(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "task": each.task,
            "part": each.part,
            "n": each.test.n,
            "fixed": each.test.fixed,
            "broken": each.test.broken,
            "low": each.test.low,
            "high": each.test.high,
            "p_holm": each.p_holm,
        }
        for each in report.comparisons
        if each.kind != "skill"
    ]
