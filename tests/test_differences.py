"""Models tuned in part are told from their base, wherever they differ; equal ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TEXT_CONFIG, Weights, as_mllm, text_weights, write_model

import ipmerge_core as ipm
from ipmerge_core.models import differences
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.files import LocalFiles
from ipmerge_core.models.siblings import Finding

LAYERS = 9  # the check samples 0, 4 and 8
CONFIG = {**TEXT_CONFIG, "num_hidden_layers": LAYERS}
MLLM_CONFIG = {"model_type": "llava", "text_config": CONFIG}
ROLES = ("mllm", "math")


def deep_weights() -> Weights:
    """Nine layers, with biases and a mixture's router beside the usual matrices and norms."""
    weights = text_weights()
    for layer in range(LAYERS):
        for name, weight in text_weights(seed=layer + 1).items():
            if ".layers.0." in name:
                weights[name.replace(".layers.0.", f".layers.{layer}.")] = weight
        weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.full((16,), 0.5)
        weights[f"model.layers.{layer}.mlp.gate.weight"] = torch.full((4, 16), 0.5)
    return weights


BASE = deep_weights()


def tuned(where: Callable[[str], bool], scale: float = 0.004, base: Weights = BASE) -> Weights:
    """Change every tensor that `where` chooses by `scale`, relative to its own norm 0.04."""
    generator = torch.Generator().manual_seed(1)
    changed = {}
    for name, weight in base.items():
        noise = torch.randn(weight.shape, generator=generator)
        changed[name] = weight + scale * noise if where(name) else weight
    assert any(not torch.equal(changed[name], base[name]) for name in base)
    return changed


def matrices(name: str) -> bool:
    return "_proj.weight" in name


class Models(NamedTuple):
    """Folders, with a fully tuned model for the role that is not looked at."""

    folder: Path
    base: Path

    def check(self, role: str, weights: Weights, **options: object) -> list[Finding]:
        """Check a pair in which the model of `role` has these weights, stored as `options` say."""
        return self.pair(role, weights, **options).check()

    def pair(self, role: str, weights: Weights, **options: object) -> ipm.ModelPair:
        whole = tuned(matrices)
        mllm, math = (weights, whole) if role == "mllm" else (whole, weights)
        own = [options if role == at else {} for at in ROLES]
        return ipm.open_pair(
            write_model(self.folder / "mllm", as_mllm(mllm), MLLM_CONFIG, **own[0]),
            write_model(self.folder / "math", math, CONFIG, **own[1]),
            self.base,
        )


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path, write_model(tmp_path / "base", BASE, CONFIG))


def distance(findings: list[Finding], role: str) -> Finding:
    return next(f for f in findings if f.subject == f"{role}: distance to its base")


def within(*parts: str) -> Callable[[str], bool]:
    return lambda name: matrices(name) and any(part in name for part in parts)


def names(*wanted: str) -> Callable[[str], bool]:
    return lambda name: any(name.endswith(part) for part in wanted)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("where", "words"),
    [
        (
            within("q_proj", "v_proj"),
            "in q_proj and v_proj of all layers sampled; k_proj, o_proj and the MLP equal the",
        ),
        (within("mlp."), "in the MLP of all layers sampled; the attention equals the base's."),
        (within("self_attn."), "in the attention of all layers sampled; the MLP equals"),
        (within("layers.0."), "in the attention and the MLP of layer 0; all others equal"),
        (within("layers.4."), "in the attention and the MLP of layer 4; all others equal"),
        (within("layers.8."), "in the attention and the MLP of layer 8; all others equal"),
        (within("layers.5."), "in the attention and the MLP of layer 5; all others equal"),
        (within("layers.1.", "layers.2."), "the MLP of layers 1 and 2; all others equal"),
        (within(*(f"layers.{n}.mlp" for n in (1, 2, 3, 5, 6))), "the MLP of 5 of 9 layers; the"),
        (within("layers.4.self_attn.o_proj"), "in o_proj of layer 4; q_proj, k_proj, v_proj and"),
        (within("layers.7.mlp.down_proj"), "down_proj of layer 7; the attention, gate_proj and"),
        (
            within("layers.0.self_attn.q_proj", "layers.4.self_attn.k_proj"),
            "in 2 of 21 matrices sampled, of q_proj and k_proj; v_proj, o_proj and the MLP equal",
        ),
    ],
)
def test_a_model_tuned_in_part_is_accepted_and_its_parts_are_named(
    where: Callable[[str], bool], words: str, role: str, models: Models
) -> None:
    found = distance(models.check(role, tuned(where)), role)
    assert found.level == "ok"
    assert words in found.message
    assert 0.03 < float(found.message.split()[0]) < 0.06


@pytest.mark.parametrize("role", ROLES)
def test_a_lora_merged_into_q_and_v_is_accepted(role: str, models: Models) -> None:
    weights = dict(BASE)
    generator = torch.Generator().manual_seed(2)
    for name in filter(within("q_proj", "v_proj"), BASE):
        rows, columns = BASE[name].shape
        up, down = torch.randn(rows, 1, generator=generator), torch.randn(columns)
        weights[name] = BASE[name] + 0.002 * torch.outer(up[:, 0], down)
    found = distance(models.check(role, weights), role)
    assert (found.level, "in q_proj and v_proj of all layers" in found.message) == ("ok", True)


@pytest.mark.parametrize("role", ROLES)
def test_rows_that_no_sample_reaches_are_found(
    role: str, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = dict(BASE)
    name = "model.layers.5.mlp.up_proj.weight"
    weights[name] = BASE[name].clone()
    weights[name][-1, -1] += 0.01
    monkeypatch.setattr(differences, "_SAMPLE_BYTES", 2 * 16 * 4)
    monkeypatch.setattr(differences, "_PIECE", 40)
    found = distance(models.check(role, weights), role)
    assert found.level == "ok"
    assert "in rows of up_proj of layer 5; the first rows of every matrix equal" in found.message


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("where", "kinds", "way"),
    [
        (names("input_layernorm.weight"), "norms", "Plan with norms=merge to"),
        (names("model.norm.weight"), "norms", "Plan with norms=merge to"),
        (names(".bias"), "biases", "Plan with norms=merge to"),
        (names("embed_tokens.weight"), "embeddings", "embeddings=merge-shared"),
        (names("lm_head.weight"), "output head", "embeddings=merge-shared"),
        (
            names("layers.3.input_layernorm.weight", "lm_head.weight"),
            "norms and output head",
            "norms=merge and embeddings=merge-shared",
        ),
        (names("layers.6.mlp.gate.weight"), "routers", "modules=all-and-router"),
    ],
)
def test_a_model_tuned_outside_the_matrices_is_a_warning_that_says_where(
    where: Callable[[str], bool], kinds: str, way: str, role: str, models: Models
) -> None:
    found = distance(models.check(role, tuned(where)), role)
    assert found.level == "warning"
    assert "every decoder matrix, so that nothing is merged by default" in found.message
    assert f"It differs in its {kinds}." in found.message
    assert way in found.remedy


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_base_itself_is_refused_also_in_another_dtype(
    role: str, dtype: torch.dtype, models: Models
) -> None:
    found = distance(models.check(role, BASE, dtype=dtype), role)
    assert found.level == "refusal"
    assert "in every tensor of the language model: its task vector is zero" in found.message


def test_a_change_below_the_base_s_rounding_is_a_change(models: Models) -> None:
    coarse = {name: weight.to(torch.bfloat16).float() for name, weight in BASE.items()}
    write_model(models.folder / "coarse", coarse, CONFIG, dtype=torch.bfloat16)
    pair = models.pair("math", tuned(within("v_proj"), scale=1e-5, base=coarse))
    pair = ipm.open_pair(pair.mllm, pair.math, models.folder / "coarse")
    found = distance(pair.check(), "math")
    assert (found.level, "in v_proj of all layers sampled" in found.message) == ("ok", True)


@pytest.mark.parametrize("role", ROLES)
def test_new_rows_of_the_vocabulary_are_no_difference(role: str, models: Models) -> None:
    weights = dict(BASE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([BASE[name], torch.ones(3, 16)])
    assert distance(models.check(role, weights), role).level == "refusal"


def test_routers_of_another_name_are_said_not_to_be_compared(models: Models) -> None:
    weights = {name.replace("mlp.gate.", "mlp.choice.router."): w for name, w in BASE.items()}
    found = distance(models.check("math", weights), "math")
    assert found.level == "warning"
    assert "Not compared, as stored differently: routers." in found.message


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("where", "scale", "level", "words"),
    [
        (within("v_proj"), 0.05, "refusal", "of the weights' norm in v_proj; typically"),
        (within("layers.8.mlp.up_proj"), 0.05, "refusal", "norm in up_proj; typically"),
        (within("v_proj"), 0.02, "warning", "Fine-tunes are typically below 0.1"),
        (matrices, 0.02, "warning", "Fine-tunes are typically below 0.1"),
    ],
)
def test_the_distance_is_that_of_the_parts_that_differ(
    where: Callable[[str], bool], scale: float, level: str, words: str, role: str, models: Models
) -> None:
    found = distance(models.check(role, tuned(where, scale)), role)
    assert (found.level, words in found.message) == (level, True)


def test_a_stranger_is_as_far_in_one_kind_of_matrix_as_in_all(models: Models) -> None:
    stranger = {name: w.flip(0) for name, w in deep_weights().items()}
    for where in (matrices, within("k_proj"), within("layers.3.")):
        weights = {name: stranger[name] if where(name) else w for name, w in BASE.items()}
        found = distance(models.check("math", weights), "math")
        assert found.level == "refusal"
        assert 1.2 < float(found.message.split()[0]) < 1.7
        for file in (*models.folder.glob("m*/*"), *models.folder.glob("m*")):
            file.rmdir() if file.is_dir() else file.unlink()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_by_the_name_of_its_tensor(
    value: float, models: Models
) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    weights = {**BASE, name: BASE[name].clone()}
    weights[name][2, :3] = value
    found = distance(models.check("math", weights), "math")
    assert found.level == "refusal"
    assert f"'{name}' of" in found.message
    assert "math' has 3 NaN or infinite values" in found.message
    write_model(models.folder / "bad", weights, CONFIG)
    pair = ipm.open_pair(models.folder / "mllm", models.base, models.folder / "bad")
    found = distance(pair.check(), "math")
    assert (found.level, "bad' has 3 NaN or" in found.message) == ("refusal", True)


def test_a_partly_tuned_expert_is_analysed_and_changes_those_parts_alone(
    models: Models,
) -> None:
    pair = models.pair("math", tuned(within("q_proj", "v_proj")))
    analysis = ipm.analyse(pair)
    plan = ipm.make_plan(analysis, method="ip_merging", similarity_threshold=0.0, gamma_norm="max")
    ipm.merge(plan, models.folder / "out")
    out = ipm.open_pair(models.folder / "out", models.folder / "math", models.base).mllm
    changed = {
        name for name in out.tensors if not torch.equal(out.read(name), pair.mllm.read(name))
    }
    parts = within("q_proj", "v_proj")
    assert changed == {f"language_model.{name}" for name in BASE if parts(name)}


class OnHub(LocalFiles):
    """A folder that behaves as a repository on the hub, and counts what is read."""

    remote = True

    def __init__(self, folder: Path, blob: str | None) -> None:
        super().__init__(folder, id=f"org/{folder.name}", revision="1" * 40)
        self.blob, self.nbytes = blob, 0

    def content_id(self, name: str) -> str | None:
        return self.blob

    def read_into(self, memory: memoryview, name: str, start: int) -> None:
        self.nbytes += len(memory)
        super().read_into(memory, name, start)


def on_hub(folder: Path, blob: str | None) -> Checkpoint:
    return Checkpoint(OnHub(folder, blob))


@pytest.fixture
def equal_on_hub(models: Models, monkeypatch: pytest.MonkeyPatch) -> Models:
    monkeypatch.setattr(differences, "_SAMPLE_BYTES", 2 * 16 * 4)
    models.pair("math", BASE)
    return models


def test_on_the_hub_the_same_files_are_refused_without_being_read(equal_on_hub: Models) -> None:
    folder = equal_on_hub.folder
    mllm = on_hub(folder / "mllm", "a")
    math, base = (on_hub(folder / name, "b") for name in ("math", "base"))
    found = distance(ipm.open_pair(mllm, math, base).check(), "math")
    assert found.level == "refusal"
    assert "in every tensor" in found.message


@pytest.mark.parametrize("blobs", [("b", "c"), (None, None)])
def test_on_the_hub_equal_rows_are_a_warning_and_the_rest_stays_there(
    blobs: tuple[str | None, str | None], equal_on_hub: Models
) -> None:
    folder = equal_on_hub.folder
    mllm = on_hub(folder / "mllm", "a")
    math, base = on_hub(folder / "math", blobs[0]), on_hub(folder / "base", blobs[1])
    pair = ipm.open_pair(mllm, math, base)
    before = math.files.nbytes
    found = distance(pair.check(), "math")
    assert found.level == "warning"
    assert "Not compared: the remaining rows, which are on the hub" in found.message
    assert math.files.nbytes - before < math.nbytes / 3


def test_a_model_given_as_its_own_base_is_refused_after_a_few_rows(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ipm.open_pair(models.pair("math", BASE).mllm, models.base, models.base)
    monkeypatch.setattr(differences, "_pieces", None)
    assert distance(pair.check(), "math").level == "refusal"
