"""Define the HTTP endpoints that start evaluations and return their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.runtime.job_lists import describe_job
from ipmerge_core.ui.evaluate.results import read_result, result_json
from ipmerge_core.ui.evaluate.start import Asked, Varied, result_of, start_evaluation_of
from ipmerge_core.ui.method_choice import EXPLORED_METHOD

if TYPE_CHECKING:
    from ipmerge_core.planning.plan import MergePlan
    from ipmerge_core.ui.backend import Backend

Json = dict[str, Any]


def evaluation_endpoints(
    backend: Backend, read_plan: Callable[[str, tuple[Any, ...], tuple[Any, ...]], MergePlan]
) -> list[Callable[..., Any]]:
    """Return the endpoints; `read_plan` makes the plan of a pair from the values of a request."""

    def evaluate_start(
        pack: str,
        tasks: list[str] = ["demo"],  # noqa: B006
        limit: int = 25,
        kind: str = "models",
        parameter: str = "",
        values: str = "",
        parameter2: str = "",
        values2: str = "",
        merges: list[str] = [],  # noqa: B006
        keys: dict[str, str] = {},  # noqa: B006
        replace_by: str = "constant",
        modules: list[str] = ["attention", "mlp"],  # noqa: B006
        stride: int = 1,
        seed: int = 0,
        device: str = "auto",
        similarity_threshold: float = 0.4,
        lambda_: float = 1.0,
        similarity: str = "first",
        variant: str = "sum",
        overrides: dict[str, str] = {},  # noqa: B006
        method: str = EXPLORED_METHOD,
        parameters: dict[str, Any] = {},  # noqa: B006
        options: dict[str, Any] = {},  # noqa: B006
        calibration: str = "",
    ) -> dict[str, str]:
        """Start an evaluation on tasks; returns the run's id and key immediately.

        The kind is models (the unmerged model, the plan, and finished `merges` by run id or folder
        name, on a Space with their `keys`), sweep (over `parameter` with `values`, separated by
        commas, and perhaps a second one), ablation, knockout, or search (40 evaluations in the
        usual space of the plan's method). The plan is described as for /preview. Math tasks are
        evaluated together with their perception part. /evaluation_result returns the result when
        the run has finished.
        """
        chosen = (similarity_threshold, lambda_, similarity, variant, overrides)
        plan = read_plan(pack, chosen, (method, parameters, options, calibration))
        asked = Asked(
            kind=kind,
            tasks=_texts("tasks", tasks),
            limit=limit,
            seed=seed,
            varied=(Varied(parameter, values), Varied(parameter2, values2)),
            merges=_texts("merges", merges),
            replace_by=replace_by,
            modules=_texts("modules", modules),
            stride=stride,
            device=device,
        )
        started = start_evaluation_of(backend, pack, plan, f"plan {plan.hash}", asked, keys=keys)
        return {"job_id": started.id, "key": started.key}

    def evaluation_result(job_id: str, key: str = "") -> Json:
        """Return the result of a finished evaluation: all scores, tests and replies.

        On a Space the key of the run is required.
        """
        status = backend.store.status(job_id)
        if backend.hosted and not backend.store.holds_key(job_id, key):
            raise RunError("The result of another visitor's run is not available without its key.")
        if status.state != "finished":
            raise RunError(f"The run '{status.title}' is {status.state}; it has no result yet.")
        about = describe_job(backend.store, job_id).about
        result = result_of(str(status.arguments.get("out", "")))
        found = read_result(result, about.get("pack", ""))
        return json.loads(result_json(found))  # type: ignore[no-any-return]

    return [evaluate_start, evaluation_result]


def _texts(name: str, values: object) -> tuple[str, ...]:
    """Check that a value is a list of texts. Raises: PlanError."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise PlanError(f"`{name}` must be a list of texts.")
    return tuple(values)
