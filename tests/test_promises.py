"""Every control is walked to its effect: the app, the command line, Python and the HTTP API.

The controls are those that the code declares: `PlanOptions`, the parameters of METHODS, the
arguments of the parser, the signatures of the endpoints and of `make_plan`, and the components of
the app. Each is in a table below with the place where its value arrives; a control without a row
fails the first tests, a value that does not arrive the others.

control -> field of the plan -> argument of the run -> entry of the manifest
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import pytest
from conftest import Trio

import ipmerge_core as ipm
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.calibration.passes import CalibrationSettings
from ipmerge_core.calibration.store import Measured, Measurements
from ipmerge_core.cli import main
from ipmerge_core.cli.parser import make_parser
from ipmerge_core.finetuning.settings import TrainingSettings
from ipmerge_core.methods import METHODS, Parameter
from ipmerge_core.planning import plan as planning
from ipmerge_core.planning.description import arguments_of, facts_of, settings_of
from ipmerge_core.planning.options import OPTIONS, PlanOptions
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.planning.scope import needed_data
from ipmerge_core.runtime.jobs import Started
from ipmerge_core.ui import api, method_choice
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.merge import method_form as form
from ipmerge_core.ui.plan_choice import PlanChoice, analysis_of

PAIR = "pack"
PACK = Path(__file__).parents[1] / "assets" / "demo" / "pack.json.gz"
MATRIX = "model.layers.0.self_attn.q_proj.weight"

# --- the tables: where the value of every control arrives --------------------------------------

MODELS = dict.fromkeys(("mllm", "math", "base", "base_mllm"), "manifest.sources")
PLANNED = {"plan": "the whole plan", "pack": "manifest.sources", **MODELS}
MERGING = {
    **PLANNED,
    "device": "manifest.device",
    "force": "manifest.check.forced",
    "output": "folder",
}
PLAN_FIELDS = {
    "similarity_threshold": "plan.similarity_threshold",
    "lambda_": "plan.parameters.lambda_",
    "similarity": "plan.similarity",
    **{name: f"plan.{name}" for name in OPTIONS if name != "overrides"},
    "calibration": "manifest.calibration.folder",
    "method": "plan.method",
}
ANALYSIS = {name: f"plan.analysed.{name}" for name in Options._fields}
SHOWN_ONLY = dict.fromkeys(("json", "quiet", "help"), "output on the terminal")

DRIFT_TRAINING = [
    field.name for field in fields(TrainingSettings) if field.name != "tokens"
]  # fmt: skip
EVALUATED = {
    "tasks": "report.tasks",
    **dict.fromkeys(("limit", "seed", "max_new_tokens", "batch_size", "device"), "report.settings"),
    "store": "folder of the replies",
    "resume": "replies answered again",
    "no_guard": "report.tasks",
}

COMMANDS: dict[str, dict[str, str]] = {
    "check": {**MODELS, "strict": "exit code", "exact": "weights compared by the check"},
    "analyse": {
        **MODELS,
        **ANALYSIS,
        "device": "run",
        "output": "pack",
        "force": "sibling check",
        "updates": "folder of updates",
    },
    "calibrate": {
        **MODELS,
        **{name: f"manifest.calibration.settings.{name}" for name in ("kind", "estimator", "wide")},
        "image_tokens": "manifest.calibration.settings.image_tokens",
        "mllm_samples": "manifest.calibration.models",
        "math_samples": "manifest.calibration.models",
        "limit": "manifest.calibration.models",
        "device": "run",
        "output": "folder",
        "dry_run": "estimate",
    },
    "plan": {
        **MODELS,
        **PLAN_FIELDS,
        "pack": "manifest.sources",
        "recipe": "the whole plan",
        "set": "plan.parameters",
        "force_merge": "plan.overrides",
        "force_keep": "plan.overrides",
        "measure": "plan.statistic",
        "output": "plan file",
        "device": "first pass of --measure",
    },
    "recipe": {
        **{name: place for name, place in PLANNED.items() if name != "base_mllm"},
        "output": "recipe",
    },
    "merge": {
        **MERGING,
        "resume": "manifest.attempts",
        "dry_run": "estimate",
        "updates": "no second decomposition",
    },
    "adapter": {
        **MERGING,
        "tolerance": "report.tolerance",
        "max_rank": "report.max_rank",
        "updates": "no second decomposition",
    },
    "chat": dict.fromkeys(
        (
            "model",
            "compare",
            "image",
            "prompt",
            "max_new_tokens",
            "max_thinking_tokens",
            "device",
            "precision",
        ),
        "answer",
    ),
    "record": {
        **{name: place for name, place in MERGING.items() if name != "force"},
        "prompts": "examples",
        "max_new_tokens": "max_new_tokens",
        "max_thinking_tokens": "examples",
        "precision": "dtype",
        "updates": "no second decomposition",
    },
    "evaluate": {
        "models": "report.subjects",
        "base": "report.subjects",
        "tasks": "report.tasks",
        **dict.fromkeys(("limit", "seed", "max_new_tokens", "batch_size"), "report.settings"),
        "device": "report.settings",
        "store": "folder of the replies",
        "resume": "replies answered again",
        "no_guard": "report.tasks",
        "output": "report",
        **dict.fromkeys(
            ("harness", "harness_python", "harness_model", "harness_include"), "harness command"
        ),
    },
    "sweep": {
        **MODELS,
        **{name: f"points: {place}" for name, place in PLAN_FIELDS.items()},
        "pack": "sweep.sources",
        "set": "points: plan.parameters",
        "force_merge": "points: plan.overrides",
        "force_keep": "points: plan.overrides",
        **dict.fromkeys(("parameter", "values", "parameter2", "values2"), "sweep.axes"),
        **dict.fromkeys(("ablation", "controls"), "sweep.points"),
        **EVALUATED,
        "force": "sibling check",
        "output": "sweep",
    },
    "experiment": {
        **MODELS,
        **PLAN_FIELDS,
        **dict.fromkeys(("set", "force_merge", "force_keep"), "plan of the experiment"),
        **{name: place for name, place in EVALUATED.items() if name not in ("store", "resume")},
        "prompts": "examples",
        "max_reply_tokens": "max_new_tokens",
        "dry_run": "estimate",
        "force": "sibling check",
        "output": "folder of the experiment",
    },
    "knockout": {
        **MODELS,
        "pack": "report.subjects",
        "model": "report.subjects",
        **dict.fromkeys(("replace_by", "modules", "layers", "stride"), "knockout.cuts"),
        **EVALUATED,
        "force": "sibling check",
        "csv": "rows",
        "map": "changes",
        "output": "knockout",
    },
    "drift": {
        **{name: f"manifest.sources.{name}" for name in ("mllm", "math")},
        "math_base": "manifest.prior.hierarchical",
        "data": "manifest.data",
        "limit": "manifest.data",
        **{
            name: f"manifest.settings.prior.{name}"
            for name in ("rule", "strength", "per_micro_batch")
        },
        "normalize_prior": "manifest.settings.prior.normalize",
        "prior_on": "manifest.settings.prior.placement",
        "modules": "manifest.settings.prior.scope.modules",
        "skip_first_layers": "manifest.settings.prior.scope.first_layer",
        "last_layer": "manifest.settings.prior.scope.last_layer",
        "biases": "manifest.settings.prior.scope.biases",
        "module_strength": "manifest.settings.prior.scope.strengths",
        **{name: f"manifest.settings.training.{name}" for name in DRIFT_TRAINING},
        "add_token": "manifest.settings.training.tokens",
        "baseline": "folders of merges",
        "base": "folders of merges",
        "output": "folder",
        "device": "manifest.device",
        "resume": "curves",
        "keep_checkpoints": "folder of checkpoints",
        "dry_run": "check",
        "show_examples": "check",
        "force": "check",
    },
    "search": {
        **MODELS,
        **PLAN_FIELDS,
        **dict.fromkeys(("set", "force_merge", "force_keep"), "every plan of the search"),
        "pack": "search.sources",
        **dict.fromkeys(("range", "optimizer", "validation"), "search"),
        **dict.fromkeys(("budget", "items", "minutes", "racing", "search_seed"), "evaluations"),
        "maximise": "search.groups",
        "no_labels": "search",
        **dict.fromkeys(("storage", "worker"), "study"),
        **EVALUATED,
        "force": "sibling check",
        "output": "folder of the study",
    },
    "replay": {
        "table": "tables.csv",
        **dict.fromkeys(("optimizer", "seeds", "budget"), "curves.csv"),
        "output": "folder of the report",
    },
    "app": {
        "host": "address",
        "port": "address",
        "device": "default device of all runs",
        "precision": "of the models in memory",
    },
}
REQUEST = {
    "pack": "manifest.sources",
    **{name: PLAN_FIELDS[name] for name in ("similarity_threshold", "lambda_", "similarity")},
    "variant": "plan.parameters",
    "overrides": "plan.overrides",
    "method": "plan.method",
    "parameters": "plan.parameters",
    "options": "plan options",
    "calibration": "manifest.calibration.folder",
}
JOB = {"job_id": "run", "key": "run"}
ENDPOINTS: dict[str, dict[str, str]] = {
    "packs": {},
    "pack": {"pack": "content"},
    "preview": REQUEST,
    "plan_check": {**REQUEST, "device": "manifest.device", "force": "readiness"},
    "merge_start": {
        **REQUEST,
        "device": "manifest.device",
        "force": "manifest.check.forced",
        "folder": "folder",
        "digest": "refusal of anything but what was checked",
    },
    "analyse_start": {**MODELS, **ANALYSIS, "device": "run"},
    "job_status": {"job_id": "run"},
    "job_cancel": JOB,
    "job_resume": JOB,
    "evaluate_start": {
        **REQUEST,
        **dict.fromkeys(("tasks", "limit", "seed", "device"), "report.settings"),
        "kind": "driver of the run",
        **dict.fromkeys(("parameter", "values", "parameter2", "values2"), "sweep.axes"),
        **dict.fromkeys(("replace_by", "modules", "stride"), "knockout.cuts"),
        "merges": "report.subjects",
        "keys": "access",
    },
    "evaluation_result": {"job_id": "run", "key": "access"},
    "answer_pair": {
        **{name: REQUEST[name] for name in ("pack", "variant", "overrides")},
        **{name: REQUEST[name] for name in ("similarity_threshold", "lambda_", "similarity")},
        **dict.fromkeys(
            ("question", "image", "temperature", "max_new_tokens", "seed", "left", "right"),
            "answer",
        ),
        **dict.fromkeys(("left_key", "right_key"), "access"),
    },
}
ENDPOINTS["answer"] = {
    "pack": REQUEST["pack"],
    **dict.fromkeys(
        ("question", "columns", "images", "history", "system", "temperature", "max_new_tokens"),
        "answer",
    ),
    **dict.fromkeys(("max_thinking_tokens", "seed"), "answer"),
}
COMPONENTS = {
    "pair": "manifest.sources",
    "analyse-known": "fills in the form",
    "analyse-mllm": "manifest.sources",
    "analyse-math": "manifest.sources",
    "analyse-base": "manifest.sources",
    "analyse-own-base": "manifest.sources",
    "analyse-depth": "plan.analysed.quick",
    "analyse-rank": "plan.analysed.rank",
    "analyse-temperature": "plan.analysed.temperature",
    "analyse-directions": "plan.analysed.directions",
    "analyse-device": "run",
    **{f"model-{letter}": "answer" for letter in "abcd"},
    **{
        f"chat-{name}": "answer"
        for name in ("temperature", "longest", "thinking", "seed", "system", "earlier")
    },
    "chat-blind": "display",
    "chat-scrolling": "display",
    "chat-agree": "consent",
    "vote-reason": "votes.csv",
    "output-folder": "folder",
    "merge-device": "manifest.device",
    "merge-method": "plan.method",
    "merge-preset": "plan.method",
    **{f"option-{name.replace('_', '-')}": f"plan.{name}" for name in OPTIONS},
    "calibration-folder": "manifest.calibration.folder",
    "samples-mllm": "manifest.calibration.models",
    "samples-math": "manifest.calibration.models",
    "samples-limit": "manifest.calibration.models",
    "compare-pair": "display",
    "evaluate-kind": "driver of the run",
    **dict.fromkeys(
        ("evaluate-tasks", "evaluate-limit", "evaluate-seed", "evaluate-device"), "report.settings"
    ),
    "evaluate-merges": "report.subjects",
    **{
        f"evaluate-{name}{number}": "sweep.axes"
        for name in ("parameter", "values")
        for number in ("", "2")
    },
    **dict.fromkeys(("evaluate-replace", "evaluate-modules", "evaluate-stride"), "knockout.cuts"),
    **dict.fromkeys(
        (
            "search-method",
            "search-optimizer",
            "search-ranges",
            "search-validation",
            "search-groups",
            "search-unlabelled",
        ),
        "search",
    ),
    **dict.fromkeys(
        ("search-evaluations", "search-minutes", "search-seed", "search-racing"), "evaluations"
    ),
    "evaluation-history": "display",
    **{f"finetune-{name}": f"manifest.sources.{name}" for name in ("mllm", "math")},
    "finetune-math-base": "manifest.prior.hierarchical",
    **dict.fromkeys(("finetune-data", "finetune-limit"), "manifest.data"),
    "finetune-name": "folder",
    "finetune-device": "manifest.device",
    "finetune-force": "argument of the run",
    **{
        f"finetune-{name}": "manifest.settings.prior"
        for name in ("rule", "strength", "placement", "per-micro-batch", "normalize")
    },
    **{
        f"finetune-{name}": "manifest.settings.prior.scope"
        for name in ("modules", "first-layer", "last-layer", "biases", "strengths")
    },
    **{
        f"finetune-{name.replace('_', '-')}": f"manifest.settings.training.{name}"
        for name in (*DRIFT_TRAINING, "tokens")
        if name != "report_to"
    },
}
IN_THE_MAP = {"option-overrides"}  # set per matrix in the map of Explore, as `PlanChoice`


def unlisted(found: Mapping[str, set[str]], table: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Controls without a row, and rows without a control."""
    names = sorted({*found, *table})
    return [
        f"{place}: {name}"
        for place in names
        for name in sorted(found.get(place, set()) ^ set(table.get(place, {})))
    ]


def test_every_option_of_the_command_line_has_a_row() -> None:
    parser = make_parser()
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    found = {
        name: {action.dest for action in command._actions} - set(SHOWN_ONLY)
        for name, command in commands.choices.items()
    }
    assert not unlisted(found, COMMANDS)


def endpoints(backend: Backend) -> dict[str, Callable[..., Any]]:
    made = (
        make(backend)
        for make in (api._packs, api._plans, api._runs, api._evaluations, api._answers)
    )
    return {endpoint.__name__: endpoint for group in made for endpoint in group}


def test_every_argument_of_the_endpoints_has_a_row() -> None:
    found = {
        name: set(inspect.signature(endpoint).parameters)
        for name, endpoint in endpoints(Backend()).items()
    }
    assert not unlisted(found, ENDPOINTS)


def test_every_argument_of_make_plan_has_a_row() -> None:
    found = set(inspect.signature(ipm.make_plan).parameters) - {"source", "parameters", "options"}
    assert found == {*PLAN_FIELDS, "overrides"} - (set(OPTIONS) - {"overrides"})
    assert [field.name for field in fields(PlanOptions)] == list(OPTIONS)


LIST_INPUTS = """
import json, gradio as gr
from ipmerge_core.ui.app import build_app
kinds = (gr.Dropdown, gr.Textbox, gr.Number, gr.Slider, gr.Checkbox, gr.Radio)
inputs = [block for block in build_app().blocks.values() if isinstance(block, kinds)]
print(json.dumps([[block.elem_id, block.label, block.visible] for block in inputs]))
"""


def test_every_input_of_the_app_has_a_row(home: Path) -> None:
    # in a process of its own: an app that is not served leaves event loops open
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIST_INPUTS],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "IPMERGE_HOME": str(home)},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    seen = [(name, label) for name, label, visible in found if visible != "hidden"]
    named = {name for name, _ in seen if name}
    assert named == set(COMPONENTS) - IN_THE_MAP
    assert not [label for name, label in seen if not name]
    assert {f"option-{option.name.replace('_', '-')}" for option in method_choice.FIELDS} <= named


# --- values of every parameter and option ------------------------------------------------------


class Case(NamedTuple):
    """A value of one parameter or option that is not its default, with what it needs."""

    method: str
    name: str
    value: Any
    needs: Mapping[str, Any] = {}

    def __str__(self) -> str:
        return f"{self.method}-{self.name}"


def other_values(parameter: Parameter) -> Iterator[Any]:
    if parameter.kind == "choice":
        yield from (choice for choice in parameter.choices if choice != parameter.default)
    elif parameter.kind == "bool":
        yield not parameter.default
    elif parameter.kind == "int":
        yield (parameter.default or 0) + 3
    else:
        yield from (0.123456789012345, 0.3123456789, 0.9)


def case_of(method: str, parameter: Parameter) -> Case:
    defaults = {other.name: other.default for other in METHODS[method].parameters}
    conditions = {
        other: wanted[0]
        for other, wanted in parameter.bounds.only_with
        if defaults[other] not in wanted
    }
    for value in other_values(parameter):
        for more in ({}, {"mllm_weight": 0.5}, {"math_weight": 0.25}, {"density": 0.6}):
            if parameter.name in more:
                continue
            needs = {**conditions, **more}
            given = {**needs, parameter.name: value}
            try:
                METHODS[method].complete(given)
            except ipm.errors.PlanError:
                continue
            if METHODS[method].without_effect(given):
                continue
            return Case(method, parameter.name, value, needs)
    raise AssertionError(f"no other value of {method}'s {parameter.name} is known")


VALUES = {
    "modules": "all",
    "include": "mlp",
    "exclude": "down",
    "layer_gains": (0.0, 0.5123456789, 1.0),
    "layer_profile": "rising",
    "input_share": 0.2123456789,
    "norms": "merge",
    "embeddings": "merge-shared",
    "anchor": "root",
}
PARAMETERS = [case_of(m.name, p) for m in METHODS.values() for p in m.parameters]
OPTION_CASES = [Case("task_arithmetic", name, value) for name, value in VALUES.items()]
CASES = [*PARAMETERS, *OPTION_CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_option_has_a_value_here() -> None:
    assert set(VALUES) == set(OPTIONS) - {"overrides"}
    assert all(value != OPTIONS[name].default for name, value in VALUES.items())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The metadata of a calibration of the demo models, of each kind."""
    models = tuple(
        Measured(role, source.id, source.fingerprint, 7, 70, 1.0, {})
        for role, source in zip(("mllm", "math"), analysis_of(PAIR).sources.merged(), strict=True)
    )
    made = {}
    for kind in ("gram", "fisher"):
        folder = tmp_path_factory.mktemp(kind)
        Measurements(folder, kind, {"kind": kind}, models).save()
        made[kind] = str(folder)
    return made


def data_of(case: Case, calibrations: Mapping[str, str]) -> dict[str, str]:
    method = METHODS[case.method]
    known = {parameter.name for parameter in method.parameters}
    given = {**case.needs, case.name: case.value}
    values = {name: value for name, value in given.items() if name in known}
    kind = needed_data(method, values, PlanOptions.read(given))
    return {"calibration": calibrations[kind]} if kind else {}


def arrived(plan: MergePlan, case: Case) -> Any:
    """The value in the description of the plan that goes into the manifest."""
    facts = json.loads(json.dumps(facts_of(plan)))
    return facts[case.name] if case.name in OPTIONS else facts["parameters"][case.name]


def as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.fixture
def expected(case: Case, calibrations: Mapping[str, str]) -> MergePlan:
    """The plan by Python."""
    values = {**case.needs, case.name: case.value, **data_of(case, calibrations)}
    return ipm.make_plan(analysis_of(PAIR), case.method, **values)


@every_case
def test_a_value_in_python_arrives_in_the_facts_and_is_shown(
    case: Case, expected: MergePlan, tmp_path: Path
) -> None:
    assert arrived(expected, case) == as_json(case.value)
    expected.save(tmp_path / "plan.json")
    again = MergePlan.load(tmp_path / "plan.json")
    assert facts_of(again) == facts_of(expected)
    shown = settings_of(expected)
    name = case.name.replace("_", " ") if case.name in OPTIONS else case.name.rstrip("_")
    numbers = case.value if isinstance(case.value, tuple) else (case.value,)
    for number in numbers:
        digits = repr(number).removesuffix(".0") if isinstance(number, float) else str(number)
        assert digits.lower() in shown[name].lower()


@every_case
def test_the_arguments_of_a_plan_give_the_same_plan(case: Case, expected: MergePlan) -> None:
    again = ipm.make_plan(analysis_of(PAIR), **arguments_of(expected))
    assert again.digest == expected.digest
    assert facts_of(again) == facts_of(expected)


def flags_of(name: str, value: Any) -> list[str]:
    if name in OPTIONS:
        texts = [repr(v) for v in value] if isinstance(value, tuple) else [str(value)]
        return [f"--{name.replace('_', '-')}", *texts]
    return ["--set", f"{name}={value}"]


@every_case
def test_a_value_on_the_command_line_gives_the_same_plan(
    case: Case, expected: MergePlan, calibrations: Mapping[str, str], tmp_path: Path
) -> None:
    out = str(tmp_path / "plan.json")
    words = ["plan", str(PACK), "--method", case.method, "-o", out, "--quiet"]
    for name, value in {**case.needs, case.name: case.value}.items():
        words += ["--lambda", str(value)] if name == "lambda_" else flags_of(name, value)
    data = data_of(case, calibrations)
    assert main([*words, *(["--calibration", data["calibration"]] if data else [])]) == 0
    assert facts_of(MergePlan.load(out)) == facts_of(expected)


class Recording(Backend):
    """A backend that keeps the plan of a merge instead of starting it."""

    def start_merge(self, plan: MergePlan, name: str, **how: Any) -> Started:
        self.started = plan, name, how  # type: ignore[attr-defined]
        return Started("id", "key")


@every_case
def test_a_value_over_http_is_the_plan_of_the_run(
    case: Case,
    expected: MergePlan,
    calibrations: Mapping[str, str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "require_common_base", lambda plan, *, force: None)
    backend = Recording()
    values = {**case.needs, case.name: as_json(case.value)}
    options = {name: value for name, value in values.items() if name in OPTIONS}
    parameters = {name: value for name, value in values.items() if name not in OPTIONS}
    own = {"lambda_": parameters.pop("lambda_")} if "lambda_" in parameters else {}
    asked = {"method": case.method, "parameters": parameters, "options": options, **own}
    endpoints(backend)["merge_start"](
        PAIR, "out", **asked, **data_of(case, calibrations), device="cpu", force=True
    )
    plan, name, how = backend.started  # type: ignore[attr-defined]
    assert facts_of(plan) == facts_of(expected)
    assert (name, how["device"], how["force"]) == ("out", "cpu", True)


SET_IN_FORM = [
    c for c in CASES if c.method != "ip_merging" or c.name not in method_choice.SET_IN_EXPLORE
]


@pytest.mark.parametrize("case", SET_IN_FORM, ids=str)
def test_a_value_in_a_field_of_the_merge_tab_gives_the_same_plan(
    case: Case, expected: MergePlan, calibrations: Mapping[str, str], home: Path
) -> None:
    chosen = method_choice.EXPLORED if case.method == method_choice.EXPLORED_METHOD else case.method
    folder = data_of(case, calibrations).get("calibration", "")
    how = method_choice.MethodChoice(chosen, calibration=folder)
    shown = {parameter.name: parameter for parameter in method_choice.parameters_of(chosen)}
    for name, value in {**case.needs, case.name: case.value}.items():
        if name in OPTIONS:
            text = " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)
            how = form.with_option(name, how, text)
            continue
        inherits = chosen == method_choice.EXPLORED and name in METHODS[case.method].from_analysis
        make = form._inherited_field if inherits else form._field
        field = make(shown[name], {name: value})  # the field shows what it has been set to
        assert field.value == (str(value) if isinstance(field, gr.Textbox) else value)
        how = form.with_value(name, chosen, how, field.value)
    assert facts_of(method_choice.chosen_plan(PAIR, PlanChoice(), how)) == facts_of(expected)


@pytest.mark.parametrize("name", sorted(method_choice.SET_IN_EXPLORE))
def test_what_explore_sets_arrives(name: str, home: Path) -> None:
    choices = {
        "lambda_": PlanChoice(lambda_=1.2345678901),
        "gamma_norm": PlanChoice(variant="max"),
        "ablation": PlanChoice(variant="select_only"),
        "energy": PlanChoice(variant="complement_45"),
        "math_energy": PlanChoice(variant="truncated_45"),
        "budget": PlanChoice(budget=0.0123456789),
    }
    plan = method_choice.chosen_plan(PAIR, choices[name], method_choice.MethodChoice())
    (parameter,) = [p for p in METHODS["ip_merging"].parameters if p.name == name]
    assert plan.parameters[name] != parameter.default
    assert settings_of(plan)[name.rstrip("_")] == str(plan.parameters[name])


@pytest.mark.parametrize(
    "choice",
    [
        PlanChoice(similarity_threshold=0.3123456789),
        PlanChoice(similarity="max"),
        PlanChoice(overrides={MATRIX: "keep"}),
    ],
)
def test_the_selection_of_explore_arrives(choice: PlanChoice, home: Path) -> None:
    facts = facts_of(method_choice.chosen_plan(PAIR, choice, method_choice.MethodChoice()))
    for name, value in choice._asdict().items():
        if name not in ("lambda_", "variant", "budget"):  # parameters of the method, see above
            assert facts[name] == value


# --- from the run to the manifest --------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [
        {"method": "ip_merging", "lambda_": 1.2345678901, "overrides": {MATRIX: "keep"}},
        {"method": "ties", "density": 0.123456789, "include": "mlp", "norms": "merge"},
        {"method": "dare_linear", "seed": 2**60 + 1, "layer_gains": (0.25, 1.0)},
        {"method": "nan"},
        {"method": "task_arithmetic", "norms": "merge"},
    ],
    ids=lambda choice: choice["method"],
)
def test_the_manifest_contains_the_facts_of_the_plan(
    choice: dict[str, Any], trio: Trio, tmp_path: Path
) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    analysis = ipm.analyse(pair, temperature=8.0, rank=4, directions="all")
    plan = ipm.make_plan(analysis, **choice)
    manifest = ipm.merge(plan, tmp_path / "out", device="cpu")
    facts = json.loads(json.dumps(facts_of(plan)))
    written = {**manifest["plan"], "statistic": facts["statistic"]}
    assert written == facts
    assert manifest["plan"]["analysed"] == {
        "rank": 4, "temperature": 8.0, "quick": False, "directions": "all",
    }  # fmt: skip
    assert set(manifest["plan"]["analysed"]) == set(Options._fields)
    assert manifest["device"] == "cpu"
    assert manifest["check"]["forced"] is False
    assert [attempt["device"] for attempt in manifest["attempts"]] == ["cpu"]
    card = (tmp_path / "out" / "README.md").read_text()
    for name, text in settings_of(plan).items():
        assert f"| {name} |" in card
        assert text.replace("|", "\\|") in card
    merged = card.split("byte-identical")[0]
    assert ("7 norms" in merged) == (choice.get("norms") == "merge" and "include" not in choice)


def test_the_manifest_contains_the_calibration(own_trio: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base)
    gram = tmp_path / "gram"
    gram.mkdir()
    _save_identity_grams(pair, gram)
    plan = ipm.make_plan(pair, "regmean", calibration=gram)
    manifest = ipm.merge(plan, tmp_path / "out")
    found = manifest["calibration"]
    assert (found["folder"], found["digest"]) == (str(gram), Measurements.open(gram).digest)
    assert [model["samples"] for model in found["models"]] == [7, 7]
    assert set(found["settings"]) == {field.name for field in fields(CalibrationSettings)}
    assert manifest["plan"]["calibration"]["digest"] == found["digest"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mllm: 7 samples; math: 7 samples" in card
    assert str(tmp_path) not in card


def _save_identity_grams(pair: ipm.ModelPair, folder: Path) -> None:
    from dataclasses import asdict

    import torch
    from safetensors.torch import save_file

    tensors = {m.name: torch.eye(m.shape[1]) for m in pair.matrices}
    save_file(tensors, folder / "grams.safetensors")
    places = {m.name: ("grams.safetensors", m.name) for m in pair.matrices}
    models = tuple(
        Measured(role, model.id, model.fingerprint, 7, 70, 1.0, places)
        for role, model in (("mllm", pair.mllm), ("math", pair.math[0]))
    )
    Measurements(folder, "gram", asdict(CalibrationSettings("gram")), models).save()


def test_a_resume_leaves_a_trace(trio: Trio, tmp_path: Path, monkeypatch: Any) -> None:
    plan = ipm.make_plan(ipm.open_pair(trio.mllm, trio.math, trio.base), "task_arithmetic")
    with monkeypatch.context() as before:
        before.setattr("ipmerge_core.merging.manifest.__version__", "0.0.older")
        steps = ipm.iter_merge(plan, tmp_path / "out")
        for _ in range(5):
            next(steps)
        steps.close()
    manifest = ipm.merge(plan, tmp_path / "out")
    first, last = manifest["attempts"]
    assert (first["engine"], first["resumed_tensors"]) == ("0.0.older", 0)
    assert (last["engine"], last["resumed_tensors"] > 0) == (ipm.__version__, True)
    assert replace(plan).digest == manifest["plan"]["digest"]
