"""A pack holds every singular value, within its precision, and exact sums."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from synthetic_pack import make_pack

import ipmerge_core as ipm
from ipmerge_core.analysis.records import VERSION
from ipmerge_core.analysis.singular_values import (
    COSINE_STEP,
    PRECISION,
    Overlap,
    SingularValues,
    decode,
    encode,
)
from ipmerge_core.errors import CheckpointError, PlanError
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.spectral.spectrum import existing, noise_floor, task_vector
from ipmerge_core.spectral.weight_values import weight_values

DEMO = Path(__file__).parents[1] / "assets" / "demo"
MOST_BYTES = 600_000  # gzipped, for 28 layers of a 7B model


@settings(deadline=None)
@given(some.lists(some.integers(0, 2**40)))
def test_integers_come_back(numbers: list[int]) -> None:
    assert decode(encode(numbers)) == numbers


def test_an_incomplete_number_is_refused() -> None:
    for text in ("g", "A*"):
        with pytest.raises(ValueError, match=r"incomplete|substring"):
            decode(text)


@settings(deadline=None)
@given(some.lists(some.floats(1e-30, 1e30) | some.just(0.0)))
def test_values_come_back_within_the_precision(values: list[float]) -> None:
    values.sort(reverse=True)
    stored = SingularValues.of(values, rank=0)
    back = stored.values()
    assert stored.count == len(back) == len(values)
    for found, value in zip(back, values, strict=True):
        assert abs(found - value) <= 0.501 * PRECISION * value
    assert stored.total == pytest.approx(sum(values), rel=1e-12)
    assert stored.squares == pytest.approx(sum(value**2 for value in values), rel=1e-12)
    again = SingularValues(**json.loads(json.dumps(vars(stored))))
    assert again == stored


@settings(deadline=None)
@given(some.integers(1, 5), some.integers(1, 5), some.integers(0, 99))
def test_cosines_come_back_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    cosines = np.random.default_rng(seed).random((rows, columns)).tolist()
    back = Overlap.of(cosines).matrix()
    assert np.abs(np.subtract(back, cosines)).max() <= COSINE_STEP / 2 + 1e-12


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (96, 96), (1, 7), (3, 3)])
@pytest.mark.parametrize("strong", [0.0, 30.0])
def test_values_of_weights_are_those_of_the_decomposition(
    shape: tuple[int, int], strong: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = 0.02 * torch.randn(shape, generator=generator)
    left, right = (torch.randn(size, 1, generator=generator) for size in shape)
    weight = (weight + 0.02 * strong / max(shape) ** 0.5 * left @ right.T).bfloat16()
    found = weight_values(weight)
    exact = torch.linalg.svdvals(weight.double())
    assert found.dtype == torch.float64
    assert len(found) == min(shape)
    bulk = float(exact[min(8, len(exact) - 1)])
    near = exact > bulk / 30  # below that only fp64 is accurate to a thousandth
    assert float(((found - exact).abs() / exact)[near].max()) <= 1e-3
    assert float((found - exact).abs().max()) <= 1e-3 * bulk


def test_values_of_zeros_and_of_damaged_weights() -> None:
    assert weight_values(torch.zeros(3, 5)).tolist() == [0.0, 0.0, 0.0]
    assert float(weight_values(torch.full((2, 2), 1e30))[0]) == pytest.approx(2e30)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        weight_values(torch.tensor([[float("nan"), 1.0]]))


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ipm.open_pair(*(DEMO / name for name in ("mllm", "math", "base")))


def test_a_record_holds_all_values_of_the_files(pair: ModelPair) -> None:
    analysis = ipm.Analysis.load(DEMO / "pack.json.gz")
    for match, record in zip(pair.matrices[:7], analysis.records[:7], strict=True):
        weights = pair.read(match)
        spectra = record.spectra
        assert spectra is not None
        assert spectra.base is not None
        for stored, tuned in ((spectra.mllm, weights.mllm), (spectra.math, weights.math[0])):
            change = task_vector(tuned, weights.base)
            exact = torch.linalg.svdvals(change.double())
            assert stored.count == min(record.shape)
            assert stored.rank == len(existing(change, noise_floor(tuned, weights.base)).S)
            assert stored.total == pytest.approx(float(exact.sum()), rel=1e-5)
            assert stored.squares == pytest.approx(float(exact.square().sum()), rel=1e-6)
            back = torch.tensor(stored.values(), dtype=torch.float64)
            assert float(((back - exact).abs() / exact)[exact > 1e-3 * exact[0]].max()) < 1e-3
        exact = torch.linalg.svdvals(weights.base.double())
        back = torch.tensor(spectra.base.values(), dtype=torch.float64)
        assert float(((back - exact).abs() / exact)[exact > exact[8] / 30].max()) < 1.6e-3
        assert spectra.overlap.matrix()[0][0] == pytest.approx(record.angles[0], abs=COSINE_STEP)


@pytest.mark.parametrize("options", [{"quick": True}, {"rank": 5}])
def test_an_analysis_of_leading_directions_holds_those(
    options: dict[str, int], pair: ModelPair
) -> None:
    record = ipm.analyse(pair, **options).records[0]
    assert record.spectra is not None
    assert record.spectra.base is None
    assert record.spectra.mllm.count == (64 if "quick" in options else options["rank"])


def test_a_plan_file_has_no_spectra() -> None:
    plan = ipm.make_plan(ipm.Analysis.load(DEMO / "pack.json.gz"))
    assert all(record.spectra is None for record in plan.records)


def test_a_pack_of_a_model_of_28_layers_is_small() -> None:
    pack = make_pack(28, spectra=True)
    data = json.dumps(pack, separators=(",", ":")).encode()
    assert len(gzip.compress(data)) <= MOST_BYTES
    (first, *_) = ipm.Analysis.from_dict(pack).records
    assert first.spectra is not None
    assert len(first.spectra.mllm.values()) == 3584


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("mllm", "steps", "A*"),
        ("mllm", "steps", "A" * 100),
        ("math", "steps", "zzzzzzzzA"),
        ("base", "steps", "g"),
        ("overlap", "cosines", "A"),
        ("overlap", "rows", 3),
        ("mllm", "steps", 7),
        ("math", "count", "many"),
    ],
)
def test_a_damaged_spectrum_is_refused_when_the_pack_is_read(
    part: str, key: str, value: object, tmp_path: Path
) -> None:
    pack = make_pack(1, hidden=64, feed=96, spectra=True)
    pack["records"][3]["spectra"][part][key] = value
    (tmp_path / "pack.json").write_text(json.dumps(pack))
    with pytest.raises(PlanError, match="is not a pack of this version"):
        ipm.Analysis.load(tmp_path / "pack.json")


@pytest.mark.parametrize("version", [1, 2])
def test_packs_of_earlier_versions_open_without_spectra(version: int) -> None:
    pack = make_pack(2)
    for record in pack["records"]:
        del record["spectra"]
    analysis = ipm.Analysis.from_dict({**pack, "version": version})
    assert all(record.spectra is None for record in analysis.records)
    assert analysis.to_dict()["version"] == VERSION
