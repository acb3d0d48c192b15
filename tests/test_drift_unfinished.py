"""Unfinished runs: who uses the folder, which checkpoints count, and where a resumed run ends."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_drift_training import DEMO, losses, moved, request_of, run, stopped_after, weights

from ipmerge_core.errors import CheckpointError, PairingError, RunError
from ipmerge_core.finetuning.checkpoints import COMPLETE, TrainingFolder, is_complete
from ipmerge_core.finetuning.scope import Scope
from ipmerge_core.finetuning.settings import PriorSettings
from ipmerge_core.finetuning.train import DriftRequest, DriftStep, check_drift, iter_drift
from ipmerge_core.models.checkpoint import Checkpoint

# The first parts of the run use the trainer's own deprecated names and sockets.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def stopped_while_writing(request: DriftRequest) -> list[DriftStep]:
    """Stop a run in the middle of its result, as a kill does."""
    found, running = [], iter_drift(request, device="cpu")
    for step in running:
        found.append(step)
        if step.action == "written":
            break
    running.close()
    return found


def edited(folder: Path, source: str, edit: dict[str, torch.Tensor]) -> Path:
    """Copy a demo model with other tensors."""
    shutil.copytree(DEMO / source, folder)
    save_file(weights(folder) | edit, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows_of(folder: Path, *answers: str) -> str:
    shutil.copy(DEMO / "examples" / "01-mul.png", folder / "a.png")
    rows = [{"image": "a.png", "question": "Q?", "answer": answer} for answer in answers]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "train.jsonl")


# --- the folder ---


def test_two_runs_do_not_train_in_one_folder_at_once(tmp_path: Path):
    request = request_of(tmp_path / "out", max_steps=1)
    first = iter_drift(request, device="cpu")
    next(first)
    for resume in (True, False):
        with pytest.raises(RunError, match="Another run is training in"):
            run(request, resume=resume)
    first.close()
    run(request)
    assert not (tmp_path / "out.training").exists()


def test_what_is_no_folder_of_a_run_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "a.training").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "b.training").symlink_to(tmp_path / "target")
    (tmp_path / "c.training").symlink_to(tmp_path / "nothing")
    for name in ("a", "b", "c"):
        with pytest.raises(RunError, match="exists and is no folder"):
            run(request_of(tmp_path / name))
    assert (tmp_path / "a.training").read_text() == "mine"
    assert not list((tmp_path / "target").iterdir())


def test_what_a_run_killed_at_its_start_leaves_is_used_again(tmp_path: Path):
    folder = TrainingFolder(tmp_path / "out.training")
    folder.path.mkdir()
    (folder.path / f".ipmerge-{'a' * 16}.new").write_text("half a record")
    (folder.path / "lock").touch()
    assert folder.open("work", {}, resume=True) is None
    folder.release()
    assert {path.name for path in folder.path.iterdir()} == {"run.json", "lock"}


@pytest.mark.parametrize("content", ["[1]", "{}", "x", '{"digest": 1, "settings": {}}'])
def test_a_damaged_record_is_an_error_with_a_remedy(content: str, tmp_path: Path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match="record of a training run.*Delete its folder"):
        TrainingFolder(tmp_path).open("work", {}, resume=True)


def test_a_run_is_not_resumed_with_other_rows_of_the_same_number(tmp_path: Path):
    data = rows_of(tmp_path, "1.", "2.")
    request = replace(request_of(tmp_path / "out"), data=data, limit=None)
    stopped_after(request, 1)
    rows_of(tmp_path, "1.", "3.")
    with pytest.raises(RunError, match="other models, data or settings"):
        run(request)


# --- checkpoints ---


def completed(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes(10))
    (checkpoint / COMPLETE).write_text(json.dumps({"files": {"model.safetensors": 10}}))
    return checkpoint


def test_the_newest_checkpoint_with_all_of_its_files_is_used(tmp_path: Path):
    folder = TrainingFolder(tmp_path)
    folder.open("work", {}, resume=True)
    folder.release()
    for step in (2, 10, 11, 12, 13):
        completed(tmp_path, step)
    (tmp_path / "checkpoint-11" / "model.safetensors").write_bytes(bytes(9))
    (tmp_path / "checkpoint-12" / "model.safetensors").unlink()
    (tmp_path / "checkpoint-13" / COMPLETE).write_text("{")
    (tmp_path / "checkpoint-x").mkdir()
    assert folder.open("work", {}, resume=True) == str(tmp_path / "checkpoint-10")
    folder.release()
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-10", "checkpoint-x"}


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_checkpoint_damaged_inside_its_size_is_a_clear_error(name: str, tmp_path: Path):
    request = request_of(tmp_path / "out")
    stopped_after(request, 2)
    (file,) = (tmp_path / "out.training").glob(f"checkpoint-2/{name}")
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert is_complete(file.parent)
    with pytest.raises(RunError, match="checkpoint-2' cannot be read.*--no-resume"):
        run(request)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: Any):
    from ipmerge_core.finetuning.guidance import GradientGuide

    act = GradientGuide.act

    def explode(guide: GradientGuide) -> None:
        act(guide)
        if guide.step == 1:
            guide.guided[0].parameter.grad.fill_(math.inf)
        guide.step += 1

    monkeypatch.setattr(GradientGuide, "step", 0, raising=False)
    monkeypatch.setattr(GradientGuide, "act", explode)
    with pytest.raises(RunError, match="NaN or infinite after step 2.*checkpoint before"):
        run(request_of(tmp_path / "out", save_every=1, max_grad_norm=0))
    (kept,) = (tmp_path / "out.training").glob("checkpoint-*")
    assert kept.name == "checkpoint-1"
    saved = load_file(kept / "model.safetensors").values()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved)


# --- where a resumed run ends ---


@pytest.mark.parametrize("training", [{"max_steps": 3}, {"max_steps": None, "epochs": 0.7}])
def test_a_run_stopped_while_it_writes_trains_no_further(training: Any, tmp_path: Path):
    """Also where it ends in the middle of an epoch."""
    request = request_of(tmp_path / "out", save_every=1, **training)
    before = stopped_while_writing(request)
    after = run(request)
    assert losses(before)
    assert not losses(after)
    plain = request_of(tmp_path / "plain", save_every=1, **training)
    run(plain)
    assert moved(tmp_path / "out").keys() == moved(tmp_path / "plain").keys()
    for name, change in moved(tmp_path / "plain").items():
        assert torch.equal(change, moved(tmp_path / "out")[name])


def test_an_interrupted_run_stops_early_at_the_same_step(tmp_path: Path):
    how: dict[str, Any] = {
        "max_steps": 12, "save_every": 1, "held_out": 0.25, "patience": 3, "learning_rate": 1e-12,
    }  # fmt: skip
    whole = losses(run(request_of(tmp_path / "whole", **how)))
    assert 3 <= len(whole) < 12
    request = request_of(tmp_path / "parts", **how)
    parts = losses(stopped_after(request, 2)) | losses(stopped_while_writing(request))
    assert parts.keys() == whole.keys()
    assert not losses(run(request))


def test_too_few_conversations_to_hold_one_out_are_an_error(tmp_path: Path):
    request = replace(request_of(tmp_path / "out", held_out=0.5, patience=1), limit=1)
    with pytest.raises(RunError, match="No conversation can be held out.*more conversations"):
        run(request)


# --- models and options that are rare ---


def test_a_parameter_of_zeros_can_be_normalized(tmp_path: Path):
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    mllm = edited(tmp_path / "mllm", "mllm", {name: torch.zeros_like(weights(DEMO / "mllm")[name])})
    request = request_of(tmp_path / "out", PriorSettings(normalize=True), max_steps=1)
    run(replace(request, mllm=str(mllm)))
    assert Checkpoint.open(tmp_path / "out")


def test_a_model_of_double_precision_is_trained(tmp_path: Path):
    wide = {name: tensor.double() for name, tensor in weights(DEMO / "mllm").items()}
    request = request_of(tmp_path / "out", max_steps=1)
    run(replace(request, mllm=str(edited(tmp_path / "mllm", "mllm", wide))))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float64}


def test_an_expert_that_differs_in_one_matrix_passes_the_check(tmp_path: Path):
    start = weights(DEMO / "mllm")
    prefix, kept = "language_model.", "model.layers.1.mlp.up_proj.weight"
    same = {n: start[prefix + n] for n in weights(DEMO / "math") if prefix + n in start}
    math_model = edited(tmp_path / "math", "math", {n: t for n, t in same.items() if n != kept})
    request = replace(request_of(tmp_path / "out"), math=str(math_model))
    assert 0 < check_drift(request, shown=0).relative_norm < 0.1
    equal = edited(tmp_path / "equal", "math", same)
    with pytest.raises(PairingError, match="no direction to follow"):
        check_drift(replace(request, math=str(equal)), shown=0)


def test_tokens_are_added_to_a_model_that_contains_the_output(tmp_path: Path):
    """Other folders of the model are not copied with it, least of all the run's own."""
    mllm = edited(tmp_path / "mllm", "mllm", {})
    (mllm / "notes").mkdir()
    request = request_of(mllm / "deep" / "out", tokens=("<think>",), max_steps=1)
    run(replace(request, mllm=str(mllm)))
    out = mllm / "deep" / "out"
    assert not [path for path in out.iterdir() if path.is_dir()]
    manifest = json.loads((out / "ipmerge.json").read_text())
    assert manifest["sources"]["mllm"]["id"] == str(mllm)
    assert "| MLLM | `mllm` |" in (out / "README.md").read_text()


def test_a_prior_on_rows_that_added_tokens_extend_is_refused_by_the_check(tmp_path: Path):
    prior = PriorSettings(scope=Scope(("full",)))
    request = request_of(tmp_path / "out", prior, tokens=("<think>",))
    for refused in (check_drift, run):
        with pytest.raises(PairingError, match="'<think>' add rows to .*Leave embed and head out"):
            refused(request)


def test_an_integration_that_is_not_installed_is_refused_before_the_run(tmp_path: Path):
    request = request_of(tmp_path / "out", report_to=("no-such-tracker",))
    for refused in (check_drift, run):
        with pytest.raises(RunError, match="'no-such-tracker' is unknown or not installed"):
            refused(request)
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_lost_during_training_is_named(tmp_path: Path, monkeypatch: Any):
    from ipmerge_core.finetuning import dataset

    monkeypatch.setattr(dataset, "MEMORY", 0)
    data = rows_of(tmp_path, "1.", "2.")
    running = iter_drift(replace(request_of(tmp_path / "out"), data=data), device="cpu")
    while next(running).action != "prior":
        pass
    (tmp_path / "a.png").unlink()
    with pytest.raises(RunError, match=r"a\.png'\)\. Restore its image"):
        list(running)


def test_other_work_that_ended_before_a_checkpoint_is_replaced(tmp_path: Path):
    """As after a mistake in the data: the corrected command starts without an option."""
    folder = TrainingFolder(tmp_path)
    for work, step in (("first", None), ("second", 3)):
        assert folder.open(work, {}, resume=True) is None
        folder.release()
        if step is not None:
            completed(tmp_path, step)
    with pytest.raises(RunError, match="unfinished run with other models, data or settings"):
        folder.open("first", {}, resume=True)
    assert folder.open("second", {}, resume=True) == str(tmp_path / "checkpoint-3")
    folder.release()


def test_checkpoints_that_a_kill_left_next_to_the_result_are_removed(
    tmp_path: Path, monkeypatch: Any
):
    from ipmerge_core.finetuning import checkpoints

    request = request_of(tmp_path / "out", max_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", lambda *_: None)
        run(request)
    assert (tmp_path / "out.training").is_dir()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        run(request)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    run(request_of(tmp_path / "kept", max_steps=1), keep_checkpoints=True)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        run(request_of(tmp_path / "kept", max_steps=1))
    assert (tmp_path / "kept.training").is_dir()
