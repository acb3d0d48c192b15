"""Run a search as a job of the app.

In: plain arguments, as a job stores them. Out: steps that count evaluations, and a file at the end.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.evaluation.evaluate import EvaluationSettings
from ipmerge_core.methods.declarations import relayed
from ipmerge_core.search.coefficients import SearchSettings, SearchStep, iter_search
from ipmerge_core.search.study import Budget, Evaluation
from ipmerge_core.tasks.registry import find_tasks


class SearchProgress(NamedTuple):
    """Progress of a run: how many evaluations are done, and a description of the last."""

    evaluations_done: int
    evaluations_total: int
    last: str = ""


def iter_search_to(
    pack: str,
    out: str,
    tasks: Sequence[str],
    study: str,
    *,
    how: Mapping[str, Any],
    budget: Mapping[str, float | None],
    device: str = "cpu",
    **limits: Any,  # noqa: ANN401 (fields of EvaluationSettings)
) -> Generator[SearchProgress]:
    """Search the coefficients of a method on a pack and write the result; a run of the app.

    Args:
        pack: file of the analysis.
        out: file of the result, written at the end.
        tasks: names of tasks; perception guards are added.
        study: folder of the evaluations; a run that is resumed keeps those it has.
        how: fields of `SearchSettings` except the budget, as JSON values.
        budget: fields of `Budget`.
        device: a torch device name.
        **limits: limit, seed, max_new_tokens, batch_size.

    Raises: as `iter_search`.
    """
    found, settings = find_tasks(tasks), EvaluationSettings(device=device, **limits)
    steps = iter_search(
        Analysis.load(pack), Path(study), found, read_settings(how, budget), settings
    )
    result = yield from relayed(steps, _progress)
    result.save(Path(out))


def read_settings(how: Mapping[str, Any], budget: Mapping[str, float | None]) -> SearchSettings:
    """Return the settings that JSON values describe. Raises: RunError, PlanError."""
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in how.items()}
    return SearchSettings(**plain, budget=Budget(**budget))  # type: ignore[arg-type]


def _progress(step: SearchStep) -> SearchProgress:
    return SearchProgress(step.done, step.total, _words(step.evaluation))


def _words(found: Evaluation | None) -> str:
    """Describe an evaluation in a few words.

    >>> _words(Evaluation(3, {"lambda_": 2.0}, "complete", 54.5, 2.0, 40, {}))
    'evaluation 3: lambda 2, score 54.5'
    """
    if found is None:
        return ""
    values = ", ".join(f"{name.rstrip('_')} {v:.4g}" for name, v in found.parameters.items())
    score = "failed" if found.value is None else f"score {found.value:.1f}"
    return f"evaluation {found.number}: {values}, {score}"
