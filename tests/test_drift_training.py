"""A run from folders to a folder: its result, its two ways to act, resume, and what stops it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import no_room
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ipmerge_core as ipm
from ipmerge_core.errors import CheckpointError, PairingError, PlanError, RunError
from ipmerge_core.finetuning.guidance import GradientGuide, Guided
from ipmerge_core.finetuning.matching import PriorEntry
from ipmerge_core.finetuning.rules import RULES, tilt
from ipmerge_core.finetuning.scope import Scope
from ipmerge_core.finetuning.settings import DriftSettings, PriorSettings, TrainingSettings
from ipmerge_core.finetuning.train import DriftRequest, DriftStep, check_drift, iter_drift
from ipmerge_core.finetuning.trainer import refuse_partitioning, resolve_precision
from ipmerge_core.inference.generation import answer
from ipmerge_core.inference.loading import load_model
from ipmerge_core.models.checkpoint import Checkpoint

DEMO = Path(__file__).parents[1] / "assets" / "demo"
QUICK = TrainingSettings(learning_rate=1e-4, max_steps=4, batch_size=2, save_every=2)
# The first parts of the run use the trainer's own deprecated names and sockets.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def request_of(out: Path, prior: PriorSettings | None = None, **training: Any) -> DriftRequest:
    settings = DriftSettings(prior or PriorSettings(), replace(QUICK, **training))
    return DriftRequest(str(DEMO / "mllm"), str(DEMO / "math"), "demo", str(out), settings, None, 8)


def run(request: DriftRequest, **how: Any) -> list[DriftStep]:
    return list(iter_drift(request, device="cpu", **how))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def moved(folder: Path) -> dict[str, Tensor]:
    start = weights(DEMO / "mllm")
    return {n: w - start[n] for n, w in weights(folder).items() if not torch.equal(w, start[n])}


def close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> bool:
    assert first.keys() == second.keys()
    return all(
        float((first[n] - second[n]).norm()) <= tolerance * float(first[n].norm()) for n in first
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DriftStep]]:
    out = tmp_path_factory.mktemp("plain") / "out"
    return out, run(request_of(out))


# --- the result ---


def test_the_result_is_a_folder_like_the_mllm_with_only_the_language_model_changed(plain):
    out, steps = plain
    before, after = Checkpoint.open(DEMO / "mllm"), Checkpoint.open(out)
    assert after.tensors == before.tensors
    assert after.config == before.config
    names = {path.name for path in (DEMO / "mllm").iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"ipmerge.json", "README.md"}
    changed = set(moved(out))
    assert changed
    assert all(name.startswith("language_model.") for name in changed)
    assert len(changed) >= 28
    assert not out.with_name("out.training").exists()
    assert [step.action for step in steps].count("trained") == 4


def test_the_result_chats_like_any_model(plain):
    out, _ = plain
    loaded = load_model(out)
    assert isinstance(answer(loaded, "What is it?", DEMO / "examples" / "01-mul.png"), str)


def test_the_result_can_be_analysed_as_the_mllm_of_the_pair(plain):
    """So that the map shows in which layers training moved the model."""
    pair = ipm.open_pair(plain[0], DEMO / "math", DEMO / "base")
    assert len(pair.matrices) == 28
    assert not [finding for finding in pair.check() if finding.level == "refusal"]


def test_the_manifest_has_the_settings_the_curves_and_the_number_of_parameters(plain):
    out, _ = plain
    manifest = json.loads((out / "ipmerge.json").read_text())
    assert manifest["format"] == "ipmerge-finetuning"
    assert manifest["prior"]["parameters"] == 28
    assert manifest["steps"] == 4
    assert [entry["step"] for entry in manifest["history"] if "loss" in entry] == [1, 2, 3, 4]
    assert {"cosine", "to_start", "to_expert", "moved_cosine"} <= manifest["history"][-1].keys()
    assert manifest["settings"] == request_of(out).settings.as_json()
    assert "28" in (out / "README.md").read_text()


def test_the_curves_show_the_pull_toward_the_expert(plain, tmp_path):
    _, steps = plain
    guided = [step for step in steps if step.action == "trained"]
    control = run(request_of(tmp_path / "sft", PriorSettings(rule="none")))
    control = [step for step in control if step.action == "trained"]
    assert guided[0].to_start == 0.0
    assert guided[-1].to_expert < control[-1].to_expert
    assert guided[-1].moved_cosine > control[-1].moved_cosine
    assert all(-1 <= step.cosine <= 1 for step in guided + control)


def test_strength_zero_is_plain_fine_tuning(tmp_path):
    none, zero = tmp_path / "none", tmp_path / "zero"
    run(request_of(none, PriorSettings(rule="none")))
    run(request_of(zero, PriorSettings(strength=0.0)))
    assert close(moved(none), moved(zero), 0.0)


# --- how the rule acts ---


class FakePrior:
    """The priors of two parameters, without models."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.norms = tensors, [float(t.norm()) for t in tensors]

    def get(self, number: int) -> Tensor:
        return self.tensors[number]


def guide_of(rule: Any, rows: range | None = None) -> tuple[nn.Linear, GradientGuide, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False).double()
    shape = (4, 5) if rows is None else (len(rows), 5)
    d = torch.randn(shape, dtype=torch.float64)
    entry = PriorEntry("w", 0, shape, "w", "w", "w")
    guided = Guided(0, entry, "weight", model.weight, rows, 0.7)
    return model, GradientGuide([guided], FakePrior([d]), rule), d  # type: ignore[arg-type]


def gradients(model: nn.Linear, batches: list[Tensor]) -> list[Tensor]:
    return [torch.autograd.grad(model(b).square().sum(), model.weight)[0] for b in batches]


BATCHES = [torch.randn(3, 5, generator=torch.Generator().manual_seed(n)).double() for n in (1, 2)]


@pytest.mark.parametrize("rule", RULES)
def test_the_accumulated_gradient_is_tilted_once(rule):
    model, guide, d = guide_of(rule)
    own = gradients(model, BATCHES)
    for batch in BATCHES:
        model(batch).square().sum().backward()
    guide.act()
    torch.testing.assert_close(model.weight.grad, tilt(own[0] + own[1], d, rule, 0.7))


@pytest.mark.parametrize("rule", RULES)
def test_per_micro_batch_every_gradient_is_tilted_before_it_is_added(rule):
    model, guide, d = guide_of(rule)
    own = gradients(model, BATCHES)
    guide.act_on_each_backward()
    for batch in BATCHES:
        model(batch).square().sum().backward()
    expected = sum(tilt(gradient, d, rule, 0.7) for gradient in own)
    torch.testing.assert_close(model.weight.grad, expected)
    guide.release()
    model.weight.grad = None
    model(BATCHES[0]).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, own[0])


@pytest.mark.parametrize("act", ["once", "each"])
def test_only_the_rows_of_a_fused_parameter_are_tilted(act):
    model, guide, d = guide_of("adaptive", range(1, 3))
    (own,) = gradients(model, BATCHES[:1])
    if act == "each":
        guide.act_on_each_backward()
    model(BATCHES[0]).square().sum().backward()
    if act == "once":
        guide.act()
    expected = own.clone()
    expected[1:3] = tilt(own[1:3], d, "adaptive", 0.7)
    torch.testing.assert_close(model.weight.grad, expected)


def test_without_a_rule_the_alignment_is_measured_and_nothing_changes():
    model, guide, d = guide_of(None)
    (own,) = gradients(model, BATCHES[:1])
    model(BATCHES[0]).square().sum().backward()
    guide.act()
    torch.testing.assert_close(model.weight.grad, own)
    expected = float((own * d).sum() / own.norm() / d.norm())
    assert guide.take_cosine() == pytest.approx(expected)
    assert math.isnan(guide.take_cosine())


def test_accumulation_equals_a_larger_batch_and_micro_batches_do_not(tmp_path):
    """The adaptive rule is not linear, so that acting on each micro-batch gives another result."""
    micro = PriorSettings(per_micro_batch=True)
    runs = {
        "whole": request_of(tmp_path / "whole", batch_size=4, max_steps=2),
        "parts": request_of(tmp_path / "parts", batch_size=1, accumulation=4, max_steps=2),
        "micro": request_of(tmp_path / "micro", micro, batch_size=1, accumulation=4, max_steps=2),
    }
    for each in runs.values():
        run(each)
    found = {name: moved(tmp_path / name) for name in runs}
    assert close(found["whole"], found["parts"], 2e-3)
    assert not close(found["whole"], found["micro"], 5e-2)


@pytest.mark.parametrize(
    ("prior", "training"),
    [
        (PriorSettings(placement="files"), {}),
        (PriorSettings(placement="device"), {}),
        (PriorSettings(), {"gradient_checkpointing": True}),
        (PriorSettings(), {"log_every": 3}),
    ],
)
def test_where_the_prior_is_and_what_is_recomputed_do_not_change_the_result(
    prior, training, plain, tmp_path
):
    out = tmp_path / "out"
    run(request_of(out, prior, **training))
    assert close(moved(plain[0]), moved(out), 1e-5)


def test_module_strengths_and_layer_ranges_act_on_what_they_name(plain, tmp_path):
    off = PriorSettings(scope=Scope(strengths=((".", 0.0),)))
    run(request_of(tmp_path / "off", off))
    run(request_of(tmp_path / "sft", PriorSettings(rule="none")))
    assert close(moved(tmp_path / "off"), moved(tmp_path / "sft"), 0.0)
    assert not close(moved(plain[0]), moved(tmp_path / "off"), 0.1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16"])
def test_low_precision_trains_in_the_same_direction(precision, plain, tmp_path):
    out = tmp_path / "out"
    steps = run(request_of(out, precision=precision))
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    ours, theirs = moved(out)[name].flatten(), moved(plain[0])[name].flatten()
    least = (
        0.9 if precision == "bf16-mixed" else 0.3
    )  # of bf16 weights, most steps are rounded away
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, 0)) > least
    assert [s for s in steps if s.action == "trained"][-1].cosine is not None


# --- stop and resume ---


def stopped_after(request: DriftRequest, steps: int) -> list[DriftStep]:
    """Close a run after some training steps, as Cancel and Ctrl-C do."""
    found, running = [], iter_drift(request, device="cpu")
    for step in running:
        found.append(step)
        if [each.action for each in found].count("trained") == steps:
            break
    running.close()
    return found


def losses(steps: list[DriftStep]) -> dict[int, float]:
    return {step.done: step.loss for step in steps if step.action == "trained"}


def test_a_cancelled_run_resumes_with_the_same_curve_and_result(plain, tmp_path):
    out = tmp_path / "out"
    before = stopped_after(request_of(out), 2)
    assert not out.exists()
    assert list(out.with_name("out.training").glob("checkpoint-*/ipmerge-complete.json"))
    after = run(request_of(out))
    curve = losses(before) | losses(after)
    assert max(losses(before)) == 2
    assert min(losses(after)) == 3
    assert curve == pytest.approx(losses(plain[1]), rel=1e-5)
    assert close(moved(plain[0]), moved(out), 1e-5)


def test_a_run_that_was_stopped_after_its_last_step_only_writes(plain, tmp_path):
    out = tmp_path / "out"
    stopped_after(request_of(out), 4)
    after = run(request_of(out))
    assert not losses(after)
    assert close(moved(plain[0]), moved(out), 1e-6)


def test_an_incomplete_checkpoint_of_a_killed_process_is_not_used(plain, tmp_path):
    out = tmp_path / "out"
    stopped_after(request_of(out), 2)
    folder = out.with_name("out.training")
    newest = max(folder.glob("checkpoint-*"))
    broken = shutil.copytree(newest, folder / "checkpoint-999")
    (broken / "ipmerge-complete.json").unlink()
    (broken / "model.safetensors").write_bytes(b"half")
    run(request_of(out))
    assert close(moved(plain[0]), moved(out), 1e-5)


def test_only_the_same_work_is_resumed_unless_it_starts_over(tmp_path):
    out = tmp_path / "out"
    stopped_after(request_of(out), 1)
    other = request_of(out, PriorSettings(rule="absolute"))
    with pytest.raises(RunError, match="unfinished run with other models, data or settings"):
        run(other)
    assert min(losses(run(other, resume=False))) == 1


def test_a_full_disk_is_an_error_and_the_run_continues_from_the_last_checkpoint(plain, tmp_path):
    out = tmp_path / "out"
    size = (DEMO / "mllm" / "model.safetensors").stat().st_size
    stopped_after(request_of(out), 2)
    with no_room(size // 2), pytest.raises(RunError, match=r"(?i)complete checkpoints are kept"):
        run(request_of(out))
    run(request_of(out))
    assert close(moved(plain[0]), moved(out), 1e-5)


def test_a_full_disk_for_the_optimizer_alone_is_an_error_too(tmp_path):
    out = tmp_path / "out"
    size = (DEMO / "mllm" / "model.safetensors").stat().st_size
    with no_room(size + 1000), pytest.raises(RunError, match="complete checkpoints are kept"):
        run(request_of(out))
    assert not list(out.with_name("out.training").glob("checkpoint-*/ipmerge-complete.json"))


def test_training_stops_early_when_the_held_out_loss_does_not_fall(tmp_path):
    steps = run(
        request_of(
            tmp_path / "out", max_steps=40, save_every=1, held_out=0.25, patience=2,
            learning_rate=1e-12,
        )
    )  # fmt: skip
    evaluated = [step for step in steps if step.action == "evaluated"]
    assert 2 <= len(evaluated) < 40
    assert all(step.eval_loss is not None for step in evaluated)


def test_the_best_weights_are_the_result_where_a_loss_is_held_out(tmp_path):
    out = tmp_path / "out"
    run(request_of(out, held_out=0.25, save_every=1))
    manifest = json.loads((out / "ipmerge.json").read_text())
    losses_of = {e["step"]: e["eval_loss"] for e in manifest["history"] if "eval_loss" in e}
    assert manifest["best_step"] == min(losses_of, key=losses_of.__getitem__)


# --- added tokens ---


def test_tokens_are_added_with_rows_for_them_and_learned(tmp_path):
    PIL = pytest.importorskip("PIL.Image")
    PIL.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Q?", "answer": "<think>6*4</think>24."}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    tokens = ("<think>", "</think>")
    request = replace(
        request_of(tmp_path / "out", tokens=tokens), data=str(tmp_path / "train.jsonl")
    )
    shown = check_drift(request)
    assert "<think>6*4</think>24.</s>" in shown.examples[0]
    run(request)
    out = Checkpoint.open(tmp_path / "out")
    old, new = (
        each.spec("language_model.model.embed_tokens.weight").shape
        for each in (Checkpoint.open(DEMO / "mllm"), out)
    )
    assert new[0] == old[0] + 2
    assert out.config["text_config"]["vocab_size"] == new[0]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(list(tokens)) == [old[0], old[0] + 1]
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert isinstance(answer(load_model(tmp_path / "out"), "Q?", tmp_path / "a.png"), str)


# --- bad input ---


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    broken = shutil.copytree(DEMO / "mllm", tmp_path / "mllm")
    tensors = weights(broken)
    tensors["language_model.model.norm.weight"] *= 1e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    request = replace(request_of(tmp_path / "out"), mllm=str(broken))
    with pytest.raises(RunError, match=r"loss is (nan|inf) in step 1.*lower learning rate"):
        run(request)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_and_a_foreign_training_folder_are_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        run(request_of(out))
    (tmp_path / "new.training").mkdir()
    (tmp_path / "new.training" / "mine").touch()
    with pytest.raises(RunError, match="was not created by a training run"):
        run(request_of(tmp_path / "new"))
    assert (tmp_path / "new.training" / "mine").exists()


def test_an_adapter_and_a_hub_id_are_no_models_to_train(tmp_path):
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(DEMO / "mllm"), "r": 1}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    request = replace(request_of(tmp_path / "out"), mllm=str(tmp_path / "adapter"))
    with pytest.raises((PairingError, CheckpointError)):
        run(request)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    from ipmerge_core.finetuning import estimates

    class Little:
        available = 1000

    monkeypatch.setattr(estimates.psutil, "virtual_memory", lambda: Little)
    with pytest.raises(RunError, match=r"without activations.*--force"):
        run(request_of(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variable", "name"),
    [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")],
)
def test_launchers_that_partition_gradients_are_refused_by_name(variable, name):
    with pytest.raises(RunError, match=f"does not support {name}"):
        refuse_partitioning({variable: "true"})
    refuse_partitioning({variable: "false"})


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(RunError, match="fp16-mixed needs a GPU"):
        resolve_precision("fp16-mixed", "cpu")
    assert resolve_precision("auto", "cuda:0") == "bf16-mixed"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingSettings(learning_rate=0), "learning rate is 0"),
        (lambda: TrainingSettings(learning_rate=float("nan")), "learning rate is nan"),
        (lambda: TrainingSettings(batch_size=0), "batch size is 0"),
        (lambda: TrainingSettings(patience=2), "held-out share"),
        (lambda: TrainingSettings(tokens=(" ",)), "Cannot add the token"),
        (lambda: TrainingSettings(precision="int8"), "Unknown precision 'int8'"),
        (lambda: PriorSettings(rule="adaptive_cosine"), "Unknown rule 'adaptive_cosine'"),
        (lambda: PriorSettings(strength=float("inf")), "strength is inf"),
        (lambda: PriorSettings(placement="gpu"), "Unknown placement"),
    ],
)
def test_invalid_settings_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(PlanError, match=message):
        make()


def test_the_digest_of_settings_ignores_what_changes_no_result():
    settings = DriftSettings(
        PriorSettings(scope=Scope(("attn", "re:x"), 1, 3, False, (("q", 0.5),)), strength=2.0),
        TrainingSettings(tokens=("<think>",), report_to=("trackio",)),
    )
    sources = {"mllm": "a"}
    moved_prior = replace(settings, prior=replace(settings.prior, placement="files"))
    assert moved_prior.digest(sources) == settings.digest(sources)
    assert settings.digest({"mllm": "b"}) != settings.digest(sources)
    other = replace(settings, prior=replace(settings.prior, strength=1.0))
    assert other.digest(sources) != settings.digest(sources)


def test_normalizing_is_warned_of_where_it_collapses_and_where_it_does_nothing():
    (harmful,) = PriorSettings(rule="absolute", normalize=True).warnings
    assert "collapses" in harmful
    (idle,) = PriorSettings(normalize=True).warnings
    assert "no effect" in idle
