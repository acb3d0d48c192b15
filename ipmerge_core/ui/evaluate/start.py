"""Start evaluations as runs of the app.

In: the fields of the form or of the endpoint, untrusted, and the chosen merge. Out: a run that
writes its result to a file whose name cannot be guessed. Everything that can be checked without
loading a model is checked before the run starts.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from ipmerge_core.errors import PlanError, RunError
from ipmerge_core.planning.options import read_value
from ipmerge_core.ui.chosen_merge import ChosenMerge, name_of
from ipmerge_core.ui.evaluate.content import LABELS
from ipmerge_core.ui.evaluate.search_start import SearchAsked, search_work
from ipmerge_core.ui.finetuned_models import PREFIX as FINETUNED
from ipmerge_core.ui.finetuned_models import find_finetuned
from ipmerge_core.ui.finished_merges import find_merge
from ipmerge_core.ui.pairs import find_pack
from ipmerge_core.ui.plan_choice import analysis_of
from ipmerge_core.ui.runs import results_folder, study_folder
from ipmerge_core.ui.serving import current_visitor

if TYPE_CHECKING:
    from ipmerge_core.evaluation.points import Axis
    from ipmerge_core.planning.plan import MergePlan
    from ipmerge_core.runtime.jobs import Started
    from ipmerge_core.ui.backend import Backend

Kind = Literal["models", "sweep", "ablation", "knockout", "search"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_HOSTED = 300  # items of a task on a Space
LONGEST_VALUES = 400  # characters of a list of values
_NAMES = {label: name for name, label in LABELS.items()} | {"lambda": "lambda_"}


class Varied(NamedTuple):
    """A parameter as it is typed, and its values, separated by commas; empty for none."""

    parameter: str = ""
    values: str = ""


class Asked(NamedTuple):
    """What to evaluate.

    Attributes:
        kind: models, sweep, ablation, knockout or search.
        tasks: names of tasks.
        limit: items per task (of the demo task: per skill).
        seed: selects the items.
        varied: the parameters of a sweep.
        merges: finished merges to compare, by run id or folder name.
        replace_by: what replaces a knocked-out module.
        modules: the modules that are knocked out.
        stride: every n-th layer is knocked out.
        device: "auto" or a torch device.
        search: what a search varies, and how.
    """

    kind: str = "models"
    tasks: Sequence[str] = ("demo",)
    limit: int | None = None
    seed: int = 0
    varied: Sequence[Varied] = ()
    merges: Sequence[str] = ()
    replace_by: str = "constant"
    modules: Sequence[str] = ("attention", "mlp")
    stride: int = 1
    device: str = "auto"
    search: SearchAsked = SearchAsked()


def start_evaluation(
    backend: Backend,
    chosen: ChosenMerge,
    asked: Asked,
    *,
    owner: str = "",
    keys: Mapping[str, str] | None = None,
) -> Started:
    """Start an evaluation of the chosen merge; see `start_evaluation_of`."""
    plan = chosen.make_plan()
    name = name_of(chosen, plan.hash)
    return start_evaluation_of(backend, chosen.pack_id, plan, name, asked, owner=owner, keys=keys)


def start_evaluation_of(
    backend: Backend,
    pack_id: str,
    plan: MergePlan,
    name: str,
    asked: Asked,
    *,
    owner: str = "",
    keys: Mapping[str, str] | None = None,
) -> Started:
    """Start an evaluation of a plan.

    Args:
        backend: the app's runs and models.
        pack_id: the pair.
        plan: compared with the unmerged model, varied by a sweep, taken apart by an ablation, or
            cut by a knock-out; a search starts from its parameters.
        name: the name of the plan, for the list of runs.
        asked: what to evaluate.
        owner: the visitor's secret, see `JobStore.start`.
        keys: keys of the visitor's merges.

    Raises: IPMergeError for a value that is not valid, before anything starts.
    """
    if asked.kind not in KINDS:
        raise RunError(f"Unknown kind '{asked.kind[:40]}'. Available: {', '.join(KINDS)}.")
    tasks = _checked_tasks(backend, asked)
    out = results_folder() / f"{asked.kind}-{secrets.token_hex(8)}.json"
    target, arguments = _work(backend, pack_id, plan, asked, keys or {})
    if asked.kind == "search":
        arguments["study"] = str(study_folder(out))
        name = f"{arguments['how']['method']}, {asked.search.optimizer}"
    results_folder().mkdir(parents=True, exist_ok=True)
    return backend.store.start(
        target,
        {
            **arguments,
            "out": str(out),
            "tasks": tasks,
            "device": backend.device_for(asked.device, fp64=False),
            "limit": asked.limit,
            "seed": asked.seed,
        },
        title=f"Evaluate {_TITLES[asked.kind]} on {', '.join(tasks)}",
        owner=owner,
        about={
            "kind": "evaluation",
            "pack": pack_id,
            "pair": find_pack(pack_id).label,
            "method": f"{asked.kind}: {name}"[:200],
            "samples": ", ".join(tasks),
        },
        visitor=current_visitor(),
    )


_TITLES = {
    "models": "models",
    "sweep": "a sweep",
    "ablation": "the ablation",
    "knockout": "a layer knock-out",
    "search": "the points of a search",
}


def _checked_tasks(backend: Backend, asked: Asked) -> list[str]:
    """Check the tasks and the number of items. Raises: RunError."""
    from ipmerge_core.evaluation.evaluate import EvaluationSettings
    from ipmerge_core.tasks.registry import find_tasks

    EvaluationSettings(limit=asked.limit, seed=asked.seed)
    names = [str(name).strip() for name in asked.tasks if str(name).strip()]
    found = [task.name for task in find_tasks(names)]
    if backend.hosted:
        own = [name for name in found if name.partition(":")[0] != "demo"]
        if own:
            raise RunError(
                f"This Space evaluates the demo task only, not '{own[0][:40]}'. Run the app "
                f"locally for other tasks."
            )
        if asked.limit is None or asked.limit > MOST_HOSTED:
            raise RunError(f"This Space evaluates at most {MOST_HOSTED} items per skill.")
    return found


def _work(
    backend: Backend,
    pack_id: str,
    plan: MergePlan,
    asked: Asked,
    keys: Mapping[str, str],
) -> tuple[Any, dict[str, Any]]:
    """Return the driver of an evaluation and its own arguments."""
    from ipmerge_core.evaluation import knockout, sweeps
    from ipmerge_core.evaluation.cuts import CutMatrix
    from ipmerge_core.evaluation.points import ablation_points, sweep_points
    from ipmerge_core.planning.description import arguments_of

    pack = str(find_pack(pack_id).path)
    if asked.kind == "search":
        from ipmerge_core.search.runs import iter_search_to

        return iter_search_to, search_work(pack_id, plan, asked.search, hosted=backend.hosted)
    if asked.kind == "models":
        folders = _folders(backend, pack_id, asked, keys)
        named = {"plan": plan, "plan_name": f"chosen merge, plan {plan.hash}"}
        return sweeps.iter_models_to, {"pack": pack, "folders": folders, **named}
    if asked.kind == "knockout":
        choice = {
            "value": asked.replace_by,
            "modules": list(asked.modules),
            "stride": asked.stride,
        }
        matrices = [CutMatrix(d.layer, d.module, d.name) for d in plan.decisions]
        knockout.read_choice(choice).list(matrices)  # refuses modules that there are not
        return knockout.iter_knockout_to, {"plan": plan, "choice": choice}
    fixed, analysis = arguments_of(plan), analysis_of(pack_id)
    if asked.kind == "ablation":
        ablation_points(analysis, **fixed)
        return sweeps.iter_sweep_to, {"pack": pack, "fixed": fixed, "ablation": True}
    axes = [_axis(plan, varied) for varied in asked.varied if varied.parameter]
    varied_names = {axis.parameter for axis in axes}
    kept = {name: value for name, value in fixed.items() if name not in varied_names}
    sweep_points(analysis, axes, **kept)
    plain = [{"parameter": axis.parameter, "values": list(axis.values)} for axis in axes]
    return sweeps.iter_sweep_to, {"pack": pack, "axes": plain, "fixed": kept}


def _folders(
    backend: Backend, pack_id: str, asked: Asked, keys: Mapping[str, str]
) -> dict[str, str]:
    """Return the folders of finished merges and fine-tuned models by label. Raises: RunError."""
    found = {}
    for merge in asked.merges:
        if str(merge).startswith(FINETUNED):
            model = find_finetuned(backend, pack_id, str(merge), keys)
            found[model.label] = str(model.folder)
            continue
        known = find_merge(backend, pack_id, str(merge), dict(keys))
        found[known.label] = str(known.folder)
    return found


def _axis(plan: MergePlan, varied: Varied) -> Axis:
    """Read a parameter and its values. Raises: PlanError."""
    from ipmerge_core.evaluation.points import Axis
    from ipmerge_core.methods import find_method

    name = varied.parameter.strip()
    name = _NAMES.get(name, name.replace(" ", "_").replace("-", "_"))
    kinds = {parameter.name: parameter.kind for parameter in find_method(plan.method).parameters}
    kind = "choice" if name == "similarity" else kinds.get(name, "float")
    if len(varied.values) > LONGEST_VALUES:
        raise PlanError(
            f"The values of {name} have {len(varied.values)} characters; the maximum is "
            f"{LONGEST_VALUES}. Give fewer values."
        )
    texts = [text.strip() for text in varied.values.replace(";", ",").split(",") if text.strip()]
    return Axis(name, tuple(read_value(text, kind) for text in texts))


def result_of(out: str) -> str:
    """Return the id of the result that a run writes."""
    return Path(out).stem
