"""Files in, files out: what every method writes, against its definition on the stored tensors.

Two trios that run, shaped as the demo's but for two layers and fewer key heads: one stored in bf16
with two experts, one in fp32 with one. The changes of the first layer have full rank, those of the
second are low-rank, as merged adapters are. Expected is the fp64 definition, with numbers of the
whole model from their own definitions and a calibration that was really run, rounded to the stored
dtype; the difference is counted in units of that dtype's last place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from method_definitions import CHOOSERS, Noise, defined, whole_model
from numeric_cases import DTYPES, drawn, edge
from safetensors.torch import load_file, save_file
from torch import Tensor

import ipmerge_core as ipm
from ipmerge_core.calibration.calibrate import calibrate
from ipmerge_core.calibration.passes import CalibrationSettings
from ipmerge_core.calibration.samples import load_samples
from ipmerge_core.calibration.store import Measurements
from ipmerge_core.methods import METHODS
from ipmerge_core.models.pairing import MatrixMatch, ModelPair
from ipmerge_core.planning.options import OPTIONS
from ipmerge_core.planning.plan import MergePlan

DEMO = Path(__file__).parents[1] / "assets" / "demo"
HIDDEN, FEED, LAYERS, KEYS = 128, 352, 2, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED, HIDDEN),
    "mlp.up_proj": (FEED, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED),
}
EXPERTS = {"bf16": 2, "fp32": 1}
SHORTER = {"layer_swap": {"last_kept_layer": 0}, "wudi": {"iterations": 60}}
CHOICES: list[tuple[str, dict[str, Any]]] = [
    *((name, SHORTER.get(name, {})) for name in METHODS),
    ("ip_merging", {"gamma_norm": "max", "lambda_": 4.0}),
    ("ip_merging", {"ablation": "rescale_only"}),
    ("ip_merging", {"projector": "complement", "energy": 0.9}),
    ("ip_merging", {"projector": "protect"}),
    ("ip_merging", {"projector": "input_filter"}),
    ("ip_merging", {"projector": "off_inputs", "beta": 8.0}),
    ("ip_merging", {"budget": 0.01}),
    ("ip_merging", {"projector": "complement", "output_budget": 0.05}),
    ("ties", {"scope": "model", "density": 0.3}),
    ("nan", {"norm_of": "tau"}),
    ("regmean", {"off_diagonal": 0.0}),
]
# What a written number may be off, beside half a unit in the last place of its stored dtype: units
# in the last place of fp32, in which the arithmetic is done, at the element's largest weight (or at
# the matrix' root mean square, where every element hangs on all others).
PLACES = 8
MORE_PLACES = {  # where a result is a sum over directions, a solution or a path
    **dict.fromkeys(("ip_merging", "iso_c", "iso_cts", "knots_ties", "regmean", "star"), 512),
    "tsv": 4096,  # where directions of two models are 3e-4 apart, as two are here
    "wudi": 8192,
}
MOST_FLIPPED = 2e-3  # share of elements where an election or a threshold went the other way


class Wide(NamedTuple):
    """An opened trio, its noise floors by matrix, and its calibrations by kind."""

    dtype: str
    pair: ModelPair
    floors: dict[str, float]
    folder: Path
    calibration: Callable[[str], Path]


def text_folder(demo: Path, out: Path, weights: dict[str, Tensor]) -> Path:
    """Write a demo model again with fewer layers and keys and these decoder matrices."""
    shutil.copytree(demo, out)
    config = json.loads((out / "config.json").read_text())
    text = config.get("text_config", config)
    text |= {"num_hidden_layers": LAYERS, "num_key_value_heads": 2}
    dtype = next(iter(weights.values())).dtype
    config["dtype"] = text["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config))
    stored = load_file(out / "model.safetensors")
    for name in list(stored):
        plain = name.removeprefix("language_model.")
        if plain in weights:
            stored[name] = weights[plain]
        elif plain.startswith("model.layers.") and int(plain.split(".")[2]) >= LAYERS:
            del stored[name]
    stored = {name: weight.to(dtype).contiguous() for name, weight in stored.items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


def write_wide(folder: Path, dtype: str) -> Wide:
    """Draw the matrices and write the folders."""
    generator = torch.Generator().manual_seed(21)
    models: list[dict[str, Tensor]] = [{} for _ in range(2 + EXPERTS[dtype])]
    floors = {}
    for layer in range(LAYERS):
        for module, shape in SHAPES.items():
            name = f"model.layers.{layer}.{module}.weight"
            low = [layer == 1] * (1 + EXPERTS[dtype])
            # Strong enough for sums of three changes, whose noise is larger, to be clear of it.
            found = drawn(shape, DTYPES[dtype], low, True, generator, strength=4.0)
            floors[name] = found.noise
            for model, weight in zip(models, (found.base, found.mllm, *found.experts), strict=True):
                model[name] = weight
    base, mllm, *experts = models
    pair = ipm.open_pair(
        text_folder(DEMO / "mllm", folder / "mllm", mllm),
        [
            text_folder(DEMO / "math", folder / f"math-{number}", expert)
            for number, expert in enumerate(experts)
        ],
        text_folder(DEMO / "base", folder / "base", base),
    )
    samples = (
        load_samples("demo", 4, takes_images=True),
        load_samples("demo", 4, takes_images=False),
    )

    @cache
    def calibration(kind: str) -> Path:
        settings = CalibrationSettings(kind, "empirical" if kind == "fisher" else "sampled")
        return calibrate(pair, folder / kind, settings, *samples).folder

    return Wide(dtype, pair, floors, folder, calibration)


@pytest.fixture(scope="module", params=EXPERTS)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wide:
    return write_wide(tmp_path_factory.mktemp(request.param), request.param)


def plan_of(name: str, wide: Wide, choice: dict[str, Any]) -> MergePlan:
    method = METHODS[name]
    pair = wide.pair
    if not method.several_experts and len(pair.math) > 1:
        pair = ipm.open_pair(pair.mllm.id, pair.math[0].id, pair.base.id)
    kind = method.data_for({key: value for key, value in choice.items() if key not in OPTIONS})
    if kind is not None:
        choice = {**choice, "calibration": wide.calibration(kind)}
    if method.needs_analysis:
        return ipm.make_plan(ipm.analyse(pair), name, similarity_threshold=0.0, **choice)
    return ipm.make_plan(pair, name, **choice)


def stored_of(pair: ModelPair, match: MatrixMatch, experts: int) -> list[Tensor]:
    """Base, MLLM and experts as the files hold them."""
    tuned = [pair.math[k].read(match.math[k]) for k in range(experts)]
    return [pair.base.read(match.name), pair.mllm.read(match.mllm), *tuned]


def expected_of(plan: MergePlan, wide: Wide, experts: int) -> Iterator[tuple[MatrixMatch, Tensor]]:
    """What every matrix should be, in fp64, where no singular value is as small as the noise."""
    parameters = {**plan.parameters}
    all_of_them = [stored_of(wide.pair, match, experts) for match in wide.pair.matrices]
    data: list[dict[str, Any]] = [{} for _ in all_of_them]
    measured = all_of_them
    if plan.calibration is not None:
        found = Measurements.open(plan.calibration.folder)
        data = [found.inputs(match.name, range(experts)) for match in wide.pair.matrices]
        measured = [[given[f"mllm_{found.kind}"], *given[f"math_{found.kind}"]] for given in data]
    statistic = whole_model(plan.method, measured, parameters)
    for match, (base, mllm, *tuned), inputs in zip(
        wide.pair.matrices, all_of_them, data, strict=True
    ):
        noise = Noise(wide.floors[match.name])
        given = {**parameters, **inputs, "statistic": statistic, "tensor_name": match.name}
        result = defined(plan.method, base, mllm, tuned, noise=noise, **given)
        if noise.clear:
            yield match, result


def unit(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number of a dtype, in fp64."""
    size = size.abs().to(dtype)
    return torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()


def beyond(name: str, written: Tensor, expected: Tensor, models: list[Tensor]) -> Tensor:
    """By how many units of the stored dtype an element is further off than it may be."""
    largest = torch.stack([*models, written]).abs().amax(0).float()
    if name in MORE_PLACES:  # an error there is the matrix', not the element's
        largest = largest.clamp(min=float(largest.square().mean().sqrt()))
    arithmetic = MORE_PLACES.get(name, PLACES) * unit(largest, torch.float32)
    stored = unit(torch.maximum(written.abs().double(), expected.abs()), written.dtype)
    apart = (written.double() - expected).abs()
    return ((apart - arithmetic) / stored - 0.5).clamp(min=0)


@pytest.mark.parametrize(("name", "choice"), CHOICES, ids=str)
def test_what_is_written_is_the_definition_on_what_was_read(
    name: str, choice: dict[str, Any], wide: Wide, tmp_path: Path
) -> None:
    plan = plan_of(name, wide, choice)
    ipm.merge(plan, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    experts = len(wide.pair.math) if METHODS[name].several_experts else 1
    wrong, clear = [], 0
    for match, expected in expected_of(plan, wide, experts):
        clear += 1
        models = stored_of(wide.pair, match, experts)
        off = beyond(name, after[match.mllm], expected, models)
        share = float((off > 0).double().mean())
        if share > (MOST_FLIPPED if name in CHOOSERS else 0):
            wrong.append(
                f"{match.name}: {share:.1e} of the elements are not the nearest numbers, by up to "
                f"{float(off.max()):.3g} units in the last place"
            )
    assert clear >= LAYERS * 4
    assert not wrong, "\n".join(wrong)


def test_the_trio_is_as_it_says(wide: Wide) -> None:
    for match in wide.pair.matrices:
        base, *tuned = stored_of(wide.pair, match, len(wide.pair.math))
        assert {weight.dtype for weight in (base, *tuned)} == {DTYPES[wide.dtype]}
        for weight in tuned:
            S = torch.linalg.svdvals(weight.double() - base.double())
            exists = int((wide.floors[match.name] < S).sum())
            assert exists == (min(base.shape) if match.layer == 0 else min(base.shape) // 16)
            assert S[exists:].numel() == 0 or float(S[exists]) < 1.3 * edge(base)
