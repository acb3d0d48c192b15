"""One contract for every entry of METHODS. A new method is tested here without a new test."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from ipmerge_core.errors import IPMergeError, PlanError, ShapeError
from ipmerge_core.methods import METHODS

pytestmark = pytest.mark.shapes

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NAME = "model.layers.7.mlp.up_proj.weight"
SHAPES = [(12, 10), (10, 12), (1, 8), (8, 1), (2, 3)]

# Parameters at which the result is the MLLM itself, to the last bit.
INERT = {
    "ip_merging": {"lambda_": 0},
    "linear": {"alpha": 1},
    "task_arithmetic": {"mllm_weight": 1, "math_weight": 0},
    "layer_swap": {"alpha": 1},
    "ties": {"mllm_weight": 1, "math_weight": 0, "density": 1},
    "dare_linear": {"mllm_weight": 1, "math_weight": 0, "mllm_density": 1},
    "dare_ties": {"mllm_weight": 1, "math_weight": 0, "mllm_density": 1},
    "della": {"mllm_density": 1, "math_weight": 0, "scale": 1, "normalize": False},
    "breadcrumbs": {"mllm_weight": 1, "math_weight": 0, "density": 1},
    "tsv": {"mllm_weight": 1, "math_weight": 0},
    "star": {"mllm_weight": 1, "math_weight": 0, "eta": 1},
    "wudi": {"mllm_weight": 1, "math_weight": 0},
    "fisher": {"alpha": 1},
    "regmean": {"alpha": 1},
    "slerp": {"t": 0},
    "nuslerp": {"t": 0},
    "karcher": {"alpha": 1},
}
# Parameters at which an expert that equals the base changes nothing, by the method's definition.
UNCHANGED = {
    "ip_merging": {},
    "task_arithmetic": {},
    "ties": {"density": 1},
    "dare_linear": {"mllm_density": 1},
    "dare_ties": {"mllm_density": 1},
    "breadcrumbs": {"density": 1},
    "tsv": {},
    "star": {"eta": 1},
    "wudi": {},
    "metagpt": {},
    "knots_ties": {"density": 1},
    "sce": {},
    "model_stock": {"models": "experts"},
    "ram": {"epsilon": 0},
}
ILLEGAL = {"float": math.nan, "int": 1.5, "bool": "yes", "choice": "no such choice"}
every_method = pytest.mark.parametrize("name", METHODS)


def models(shape=(12, 10), seed=0, experts=1, scale=0.05):
    """A base, an MLLM and experts whose elements bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(shape, generator=generator)

    base = draw()
    tuned = [(base + scale * draw()).bfloat16().float() for _ in range(1 + experts)]
    return base.bfloat16().float(), tuned[0], tuned[1:]


def merge(name, base, mllm, math, **parameters):
    """Call a method with calibration data where it needs some."""
    method = METHODS[name]
    experts = 1 if isinstance(math, torch.Tensor) else len(math)
    generator = torch.Generator().manual_seed(5)
    rows, columns = mllm.shape

    def gram():
        inputs = torch.randn(4 * columns, columns, generator=generator)
        return (inputs.T @ inputs / len(inputs)).to(mllm.device)

    def information():
        return torch.rand(rows, columns, generator=generator).to(mllm.device)

    kind = method.data_for(parameters)
    if kind == "gram":
        parameters |= {"mllm_gram": gram(), "math_gram": [gram() for _ in range(experts)]}
    if kind == "fisher":
        data = [information() for _ in range(experts)]
        parameters |= {"mllm_fisher": information(), "math_fisher": data}
    return method(base, mllm, math, tensor_name=NAME, **parameters)


def test_the_methods_are_those_that_readme_promises():
    promised = (
        "ip_merging linear task_arithmetic ties dare_linear dare_ties fisher regmean wudi tsv "
        "metagpt nan slerp nuslerp karcher della breadcrumbs sce iso_c iso_cts knots_ties "
        "layer_swap multislerp model_stock ram star"
    )
    assert set(METHODS) == set(promised.split())
    assert set(INERT) | set(UNCHANGED) <= set(METHODS)


@every_method
def test_a_method_says_what_it_computes_and_where_it_comes_from(name):
    method = METHODS[name]
    assert method.label
    assert method.source
    assert method.formula.startswith("W")
    text = inspect.getdoc(method.function)
    assert all(part in text for part in ("Math:", "Source:"))
    for parameter in method.parameters:
        parameter.check(parameter.default)
        assert parameter.bounds.help, f"{parameter.name} does not say what it means"


@every_method
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_and_device_are_kept_and_the_result_is_finite_fp32(name, shape, device):
    base, mllm, (math,) = (
        [matrix.to(device) for matrix in part] if isinstance(part, list) else part.to(device)
        for part in models(shape)
    )
    merged = merge(name, base, mllm, math)
    assert merged.shape == shape
    assert merged.device == mllm.device
    assert merged.dtype == torch.float32
    assert merged.isfinite().all()


@every_method
def test_inputs_are_left_as_they_were(name):
    for dtype in (torch.float32, torch.float64):
        base, mllm, (math,) = models()
        given = [matrix.to(dtype) for matrix in (base, mllm, math)]
        before = [matrix.clone() for matrix in given]
        merged = merge(name, *given)
        merged.add_(1)  # the result shares no memory with them, either
        assert all(map(torch.equal, given, before))


@every_method
def test_the_same_call_gives_the_same_bits(name):
    base, mllm, (math,) = models()
    torch.manual_seed(1)
    first = merge(name, base, mllm, math)
    torch.manual_seed(2)
    assert torch.equal(first, merge(name, base, mllm, math))


@every_method
def test_the_global_random_state_is_not_touched(name):
    base, mllm, (math,) = models()
    before = torch.get_rng_state()
    merge(name, base, mllm, math)
    assert torch.equal(before, torch.get_rng_state())


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_is_computed(name, dtype):
    base, mllm, (math,) = models()
    stored = [matrix.to(dtype) for matrix in (base, mllm, math)]
    widened = [matrix.float() for matrix in stored]
    assert torch.equal(merge(name, *stored), merge(name, *widened))


@every_method
def test_fp64_in_gives_fp64_out_close_to_fp32(name):
    base, mllm, (math,) = models()
    double = merge(name, base.double(), mllm.double(), math.double())
    single = merge(name, base, mllm, math)
    assert double.dtype == torch.float64
    tolerance = 2e-3 if name == "wudi" else 2e-4  # Adam divides by gradients near zero
    assert torch.allclose(double.float(), single, atol=tolerance)


@pytest.mark.parametrize("name", INERT)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_gain_of_zero_gives_the_mllm_bit_for_bit(name, seed):
    base, mllm, (math,) = models(seed=seed)
    assert torch.equal(merge(name, base, mllm, math, **INERT[name]), mllm)


@every_method
def test_declared_gains_are_gains(name):
    gains = dict.fromkeys(METHODS[name].gains, 0.0)
    if gains:
        gains |= {"mllm_weight": 1.0} if "mllm_weight" in gains else {}
        base, mllm, (math,) = models()
        assert torch.equal(merge(name, base, mllm, math, **gains), mllm)


@pytest.mark.parametrize("name", UNCHANGED)
def test_an_expert_equal_to_the_base_changes_nothing(name):
    base, mllm, _ = models()
    merged = merge(name, base, mllm, base, **UNCHANGED[name])
    assert torch.allclose(merged, mllm, atol=1e-6)


@every_method
def test_models_that_all_equal_the_base_give_the_base(name):
    base, _, _ = models()
    assert torch.allclose(merge(name, base, base, base), base, atol=1e-6)


@every_method
def test_a_list_of_one_expert_is_that_expert(name):
    base, mllm, (math,) = models()
    assert torch.equal(merge(name, base, mllm, [math]), merge(name, base, mllm, math))


@every_method
def test_several_experts_are_merged_or_refused_as_declared(name):
    base, mllm, experts = models(experts=3)
    if METHODS[name].several_experts:
        merged = merge(name, base, mllm, experts)
        assert merged.isfinite().all()
        assert not torch.equal(merged, merge(name, base, mllm, experts[:1]))
    else:
        with pytest.raises(PlanError, match="one expert at a time and got 3"):
            merge(name, base, mllm, experts)


@every_method
def test_no_expert_and_unequal_shapes_are_refused(name):
    base, mllm, (math,) = models()
    with pytest.raises(PlanError, match="at least one expert"):
        METHODS[name](base, mllm, [])
    with pytest.raises(ShapeError, match=r"math matrix of shape \(10, 12\)"):
        METHODS[name](base, mllm, math.T.contiguous())


@every_method
def test_illegal_values_are_refused_with_the_value_and_what_is_expected(name):
    base, mllm, (math,) = models()
    for parameter in METHODS[name].parameters:
        with pytest.raises(PlanError, match="expected"):
            merge(name, base, mllm, math, **{parameter.name: ILLEGAL[parameter.kind]})
    with pytest.raises(PlanError, match="has no parameter 'colour'"):
        merge(name, base, mllm, math, colour=1)


@every_method
def test_whole_numbers_are_good_values_for_float_parameters(name):
    base, mllm, (math,) = models()
    numbers = {
        p.name: 1 for p in METHODS[name].parameters if p.kind == "float" and 1 in p.bounds
    } | {"della": {"epsilon": 0}, "ip_merging": {"output_budget": 0}}.get(name, {})
    merged = merge(name, base, mllm, math, **numbers)
    assert merged.isfinite().all()


@every_method
def test_data_that_is_missing_is_asked_for(name):
    base, mllm, (math,) = models()
    if METHODS[name].data:
        with pytest.raises(PlanError, match="Run a calibration"):
            METHODS[name](base, mllm, math)


@every_method
def test_a_whole_model_statistic_is_used_and_needed_only_with_its_scope(name):
    method = METHODS[name]
    if method.statistic is None:
        assert not method.needs_statistic({})
        return
    assert method.needs_statistic({"scope": "model"})
    assert not method.needs_statistic({"scope": "tensor"})
    assert "statistic" in method.inputs


@every_method
def test_errors_belong_to_the_user_and_say_a_sentence(name):
    base, mllm, (math,) = models()
    with pytest.raises(IPMergeError) as caught:
        METHODS[name](base, mllm[:3], math)
    assert str(caught.value).endswith(".")
