"""An analysis holds what float64 truth says of every matrix, and nothing else is ever needed."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model, write_trio
from safetensors.torch import load_file, save_file

import ipmerge_core as ipm
from ipmerge_core.analysis import analyse as analysis_room
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.errors import CheckpointError, PairingError, PlanError, RunError
from ipmerge_core.runtime import devices
from ipmerge_core.spectral import spectrum


@pytest.fixture(scope="module")
def analysis(trio: Trio) -> Analysis:
    return ipm.analyse(ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base))


def task_vectors(trio: Trio, name: str) -> dict[str, torch.Tensor]:
    base = load_file(trio.base / "model.safetensors")[name].double()
    mllm = load_file(trio.mllm / "model.safetensors")["language_model." + name].double()
    experts = [load_file(f / "model.safetensors")[name].double() for f in (trio.math, trio.math_2)]
    return {
        "V": mllm - base,
        "M": experts[0] - base,
        "M2": experts[1] - base,
        "W": mllm,
        "W0": base,
    }


def true_update(V: torch.Tensor, M: torch.Tensor, norm: str) -> torch.Tensor:
    """The definition, in float64: rho dM V diag(gamma^2) V^T."""
    _, S_V, Vh_V = torch.linalg.svd(V, full_matrices=False)
    _, S_M, Vh_M = torch.linalg.svd(M, full_matrices=False)
    gamma = torch.softmax(32 * (Vh_V * Vh_M).sum(1).abs(), 0)
    if norm == "max":
        gamma = gamma / gamma.max()
    return S_V.sum() / S_M.sum() * M @ Vh_V.T @ torch.diag(gamma**2) @ Vh_V


def test_records_come_per_matrix_and_expert_in_order(analysis: Analysis) -> None:
    assert len(analysis.records) == 21 * 2
    keys = [(record.layer, record.module, record.expert) for record in analysis.records]
    assert keys[:3] == [(0, "q", 0), (0, "q", 1), (0, "k", 0)]
    assert len(set(keys)) == len(keys)


def test_every_number_of_a_record_is_the_float64_truth(trio: Trio, analysis: Analysis) -> None:
    for record in analysis.records[::5]:
        dense = task_vectors(trio, record.name)
        V, M = dense["V"], dense["M2" if record.expert else "M"]
        _, S_V, Vh_V = torch.linalg.svd(V, full_matrices=False)
        _, S_M, Vh_M = torch.linalg.svd(M, full_matrices=False)
        s = (Vh_V * Vh_M).sum(1).abs()
        weights = S_V * S_M
        truth = {
            "first": s[0],
            "max": s.max(),
            "weighted": (weights * s).sum() / weights.sum(),
        }
        for kind, value in truth.items():
            assert record.similarity[kind] == pytest.approx(float(value), abs=1e-4)
        assert record.best_index == int(s.argmax()) + 1
        assert record.rho == pytest.approx(float(S_V.sum() / S_M.sum()), rel=1e-4)
        assert record.gap == pytest.approx(float((S_V[0] - S_V[1]) / S_V[0]), rel=1e-3)
        for name, value in {
            "weight_norm2": dense["W"].norm() ** 2,
            "base_norm2": dense["W0"].norm() ** 2,
            "mllm_norm2": V.norm() ** 2,
            "math_norm2": M.norm() ** 2,
            "inner": (V * M).sum(),
            "mllm_nuclear": S_V.sum(),
            "math_nuclear": S_M.sum(),
        }.items():
            assert getattr(record, name) == pytest.approx(float(value), rel=1e-4, abs=1e-7)
        assert record.mllm_sigma[0] == pytest.approx(float(S_V[0]), rel=1e-4)
        assert record.angles[0] == pytest.approx(float(s[0]), abs=1e-4)
        assert record.index == tuple(range(1, len(S_V) + 1))


@pytest.mark.parametrize("norm", ["sum", "max"])
def test_inner_products_of_the_updates_are_the_float64_truth(
    norm: str, trio: Trio, analysis: Analysis
) -> None:
    for first, second in zip(analysis.records[::2], analysis.records[1::2], strict=True):
        dense = task_vectors(trio, first.name)
        P = true_update(dense["V"], dense["M"], norm)
        P2 = true_update(dense["V"], dense["M2"], norm)
        ours, theirs = first.updates[norm], second.updates[norm]
        assert ours.norm2 == pytest.approx(float(P.norm() ** 2), rel=1e-3)
        assert ours.inner == pytest.approx(float((dense["V"] * P).sum()), rel=1e-3, abs=1e-7)
        assert ours.cross == ()
        assert theirs.cross[0] == pytest.approx(float((P * P2).sum()), rel=1e-3, abs=1e-7)


def test_a_pack_survives_the_disk(analysis: Analysis, tmp_path: Path) -> None:
    for name in ("pack.json", "pack.json.gz"):
        analysis.save(tmp_path / name)
        again = Analysis.load(tmp_path / name)
        assert again == analysis
    assert (tmp_path / "pack.json.gz").stat().st_size < (tmp_path / "pack.json").stat().st_size


def test_saving_twice_gives_the_same_bytes(analysis: Analysis, tmp_path: Path) -> None:
    analysis.save(tmp_path / "a.json.gz")
    analysis.save(tmp_path / "b.json.gz")
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "b.json.gz").read_bytes()


def test_a_pack_and_its_models_move_together(trio: Trio, tmp_path: Path) -> None:
    moved = tmp_path / "here"
    write_trio(moved)
    ipm.analyse(ipm.open_pair(moved / "mllm", moved / "math", moved / "base")).save(
        moved / "pack.json.gz"
    )
    content = json.loads(gzip.decompress((moved / "pack.json.gz").read_bytes()))
    assert content["sources"]["mllm"]["id"] == "./mllm"
    moved = moved.rename(tmp_path / "there")
    plan = ipm.make_plan(Analysis.load(moved / "pack.json.gz"))
    assert ipm.merge(plan, tmp_path / "out")["plan"]["hash"] == plan.hash


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x1f\x8bnot gzip", b"nonsense"])
def test_what_is_no_pack_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pack").write_bytes(content)
    with pytest.raises(PlanError, match="is not a pack of this version"):
        Analysis.load(tmp_path / "pack")


def test_a_missing_pack_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Cannot read the pack '.*nowhere'"):
        Analysis.load(tmp_path / "nowhere")


def test_a_second_analysis_reads_no_weights(
    own_trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base)
    first = ipm.analyse(pair, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(type(pair.mllm), "read_matrix", None)
    assert ipm.analyse(pair, cache_dir=tmp_path / "cache") == first


def test_other_weights_are_analysed_anew(own_trio: Trio, tmp_path: Path) -> None:
    def run() -> Analysis:
        pair = ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base)
        return ipm.analyse(pair, cache_dir=tmp_path / "cache")

    first = run()
    save_file(fine_tuned(text_weights(), 11), own_trio.math / "model.safetensors")
    assert run().records != first.records


def test_a_rank_keeps_the_leading_directions(trio: Trio) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    full = ipm.analyse(pair).records[0]
    cut = ipm.analyse(pair, rank=3).records[0]
    assert cut.similarity["first"] == pytest.approx(full.similarity["first"], abs=1e-4)
    assert len(cut.angles) == 3
    assert cut.mllm_nuclear < full.mllm_nuclear
    assert cut.updates["rescale_only"].norm2 < full.updates["rescale_only"].norm2 * 4


def test_a_record_says_how_many_directions_stand_clear_of_rounding(
    tmp_path: Path, trio: Trio
) -> None:
    half = write_trio(tmp_path / "half", dtype=torch.bfloat16)
    coarse, fine = (
        ipm.analyse(ipm.open_pair(models.mllm, models.math, models.base)).records[0]
        for models in (half, trio)
    )
    for record in (coarse, fine):
        for sigma, floor, count in (
            (record.mllm_sigma, record.noise_floor, record.mllm_directions),
            (record.math_sigma, record.math_noise_floor, record.math_directions),
        ):
            assert len(sigma) == min(record.shape)  # every one is sampled
            assert count == sum(value > 4 * floor for value in sigma)
    assert fine.noise_floor < 1e-4 * coarse.noise_floor
    assert fine.mllm_directions == min(fine.shape)


def test_only_directions_that_exist_count_and_all_do_where_told_so(tmp_path: Path) -> None:
    half = write_trio(tmp_path / "half", dtype=torch.bfloat16)
    pair = ipm.open_pair(half.mllm, half.math, half.base)
    found = list(ipm.iter_analysis(pair))
    literal = list(ipm.iter_analysis(pair, Options(directions="all")))
    fewer = 0
    for existing, every in zip(found, literal, strict=True):
        r = min(existing.mllm_directions, existing.math_directions)
        assert all(
            angle == 0 for i, angle in zip(existing.index, existing.angles, strict=True) if i > r
        )
        assert existing.mllm_nuclear <= every.mllm_nuclear
        assert existing.mllm_sigma == every.mllm_sigma
        fewer += existing.mllm_nuclear < every.mllm_nuclear
    assert fewer
    whole = ipm.analyse(pair, directions="all")
    assert list(whole.records) == literal
    assert ipm.make_plan(whole).parameters["directions"] == "all"
    with pytest.raises(PlanError, match="directions is 'some'"):
        Options(directions="some").check()


def test_an_expert_that_is_the_base_is_refused(trio: Trio) -> None:
    with pytest.raises(PairingError, match="equals the base .* its task vector is zero"):
        ipm.analyse(ipm.open_pair(trio.mllm, [trio.math, trio.base], trio.base))


def test_an_mllm_that_is_the_base_is_refused(trio: Trio, tmp_path: Path) -> None:
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    frozen = write_model(tmp_path / "frozen", as_mllm(text_weights()), config)
    with pytest.raises(PairingError, match="its task vector is zero"):
        ipm.analyse(ipm.open_pair(frozen, trio.math, trio.base))


def test_one_frozen_matrix_is_legal_and_similar_to_nothing(own_trio: Trio) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    weights = load_file(own_trio.math / "model.safetensors")
    weights[name] = load_file(own_trio.base / "model.safetensors")[name]
    save_file(weights, own_trio.math / "model.safetensors")
    analysis = ipm.analyse(ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base))
    record = next(record for record in analysis.records if record.name == name)
    assert record.similarity == {"first": 0.0, "max": 0.0, "weighted": 0.0}
    assert record.updates["sum"].norm2 == 0.0
    assert all(math.isfinite(value) for value in record.math_ranks.values())


def test_nan_weights_are_refused_by_name(own_trio: Trio) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    weights = load_file(own_trio.math / "model.safetensors")
    weights[name][0, 0] = float("nan")
    save_file(weights, own_trio.math / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}' of .* holds 1 NaN or infinite"):
        ipm.analyse(ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base))


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("temperature", 0.0)])
def test_impossible_parameters_are_refused(name: str, value: float, trio: Trio) -> None:
    with pytest.raises(PlanError, match=f"The {name} is {value}"):
        ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base), **{name: value})


def test_the_mllm_may_have_its_own_base(trio: Trio, tmp_path: Path) -> None:
    root_weights = fine_tuned(text_weights(), 8)
    root = write_model(tmp_path / "root", root_weights, TEXT_CONFIG)
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    mllm = write_model(tmp_path / "m", as_mllm(fine_tuned(root_weights, 1)), config)
    pair = ipm.open_pair(mllm, trio.math, trio.base, base_mllm=root)
    record = ipm.analyse(pair).records[0]
    expected = fine_tuned(root_weights, 1)[record.name] - root_weights[record.name]
    assert record.mllm_norm2 == pytest.approx(float(expected.double().norm() ** 2), rel=1e-4)


# --- interruptions, previews, and devices that are too small ---


def test_an_interrupted_analysis_goes_on_where_it_was(
    own_trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ipm.open_pair(own_trio.mllm, [own_trio.math, own_trio.math_2], own_trio.base)
    whole = list(ipm.iter_analysis(pair))
    steps = ipm.iter_analysis(pair, journal=tmp_path / "journal")
    first = [next(steps) for _ in range(9)]
    steps.close()
    with (tmp_path / "journal").open("a") as journal:
        journal.write('{"name": "torn')
    read = []
    original = type(pair.mllm).read_matrix
    monkeypatch.setattr(
        type(pair.mllm),
        "read_matrix",
        lambda self, name, **how: read.append(name) or original(self, name, **how),
    )
    again = list(ipm.iter_analysis(pair, journal=tmp_path / "journal"))
    assert again[:9] == first
    assert again == whole
    finished = {record.name for record in first[:8]}  # both experts of four matrices
    assert not finished & set(read)


def test_a_journal_of_other_work_is_not_used(trio: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    cut = Options(rank=2)
    list(ipm.iter_analysis(pair, cut, journal=tmp_path / "journal"))
    fresh = list(ipm.iter_analysis(pair, journal=tmp_path / "journal"))
    assert fresh == list(ipm.iter_analysis(pair))


def test_a_finished_analysis_leaves_only_the_pack(own_trio: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(own_trio.mllm, own_trio.math, own_trio.base)
    ipm.analyse(pair, cache_dir=tmp_path / "cache")
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.endswith(".json.gz")


def test_a_quick_analysis_says_so_and_finds_the_leading_directions(trio: Trio) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    exact, quick = ipm.analyse(pair), ipm.analyse(pair, quick=True, rank=4)
    assert quick.approximate
    assert not exact.approximate
    for truth, guess in zip(exact.records, quick.records, strict=True):
        assert guess.similarity["first"] == pytest.approx(truth.similarity["first"], abs=1e-3)
        assert guess.mllm_sigma[0] == pytest.approx(truth.mllm_sigma[0], rel=1e-3)


def test_a_device_that_is_too_small_hands_the_matrix_to_the_cpu(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    expected = ipm.analyse(pair)
    original, calls = spectrum.svd, []

    def small(matrix: torch.Tensor, **options: object) -> spectrum.Spectrum:
        calls.append(tuple(matrix.shape))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room")
        return original(matrix, **options)

    monkeypatch.setattr(spectrum, "svd", small)
    with pytest.warns(
        UserWarning, match="does not fit into the memory of cpu; falling back to the CPU"
    ):
        found = ipm.analyse(pair)
    assert found.records == expected.records


def test_records_do_not_depend_on_how_many_matrices_run_at_once(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base)
    one = list(ipm.iter_analysis(pair))
    monkeypatch.setattr(analysis_room, "_workers", lambda *_: 3)
    assert list(ipm.iter_analysis(pair)) == one


@pytest.mark.parametrize(("free", "workers"), [(10**9, 3), (25 * 10**6, 2), (10**6, 0)])
def test_a_gpu_runs_as_many_matrices_at_once_as_its_memory_holds(
    free: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1000, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2000)
    monkeypatch.setattr(devices, "_load_solvers", lambda device: None)
    if workers:
        assert analysis_room._workers("cuda", working_set=10**7) == workers
    else:
        with pytest.warns(UserWarning, match="falling back to the CPU"):
            assert analysis_room._workers("cuda", working_set=10**7) == 0
    assert analysis_room._workers("cpu", working_set=10**7) == 1


def test_a_matrix_too_large_for_the_machine_is_refused_with_numbers(trio: Trio) -> None:
    with pytest.raises(RunError, match=r"needs about 1000000\.0 GB of memory and .* GB are free"):
        analysis_room._workers("cpu", working_set=10**15)


def test_principal_cosines_do_not_depend_on_the_order_of_directions(analysis: Analysis) -> None:
    record = analysis.records[0]
    assert record.principal["1"] == pytest.approx(record.similarity["first"], abs=1e-5)
    assert set(record.principal) == {"1", "4", "16"}
    assert record.principal["16"] == pytest.approx(1.0, abs=1e-4)  # both span the whole space
