"""Fisher merging weighs by information whatever its scale, and old plans keep their own floor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trio, write_trio
from safetensors.torch import save_file
from torch import Tensor

import ipmerge_core as ipm
from ipmerge_core.calibration.store import RECORD, Measured, Measurements
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import METHODS
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.planning.plan import MergePlan

FISHER = METHODS["fisher"]
SCOPES = ("model", "tensor", "none")
ABSOLUTE = {"floor": 1e-6, "floor_is": "absolute"}
LLM = 1e-10  # mean squared gradient of a model of seven billion weights


def information(shape: tuple[int, ...], seed: int, scale: float = LLM) -> Tensor:
    """Draw squared gradients, some large, many small, in fp32 as they are stored."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(shape, generator=generator).exp() * torch.randn(shape, generator=generator)
    return (wide.square() * scale).float()


def case(scale: float = LLM, experts: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Weights in bf16 and the information of the MLLM and the experts."""
    generator = torch.Generator().manual_seed(0)
    weights = [0.02 * torch.randn(24, 40, generator=generator) for _ in range(1 + experts)]
    found = [information((24, 40), seed, scale) for seed in range(1, 2 + experts)]
    return [weight.to(torch.bfloat16) for weight in weights], found


def whole(
    found: Sequence[Tensor], *, means: bool = True, factor: float = 30.0
) -> tuple[float, ...]:
    """Norms of models in which each matrix occurs many times over, and their means."""
    norms = [factor * float(F.double().norm()) for F in found]
    return (*norms, *(float(F.double().mean()) for F in found)) if means else tuple(norms)


def merged(weights: Sequence[Tensor], found: Sequence[Tensor], **options: Any) -> Tensor:
    data = {"mllm_fisher": found[0], "math_fisher": list(found[1:])}
    return FISHER(weights[0], weights[0], list(weights[1:]), **data, **options)


def away(a: Tensor, b: Tensor, weights: Sequence[Tensor]) -> float:
    """Distance of two results relative to that of the models."""
    apart = (weights[1] - weights[0]).double().norm()
    return float((a.double() - b.double()).norm() / apart)


def defined(
    weights: Sequence[Tensor],
    found: Sequence[Tensor],
    *,
    floor: float,
    floor_is: str,
    scope: str,
    alpha: float,
    statistic: Sequence[float] | None,
) -> Tensor:
    """The formula of the docstring, in fp64."""
    shares = [alpha] + [(1 - alpha) / (len(weights) - 1)] * (len(weights) - 1)
    F = [one.double() for one in found]
    norms, means = [float(f.norm()) for f in F], [float(f.mean()) for f in F]
    if scope == "model" and statistic is not None:
        norms, means = list(statistic[: len(F)]), list(statistic[len(F) :])
    floors = [floor * mean if floor_is == "relative" else floor for mean in means]
    divisors = [norm + e if scope != "none" else 1.0 for norm, e in zip(norms, floors, strict=True)]
    gains = [c / divisor for c, divisor in zip(shares, divisors, strict=True)]
    parts = [gain * (f + e) for gain, f, e in zip(gains, F, floors, strict=True)]
    total = sum(part * W.double() for part, W in zip(parts, weights, strict=True))
    return total / sum(parts)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("floor_is", ["relative", "absolute"])
@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.5, 1e-12])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_result_is_that_of_the_formula(
    scope: str, floor: float, floor_is: str, experts: int
) -> None:
    weights, found = case(experts=experts)
    options = {"scope": scope, "floor": floor, "floor_is": floor_is, "alpha": 0.7}
    for statistic in (None, whole(found)):
        ours = merged(weights, found, statistic=statistic, **options)
        theirs = defined(weights, found, statistic=statistic, **options)
        assert away(ours, theirs, weights) < 1e-6


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e10])
def test_the_scale_of_the_information_does_not_matter(
    scale: float, floor: float, scope: str
) -> None:
    weights, found = case()
    scaled = [F * scale for F in found]
    options = {"scope": scope, "floor": floor}
    one = merged(weights, found, statistic=whole(found), **options)
    other = merged(weights, scaled, statistic=whole(scaled), **options)
    assert away(one, other, weights) < 1e-6


def weighing(result: Tensor, weights: Sequence[Tensor]) -> float:
    """How far a result is from the best mean of the models with one weight for all elements."""
    moved, apart = ((W.double() - weights[0].double()).flatten() for W in (result, weights[1]))
    share = moved.dot(apart) / apart.dot(apart)
    return float((moved - share * apart).norm() / apart.norm())


@pytest.mark.parametrize("scope", SCOPES)
def test_at_the_scale_of_llms_elements_are_weighed_and_a_constant_of_1e_6_weighs_none(
    scope: str,
) -> None:
    weights, found = case()
    options = {"scope": scope, "statistic": whole(found)}
    ours = merged(weights, found, **options)
    assert weighing(ours, weights) > 0.3
    assert away(ours, merged(weights, found, floor=0.0, **options), weights) < 0.1
    assert weighing(merged(weights, found, **ABSOLUTE, **options), weights) < 0.005


@pytest.mark.parametrize("scope", SCOPES)
def test_elements_without_information_get_a_mean_of_the_models(scope: str) -> None:
    weights, found = case()
    for F in found:
        F[:, :5] = 0
    for floor in (0.0, 1e-3):
        result = merged(weights, found, scope=scope, floor=floor, statistic=whole(found))
        low, high = (f(weights[0], weights[1]).float() for f in (torch.minimum, torch.maximum))
        assert result.isfinite().all()
        assert (result >= low - 1e-6).all()
        assert (result <= high + 1e-6).all()
    nothing = merged(weights, [0 * F for F in found], scope=scope, alpha=0.75)
    expected = 0.75 * weights[0].double() + 0.25 * weights[1].double()
    assert away(nothing, expected, weights) < 1e-6


def test_a_model_without_any_information_takes_no_part() -> None:
    weights, found = case()
    for scope in SCOPES:
        result = merged(weights, [found[0], 0 * found[1]], scope=scope)
        assert away(result, weights[0], weights) < 1e-6


def test_numbers_of_the_whole_model_that_do_not_fit_are_refused() -> None:
    weights, found = case()
    norms = whole(found, means=False)
    with pytest.raises(PlanError, match="of 2 numbers for 2 models; .*, then the mean of each"):
        merged(weights, found, statistic=norms)
    with pytest.raises(PlanError, match="statistic of 3 numbers"):
        merged(weights, found, statistic=(*norms, 1.0), **ABSOLUTE)
    for options in (ABSOLUTE, {"floor": 0.0}):
        one = merged(weights, found, statistic=norms, **options)
        assert torch.equal(one, merged(weights, found, statistic=whole(found), **options))


def test_the_numbers_of_a_model_are_one_pass_over_its_matrices() -> None:
    weights, found = case()
    halves = [
        (weights[0][rows], weights[0][rows], [weights[1][rows]],
         {"mllm_fisher": found[0][rows], "math_fisher": [found[1][rows]]})
        for rows in (slice(0, 5), slice(5, 24))
    ]  # fmt: skip
    assert FISHER.statistic is not None
    numbers = FISHER.statistic.over(lambda: halves, FISHER.complete({}))
    assert numbers == pytest.approx(whole(found, factor=1.0))


# --- through files ---


@pytest.fixture
def trio(tmp_path: Path) -> Trio:
    return write_trio(tmp_path / "trio", dtype=torch.bfloat16)


def calibration(pair: ipm.ModelPair, folder: Path, scale: float, *, recorded: bool = True) -> Path:
    """Write what a calibration would; not `recorded` as versions did that noted no mean."""
    folder.mkdir()
    models = []
    for k, model in enumerate((pair.mllm, *pair.math)):
        tensors = {
            m.name: information(m.shape, 100 * k + i, scale) for i, m in enumerate(pair.matrices)
        }
        save_file(tensors, folder / f"{k}.safetensors")
        every = torch.cat([F.double().flatten() for F in tensors.values()])
        places = {name: (f"{k}.safetensors", name) for name in tensors}
        mean = float(every.mean()) if recorded else None
        models.append(
            Measured(str(k), model.id, model.fingerprint, 5, 50, float(every.norm()), places, mean)
        )
    Measurements(folder, "fisher", {}, tuple(models)).save()
    if not recorded:
        content = json.loads((folder / RECORD).read_text())
        for entry in content["models"]:
            del entry["mean"]
        (folder / RECORD).write_text(json.dumps(content))
    return folder


def opened(trio: Trio) -> ipm.ModelPair:
    return ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base)


def weights_of(plan: MergePlan, out: Path) -> bytes:
    ipm.merge(plan, out)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_merge_is_the_same_whatever_the_scale_of_the_calibration(
    scope: str, trio: Trio, tmp_path: Path
) -> None:
    pair = opened(trio)
    files = {}
    for name, scale in (("llm", LLM), ("smaller", LLM * 2**-20)):
        folder = calibration(pair, tmp_path / name, scale)
        plan = ipm.make_plan(pair, "fisher", calibration=folder, scope=scope)
        files[name] = weights_of(plan, tmp_path / f"out {name}")
    assert files["llm"] == files["smaller"]
    folder = tmp_path / "llm"
    constant = ipm.make_plan(pair, "fisher", calibration=folder, scope=scope, **ABSOLUTE)
    assert weights_of(constant, tmp_path / "constant") != files["llm"]


def test_the_floor_is_of_the_whole_models_mean(trio: Trio, tmp_path: Path) -> None:
    pair = opened(trio)
    measured = Measurements.open(calibration(pair, tmp_path / "measured", LLM))
    numbers = measured.statistic(("norm", "mean"))
    plan = ipm.make_plan(pair, "fisher", calibration=measured.folder, floor=0.1, exclude="mlp")
    ipm.merge(plan, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "ipmerge.json").read_text())["plan"]["statistic"] == list(
        numbers
    )
    out = Checkpoint.open(tmp_path / "out")
    for matrix in pair.matrices[:4]:
        found = measured.inputs(matrix.name, [0, 1])
        weights = pair.read(matrix)
        expected = defined(
            [weights.mllm, *weights.math],
            [found["mllm_fisher"], *found["math_fisher"]],
            floor=0.1, floor_is="relative", scope="model", alpha=0.5, statistic=numbers,
        )  # fmt: skip
        assert torch.allclose(out.read(matrix.mllm).double(), expected, rtol=2**-8, atol=1e-9)


def test_a_calibration_that_noted_no_mean_merges_to_the_same_bytes(
    trio: Trio, tmp_path: Path
) -> None:
    pair = opened(trio)
    files = [
        weights_of(
            ipm.make_plan(
                pair, "fisher",
                calibration=calibration(pair, tmp_path / f"c{noted}", LLM, recorded=noted),
            ),
            tmp_path / f"out{noted}",
        )
        for noted in (True, False)
    ]  # fmt: skip
    assert files[0] == files[1]


def test_nothing_is_read_for_a_mean_that_nobody_needs(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = opened(trio)
    folder = calibration(pair, tmp_path / "old", LLM, recorded=False)
    monkeypatch.setattr(Measurements, "_mean", None)
    for number, options in enumerate((ABSOLUTE, {"floor": 0.0}, {"scope": "tensor"})):
        plan = ipm.make_plan(pair, "fisher", calibration=folder, **options)
        ipm.merge(plan, tmp_path / f"out{number}")


# --- plans of versions without floor_is ---


def without_contents(plan: MergePlan) -> MergePlan:
    """The plan without the second hash of the weights, which came later than `floor_is`."""
    return replace(plan, sources=plan.sources._each(lambda source: replace(source, content=None)))


def as_before(plan: MergePlan) -> dict[str, Any]:
    """Write a plan as versions did that had no `floor_is`, with the hash that they gave it."""
    content = json.loads(json.dumps(plan.to_dict()))
    del content["parameters"]["floor_is"], content["method_version"]
    sources = content["sources"]
    for source in (sources["mllm"], sources["base"], *sources["math"]):
        del source["content"]
    hashed = [
        plan.method,
        dict(sorted(content["parameters"].items())),
        [],
        [[d.name, list(d.experts)] for d in plan.decisions],
        [source.fingerprint for source in plan.sources.all()],
        plan.calibration.digest,
        plan.anchor,
    ]
    content["hash"] = hashlib.sha256(json.dumps(hashed).encode()).hexdigest()[:8]
    return content


@pytest.mark.parametrize("floor", [1e-6, 1e-3, 0.0])
def test_an_old_plan_keeps_its_constant_its_hash_and_its_result(
    floor: float, trio: Trio, tmp_path: Path
) -> None:
    pair = opened(trio)
    folder = calibration(pair, tmp_path / "old", LLM, recorded=False)
    now = ipm.make_plan(pair, "fisher", calibration=folder, floor=floor, floor_is="absolute")
    (tmp_path / "plan.json").write_text(json.dumps(as_before(now)))
    old = MergePlan.load(tmp_path / "plan.json")
    assert old.parameters == {**now.parameters, "floor": floor, "floor_is": "absolute"}
    assert old.digest == without_contents(now).digest
    relative = ipm.make_plan(pair, "fisher", calibration=folder, floor=floor)
    assert without_contents(relative).digest != old.digest
    assert weights_of(old, tmp_path / "a") == weights_of(now, tmp_path / "b")
    old.save(tmp_path / "again.json")
    assert MergePlan.load(tmp_path / "again.json") == old


def test_an_old_plan_whose_numbers_were_changed_is_still_refused(
    trio: Trio, tmp_path: Path
) -> None:
    pair = opened(trio)
    folder = calibration(pair, tmp_path / "old", LLM)
    content = as_before(ipm.make_plan(pair, "fisher", calibration=folder, **ABSOLUTE))
    MergePlan.from_dict(content)  # it opens as it was written
    content["parameters"]["floor"] = 1e-5
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="its hash is"):
        MergePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("name", METHODS)
def test_parameters_that_came_later_mean_what_was_done_before(name: str) -> None:
    method = METHODS[name]
    later = {p.name: p.bounds.before for p in method.parameters if p.bounds.before is not None}
    complete = method.complete({})
    written = {key: value for key, value in complete.items() if key not in later}
    read = method.complete(method.with_former_defaults(written))
    assert read == {**complete, **later}
    assert method.as_hashed(read).keys() == written.keys()
    assert method.with_former_defaults(complete) == complete
    former = {p.name: {word: old for old, word in p.bounds.former} for p in method.parameters}
    assert method.as_hashed(complete) == {
        key: former[key].get(value, value)
        for key, value in complete.items()
        if later.get(key) is None or later[key] != value
    }
