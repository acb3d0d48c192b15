"""The Fine-tune tab without a browser: its form, its check, its run, its curves, its results."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from html import unescape
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from ipmerge_core.errors import CheckpointError, PlanError, RunError
from ipmerge_core.finetuning.curves import CurvePoint, add_point, read_points
from ipmerge_core.finetuning.recording import iter_recorded_drift
from ipmerge_core.finetuning.scope import Scope
from ipmerge_core.finetuning.settings import (
    DriftSettings,
    PriorSettings,
    TrainingSettings,
    training_folder,
)
from ipmerge_core.runtime.jobs import JobStatus, JobStore, Started, write_status
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.column_choice import Held, choices_of
from ipmerge_core.ui.chat.columns import name_asked
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.evaluate.start import Asked as Evaluated
from ipmerge_core.ui.evaluate.start import _folders
from ipmerge_core.ui.evaluate.tab import listed_models
from ipmerge_core.ui.finetune.curves import MOST_POINTS, as_csv, curves_html
from ipmerge_core.ui.finetune.form import Asked, Form, lay_out_form
from ipmerge_core.ui.finetune.start import check, found_html, models_of, named, start
from ipmerge_core.ui.finetune.tab import (
    Models,
    analysis_request,
    checked_form,
    drawn_curves,
    has_model,
    proposed,
)
from ipmerge_core.ui.finetuned_models import find_finetuned, pair_of_finetuned
from ipmerge_core.ui.format import progress_html, progress_of, stage_of
from ipmerge_core.ui.run_list.deletion import delete_run
from ipmerge_core.ui.run_list.rows import describe_runs
from ipmerge_core.ui.runs import RunState, curves_folder

PAIR = "pack"
OWNER = "a" * 64
DEMO = Path(__file__).parents[1] / "assets" / "demo"
QUICK = TrainingSettings(learning_rate=1e-4, max_steps=2, batch_size=2, held_out=0.25, save_every=1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path))
    return Backend(JobStore(tmp_path / "runs"), hosted=False, device="cpu")


@pytest.fixture(scope="module")
def form() -> Form:
    with gr.Blocks():
        return lay_out_form()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A model that was cancelled after its first step, then resumed: folder, curves, steps."""
    folder = tmp_path_factory.mktemp("trained")
    out, curves, found = folder / "tuned", folder / "curves.jsonl", list[dict[str, Any]]()
    arguments = {
        "mllm": str(DEMO / "mllm"),
        "math": str(DEMO / "math"),
        "data": "demo",
        "out": str(out),
        "curves": str(curves),
        "limit": 8,
        "device": "cpu",
        "settings": DriftSettings(training=QUICK).as_json(),
    }
    steps = iter_recorded_drift(**arguments)
    for step in steps:
        found.append(step)
        if step["action"] == "trained":
            break
    steps.close()
    assert training_folder(out).is_dir()
    assert not out.exists()
    return out, curves, [*found, *iter_recorded_drift(**arguments)]


def values_of(form: Form, **changed: Any) -> list[Any]:
    usual = {"mllm": str(DEMO / "mllm"), "math": str(DEMO / "math"), "limit": 4}
    given = {name: field.value for name, field in form.inputs.items()} | usual | changed
    return [given[name] for name in form.inputs]


def asked_for(form: Form, **changed: Any) -> Asked:
    return form.read(values_of(form, **changed))


def add_run(backend: Backend, out: Path, curves: Path | str = "", state: str = "finished") -> Any:
    """Add a run of the visitor OWNER to the list, as the app's start and the run leave it."""

    def iter_nothing() -> Iterator[Any]:
        yield from ()

    backend.store._spawn = lambda job: None  # type: ignore[method-assign]
    arguments = {"out": str(out), "curves": str(curves), "device": "cpu", "mllm": str(DEMO)}
    about = {"kind": "drift", "pack": PAIR, "pair": "demo", "method": "DRIFT adaptive"}
    started = backend.store.start(
        iter_nothing, arguments, title="Fine-tune", owner=OWNER, about=about
    )
    now = time.time()
    status = JobStatus(started.id, "Fine-tune", state, {}, arguments, now, now)  # type: ignore[arg-type]
    folder = backend.store.folder / started.id
    (folder / "lock").touch()
    write_status(folder, status)
    return RunState(backend.store.status(started.id), started.key)


# --- the form ---


def test_an_untouched_form_describes_the_defaults_of_the_command(form: Form) -> None:
    asked = asked_for(form)
    assert asked.settings == DriftSettings()
    assert (asked.data, asked.math_base, asked.device, asked.force) == ("demo", None, "auto", False)
    empty = [field.value for field in form.inputs.values() if isinstance(field, gr.Number)]
    assert None not in empty  # Gradio shows it as 0
    assert asked_for(form, limit=0).limit is None


CHANGED = {
    "mllm": "x",
    "math": "y",
    "data": "z.jsonl",
    "limit": 3,
    "name": "n",
    "math_base": "b",
    "force": True,
    "rule": "none",
    "strength": 0.5,
    "modules": ["mlp", "re:x"],
    "first_layer": 1,
    "last_layer": 2,
    "strengths": "mlp=0.5 q=2",
    "placement": "files",
    "biases": False,
    "per_micro_batch": True,
    "normalize": True,
    "epochs": 1.5,
    "max_steps": 7,
    "learning_rate": 1e-3,
    "batch_size": 2,
    "accumulation": 3,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "seed": 5,
    "longest": 99,
    "most_pixels": 1000,
    "held_out": 0.1,
    "save_every": 4,
    "log_every": 2,
    "precision": "bf16",
    "trained": "all",
    "schedule": "linear",
    "tokens": "<a> <b>",
    "device": "cpu",
    "gradient_checkpointing": True,
    "patience": 2,
}


def test_every_field_arrives_in_what_is_started(form: Form) -> None:
    assert set(CHANGED) == set(form.inputs)
    asked, usual = asked_for(form, **CHANGED), asked_for(form)
    for name in ("mllm", "math", "data", "limit", "name", "math_base", "device", "force"):
        assert getattr(asked, name) == CHANGED[name]
    scope = Scope(("mlp", "re:x"), 1, 2, False, (("mlp", 0.5), ("q", 2.0)))
    assert asked.settings.prior == PriorSettings("none", 0.5, scope, True, True, "files")
    before, after = asdict(usual.settings.training), asdict(asked.settings.training)
    assert {name for name in after if after[name] == before[name]} == {"report_to"}
    given = CHANGED | {"tokens": ("<a>", "<b>"), "report_to": ()}
    assert after == {name: given[name] for name in after}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"limit": -2}, "limit of -2 rows"),
        ({"last_layer": -2}, "last layer is -2"),
        ({"mllm": " "}, "Missing: vision-language model"),
        ({"math": "", "data": ""}, "Missing: expert, data"),
        ({"modules": []}, "No modules are selected"),
        ({"modules": ["lora"]}, "Unknown modules 'lora'"),
        ({"strengths": "mlp"}, "expected PATTERN=STRENGTH"),
        ({"learning_rate": -1.0}, "learning rate is -1"),
        ({"patience": 2}, "held-out share"),
        ({"tokens": "x" * 101}, "Cannot add the token"),
    ],
)
def test_an_invalid_form_is_refused_in_one_sentence(
    form: Form, backend: Backend, changed: dict[str, Any], message: str
) -> None:
    ready, html = checked_form(backend, form, values_of(form, **changed))
    assert ready is None
    assert message in unescape(html)


def test_the_models_of_the_pair_are_proposed_and_typed_ones_stay(
    form: Form, backend: Backend
) -> None:
    found = models_of(backend, PAIR)
    assert Path(found.mllm).resolve() == DEMO / "mllm"
    assert Path(found.math).resolve() == DEMO / "math"
    mllm, math = form.inputs["mllm"], form.inputs["math"]
    fresh = proposed(backend, form, PAIR, Models(), Models())
    assert fresh == {mllm: found.mllm, math: found.math}
    kept = proposed(backend, form, PAIR, Models("/mine", "old"), Models("other", "old"))
    assert kept == {mllm: gr.skip(), math: found.math}
    assert models_of(backend, "no such pair") == Models()


# --- the settings of a job ---


def test_settings_survive_json_and_damaged_ones_are_refused() -> None:
    scope = Scope(("attn", "re:x"), 1, 3, False, (("q", 0.5),))
    settings = DriftSettings(
        PriorSettings(scope=scope, strength=2.0),
        TrainingSettings(tokens=("<think>",), report_to=("trackio",)),
    )
    assert DriftSettings.from_json(json.loads(json.dumps(settings.as_json()))) == settings
    for content in ({"prior": {}}, {}, {"prior": [], "training": 1}):
        with pytest.raises(PlanError, match="damaged"):
            DriftSettings.from_json(content)


# --- check and start ---


def test_a_check_shows_names_memory_and_masked_examples(form: Form, backend: Backend) -> None:
    asked = named(backend, asked_for(form, rule="none", strength=1.0))
    assert asked.name == "mllm-none"
    found = check(backend, asked)
    html = found_html(found, "out")
    assert f"acts on {found.parameters} parameters" in html
    assert "GB are free" in html
    assert html.count("<pre>") == html.count("<mark>") == html.count("</mark>") == 2
    assert "\N{LEFT WHITE SQUARE BRACKET}" in found.examples[0]


def test_text_of_the_data_is_escaped(form: Form, backend: Backend) -> None:
    found = check(backend, named(backend, asked_for(form)))
    html = found_html(found._replace(examples=["<img src=x onerror=alert(1)>"]), "<b>")
    assert "<img" not in html
    assert "<b>" not in html


def test_a_start_passes_everything_to_the_run(
    form: Form, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def record(target: Any, arguments: Any, **how: Any) -> Started:
        seen.update(target=target, arguments=arguments, **how)
        return Started("id", "key")

    monkeypatch.setattr(backend.store, "start", record)
    asked = asked_for(form, **{**CHANGED, "mllm": models_of(backend, PAIR).mllm, "name": "tuned"})
    start(backend, asked, owner=OWNER)
    given = seen["arguments"]
    assert seen["target"] is iter_recorded_drift
    assert DriftSettings.from_json(given["settings"]) == asked.settings
    assert Path(given["out"]) == backend.models_folder / "tuned"
    assert Path(given["curves"]).parent == curves_folder()
    assert (given["limit"], given["math_base"], given["force"]) == (3, "b", True)
    assert given["device"] == "cpu"
    assert seen["about"]["kind"] == "drift"
    json.dumps(given)


def test_a_start_is_refused_on_a_space_and_for_a_folder_with_files(
    form: Form, backend: Backend, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError):
        start(backend, asked_for(form, name=str(tmp_path / "full")))
    backend.hosted = True
    for act in (start, check):
        with pytest.raises(RunError, match="ipmerge drift --mllm"):
            act(backend, asked_for(form, name="x"))


def test_a_proposed_name_avoids_an_unfinished_training(form: Form, backend: Backend) -> None:
    training_folder(backend.models_folder / "mllm-adaptive").mkdir(parents=True)
    assert named(backend, asked_for(form)).name == "mllm-adaptive-2"


# --- curves ---


def test_a_resumed_run_replaces_the_points_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "curves"
    assert read_points(path) == []
    for step in (1, 2, 3, 4):
        add_point(path, CurvePoint(step, 6, loss=float(step)))
    add_point(path, CurvePoint(4, 6, eval_loss=9.0))
    with path.open("ab") as file:
        file.write(b'\n{"step": 5, "tot')  # killed
    add_point(path, CurvePoint(3, 6, loss=30.0))
    found = read_points(path)
    assert [point.step for point in found] == [1, 2, 3]
    assert found[-1] == CurvePoint(3, 6, loss=30.0)


@pytest.mark.parametrize(
    "line",
    ["", "x", "[]", "{}", '{"step": -1, "total": 2}', '{"step": true, "total": 2}',
     '{"step": 1, "total": 1e99}', '{"step": 1, "total": 2, "loss": "0"' + " " * 5000 + "}"],
)  # fmt: skip
def test_lines_that_are_no_points_are_skipped(tmp_path: Path, line: str) -> None:
    (tmp_path / "curves").write_text(line)
    assert read_points(tmp_path / "curves") == []


def test_curves_are_drawn_with_every_value_as_a_tooltip_and_as_csv() -> None:
    points = [CurvePoint(1, 8, loss=0.5, cosine=-0.25), CurvePoint(2, 8, loss=0.4, eval_loss=0.6)]
    html = curves_html(points)
    assert html.count("<svg") == 2  # loss, cosine; nothing was measured for the others
    assert "step 2, held-out 0.6" in html
    assert "download=" in html
    assert "download=" not in curves_html(points, growing=True)
    assert as_csv(points).splitlines()[2] == "2,8,0.4,0.6,,,,,,"
    assert curves_html([]) == ""
    assert "nan" not in curves_html([CurvePoint(1, 1, loss=0.0)]).lower()


def test_long_curves_are_thinned_out_but_keep_their_ends() -> None:
    html = curves_html([CurvePoint(n, 5000, loss=1 / n) for n in range(1, 5001)])
    assert html.count("<circle") <= MOST_POINTS + 1
    assert "step 1, " in html
    assert "step 5000, " in html


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"action": "encoded", "done": 8, "total": 8}, "8 of 8 conversations encoded"),
        ({"action": "trained", "done": 3, "total": 12, "loss": 0.5}, "3 of 12 optimizer steps"),
        ({"action": "written", "done": 10**6, "total": 2 * 10**6, "what": "<w>"}, "1 MB of 2 MB"),
    ],
)
def test_each_phase_shows_its_own_progress(step: dict[str, Any], words: str) -> None:
    names = ("what", "loss", "eval_loss", "cosine", "to_start", "to_expert")
    whole = {**dict.fromkeys(names), "what": "", **step}
    status = JobStatus("id", "Fine-tune", "running", whole, started=1.0, updated=2.0)
    assert progress_of(status).words == [words if "MB" not in words else f"{words} written"]
    html = progress_html(status)
    assert "<w>" not in html
    if step["action"] == "encoded":
        assert stage_of(status) == ""
    if "loss" in step:
        assert "loss 0.5000" in html


# --- a real run and its result ---


def test_a_run_records_its_curves_across_a_cancel_and_a_resume(trained: Any) -> None:
    out, curves, steps = trained
    points = read_points(curves)
    assert [point.step for point in points] == [1, 2]
    assert all(point.total == 2 and point.loss is not None for point in points)
    assert points[-1].eval_loss is not None
    history = json.loads((out / "ipmerge.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses == [point.loss for point in points]
    phases = [{name for name in step if name.endswith("_total")} for step in steps]
    assert all(len(phase) == 1 for phase in phases)


def test_the_result_is_a_column_of_the_chat_and_a_subject_of_an_evaluation(
    backend: Backend, trained: Any
) -> None:
    out, curves, _ = trained
    run = add_run(backend, out, curves)
    assert has_model(run)
    assert "<svg" in drawn_curves(run)
    job, keys = run.status.id, {run.status.id: run.key}
    model = find_finetuned(backend, PAIR, job, keys)
    assert model.label == "tuned · DRIFT adaptive · 2 steps"
    assert pair_of_finetuned(backend, job, keys, PAIR) == PAIR
    held = Held(ChosenMerge(PAIR), {})
    assert model.value in [value for _, value in choices_of(backend, held, methods=False)]
    assert name_asked(held.chosen, model.value) == "Fine-tuned model"
    assert (model.label, model.value) in listed_models(backend, PAIR, keys)
    asked = Evaluated(merges=(model.value,))
    assert _folders(backend, PAIR, asked, keys) == {model.label: str(out)}
    request = analysis_request(backend, run)
    assert request.mllm == str(out)
    assert Path(request.base).resolve() == DEMO / "base"
    (row,) = describe_runs(backend, keys)["runs"]
    assert row["kind"] == "Fine-tuning"
    assert row["actions"] == ["show", "try", "delete"]


def test_without_a_model_nothing_is_offered(backend: Backend, tmp_path: Path) -> None:
    run = add_run(backend, tmp_path / "gone")
    assert not has_model(run)
    with pytest.raises(RunError, match="no model to analyse"):
        analysis_request(backend, run)
    with pytest.raises(RunError, match="no fine-tuned model"):
        find_finetuned(backend, PAIR, run.status.id, {})


def test_deleting_an_unfinished_run_deletes_its_checkpoints_and_curves(backend: Backend) -> None:
    out = backend.models_folder / "tuned"
    training_folder(out).mkdir(parents=True)
    curves_folder().mkdir(parents=True)
    curves = curves_folder() / "a.jsonl"
    add_point(curves, CurvePoint(1, 2, loss=1.0))
    run = add_run(backend, out, curves, state="cancelled")
    delete_run(backend, run.status.id, run.key)
    assert not training_folder(out).exists()
    assert not curves.exists()
