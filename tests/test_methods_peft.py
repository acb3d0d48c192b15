"""TIES and DARE as PEFT computes them, which is also the code that BR2V's baselines come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Weights, as_mllm, fine_tuned, text_weights, write_model
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import Tensor

import ipmerge_core as ipm
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS, ties
from ipmerge_core.methods.dropout import Drop, roles
from ipmerge_core.methods.sign_election import agreeing_sum_
from ipmerge_core.models.pairing import ModelPair

pytestmark = pytest.mark.shapes

AS_PEFT = {"normalize": "count", "election": "unweighted"}
NAME = "model.layers.0.self_attn.q_proj.weight"
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2e-5}  # of the change
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
models_of = pytest.mark.parametrize("count", [2, 3], ids="{} models".format)


def matrices(count: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """A base and models that differ from it a little, stored in a dtype."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(40, 56, generator=generator, dtype=torch.float64)
    changes = 0.004 * torch.randn(count, 40, 56, generator=generator, dtype=torch.float64)
    return [base.to(dtype), *((base + change).to(dtype) for change in changes)]


def task_vectors(models: list[Tensor]) -> list[Tensor]:
    wide = [m if m.dtype == torch.float64 else m.float() for m in models]
    return [tuned - wide[0] for tuned in wide[1:]]


def weights_of(count: int, like: Tensor) -> tuple[dict[str, float], Tensor]:
    """The weights of a MLLM and of experts, in our words and in PEFT's."""
    ours = {"mllm_weight": 1.6, "math_weight": 0.2}
    return ours, torch.tensor([1.6, *[0.2] * (count - 1)], dtype=like.dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@every_dtype
@models_of
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_that_counts_is_that_of_peft(density: float, count: int, dtype: torch.dtype) -> None:
    base, mllm, *experts = models = matrices(count, dtype)
    changes = task_vectors(models)
    ours, theirs = weights_of(count, changes[0])
    expected = merge_utils.ties(changes, theirs, density)
    merged = METHODS["ties"](base, mllm, experts, density=density, **ours, **AS_PEFT)
    found = merged - base.to(merged)
    # Of magnitudes equal to the smallest that is kept, topk keeps whichever it meets.
    clear = torch.ones_like(expected, dtype=torch.bool)
    if density < 1:
        for change in changes:
            kept = int(density * change.numel())
            clear &= change.abs() != change.abs().flatten().sort(descending=True).values[kept - 1]
    assert clear.double().mean() > 0.8
    assert relative(found[clear], expected[clear]) < TOLERANCE[dtype]


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let PEFT drop what we drop."""

    def of(count: int, like: Tensor, density: float, rescales: bool = True) -> None:
        ones = torch.ones_like(like)
        kept: Iterator[Tensor] = iter(
            [
                Drop(0 * ones, ones, density, "none", (3, NAME, role))(ones.clone())
                for role in roles(count - 1)
            ]
        )

        def prune(tensor: Tensor, density: float, rescale: bool) -> Tensor:
            return tensor * next(kept) / (density if rescale and rescales else 1)

        monkeypatch.setattr(merge_utils, "random_pruning", prune)

    return of


@every_dtype
@models_of
@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("rescale", ["inverse_density", "none"])
@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
def test_dare_is_that_of_peft_or_of_br2v_which_does_not_rescale(
    method: str, rescale: str, density: float, count: int, dtype: torch.dtype, same_masks: Any
) -> None:
    base, mllm, *experts = models = matrices(count, dtype)
    changes = task_vectors(models)
    ours, theirs = weights_of(count, changes[0])
    same_masks(count, changes[0], density, rescale == "inverse_density")
    expected = getattr(merge_utils, method)(changes, theirs, density)
    choice = {"density": density, "rescale": rescale, "seed": 3, "tensor_name": NAME}
    choice |= AS_PEFT if method == "dare_ties" else {}
    merged = METHODS[method](base, mllm, experts, **choice, **ours)
    assert relative(merged - base.to(merged), expected) < TOLERANCE[dtype]


def test_della_without_a_window_counts_as_dare_does() -> None:
    base, mllm, expert = matrices(2, torch.float64)
    choice = {"density": 0.6, "seed": 3, "tensor_name": NAME, "math_weight": 0.7}
    for election in ("weighted", "majority", "unweighted"):
        for normalize in ("none", "weights", "count"):
            how = {"election": election, "normalize": normalize, **choice}
            merged = METHODS["della"](base, mllm, expert, epsilon=0.0, scale=1.0, **how)
            assert torch.equal(merged, METHODS["dare_ties"](base, mllm, expert, **how))


def test_a_majority_after_drops_is_that_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, (2, 30, 40), generator=generator).double() * 2 - 1
    signs[0] = -signs[1]  # every vote is tied where both are kept
    choice = {"density": 0.7, "rescale": "none", "election": "majority", "normalize": "count"}
    named = {"seed": 3, "tensor_name": NAME, "math_weight": 1.0}
    zero = torch.zeros(30, 40, dtype=torch.float64)
    left = [
        Drop(zero, tau, 0.7, "none", (3, NAME, role))(tau.clone())
        for tau, role in zip(signs, roles(1), strict=True)
    ]
    elected = (left[0] + left[1]).sign()
    tied = elected.sum().sign()
    elected = torch.where(elected == 0, tied, elected)
    agreeing = [torch.where(part.sign() == elected, part, 0.0) for part in left]
    number = sum((part != 0).double() for part in agreeing).clamp(min=1)
    expected = sum(agreeing) / number
    for block in (1 << 18, 77):
        monkeypatch.setattr("ipmerge_core.methods.blocks._CPU_BLOCK", block)
        merged = METHODS["dare_ties"](zero, signs[0], signs[1], **choice, **named)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-12)


def test_elections_differ_where_votes_are_tied_or_weights_decide() -> None:
    zero = torch.zeros(1, 4, dtype=torch.float64)
    mllm = torch.tensor([[1.0, -1.0, -2.0, -1.0]], dtype=torch.float64)
    math = torch.tensor([[-1.0, 3.0, -2.0, 0.0]], dtype=torch.float64)
    choice = {"density": 1.0, "mllm_weight": 4.0, "math_weight": 1.0, "normalize": "count"}

    def merged(election: str) -> list[float]:
        return METHODS["ties"](zero, mllm, math, election=election, **choice)[0].tolist()

    assert merged("weighted") == [4.0, -4.0, -5.0, -4.0]
    assert merged("unweighted") == [4.0, 3.0, -5.0, -4.0]
    assert merged("majority") == [-1.0, 3.0, -5.0, -4.0]  # of three signs two are negative


def test_counting_what_agrees_never_divides_by_zero() -> None:
    zero = torch.zeros(2, 3)
    vectors = [zero.clone(), zero.clone()]
    assert torch.equal(agreeing_sum_(vectors, [1.0, 1.0], normalize="count"), zero)
    opposite = {"mllm_weight": 1.0, "math_weight": -1.0, "density": 1.0, "normalize": "count"}
    assert METHODS["ties"](zero, zero + 1, zero + 1, **opposite).isfinite().all()


# --- the words, and what they were before ---

COUNTING = ["ties", "dare_ties", "della", "knots_ties"]


@pytest.mark.parametrize("method", COUNTING)
def test_true_and_false_still_mean_what_they_meant(method: str) -> None:
    base, mllm, expert = matrices(2, torch.float32)
    merge, names = METHODS[method], {"tensor_name": NAME, "math_weight": 0.4}
    results = {}
    for word, former in (("none", False), ("weights", True)):
        results[word] = merge(base, mllm, expert, normalize=word, **names)
        assert torch.equal(results[word], merge(base, mllm, expert, normalize=former, **names))
        assert merge.complete({"normalize": former})["normalize"] == word
    results["count"] = merge(base, mllm, expert, normalize="count", **names)
    assert len({str(result.tolist()) for result in results.values()}) == 3
    with pytest.raises(PlanError, match="normalize is 'sum'; expected one of none, weights, count"):
        merge.complete({"normalize": "sum"})
    with pytest.raises(PlanError, match="normalize is 1; expected one of"):
        merge.complete({"normalize": 1})


def test_the_plain_function_takes_them_too() -> None:
    models = matrices(2, torch.float32)
    assert torch.equal(ties(*models, normalize=True), ties(*models, normalize="weights"))
    assert torch.equal(ties(*models, normalize=False), ties(*models))


# --- the files of BR2V ---


def with_norms(weights: Weights, seed: int) -> Weights:
    """Models whose norms differ, and which have biases."""
    generator = torch.Generator().manual_seed(seed)
    tuned = fine_tuned(weights, seed)
    for name, weight in weights.items():
        if weight.ndim == 1:
            tuned[name] = weight + 0.01 * torch.randn(weight.shape, generator=generator)
    return tuned


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    folder, base = tmp_path_factory.mktemp("br2v"), text_weights()
    for layer in range(3):
        base[f"model.layers.{layer}.self_attn.q_proj.bias"] = 0.01 * torch.arange(16.0)
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    write_model(folder / "mllm", as_mllm(with_norms(base, 1)), config)
    for number, role in enumerate(("base", "math")):
        weights = with_norms(base, 2) if number else base
        write_model(folder / role, weights, TEXT_CONFIG)
    return ipm.open_pair(folder / "mllm", folder / "math", folder / "base")


BY_HAND = [
    ("linear", {"alpha": 0.9}),
    ("layer_swap", {"alpha": 0.9, "last_kept_layer": 0}),
    ("ties", {"mllm_weight": 1.6, "math_weight": 0.2, "density": 0.2, **AS_PEFT}),
]


@pytest.mark.parametrize(("method", "choice"), BY_HAND, ids=[method for method, _ in BY_HAND])
def test_a_merge_with_norms_is_the_files_of_br2v(
    method: str, choice: dict[str, Any], pair: ModelPair, tmp_path: Path
) -> None:
    plan = ipm.make_plan(pair, method, norms="merge", **choice)
    ipm.merge(plan, tmp_path / "out")
    base, mllm, math, merged = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (pair.base.id, pair.mllm.id, pair.math[0].id, tmp_path / "out")
    )
    for name, root in base.items():
        own, other = mllm[f"language_model.{name}"], math[name]
        kept = "embed" in name or "lm_head" in name
        kept = kept or (method == "layer_swap" and (".0." in name or name == "model.norm.weight"))
        if method == "ties":
            changes = [own - root, other - root]
            expected = root + merge_utils.ties(changes, torch.tensor([1.6, 0.2]), 0.2)
        else:
            expected = 0.9 * own + 0.1 * other
        expected = own if kept else expected
        torch.testing.assert_close(
            merged[f"language_model.{name}"], expected, rtol=0, atol=2.5e-7, msg=name
        )
