"""What runs on a GPU finds what the CPU finds, and twice the same. Needs a CUDA device.

Decompositions, analyses, merges of every method, adapters, calibration and answers; the figures are
printed by `benchmarks/bench_gpu.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trio
from numeric_cases import MOST_FLIPPED, compare, measure, models, sample, tolerance_of
from numeric_cases import merged as merged_matrix
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.adapters.export import export_adapter
from ipmerge_core.calibration.calibrate import calibrate
from ipmerge_core.calibration.passes import CalibrationSettings
from ipmerge_core.calibration.samples import load_samples
from ipmerge_core.inference.generation import answer
from ipmerge_core.inference.loading import load_model
from ipmerge_core.methods import METHODS
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.runtime import devices
from ipmerge_core.spectral.spectrum import svd
from ipmerge_core.tasks.demo import problems
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.merge.tab import readiness
from ipmerge_core.ui.plan_choice import PlanChoice, plan_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEMO = Path(__file__).parents[1] / "assets" / "demo"
DATA_FREE = [name for name, method in METHODS.items() if method.data is None]


@pytest.fixture
def pair(trio: Trio) -> ModelPair:
    return ipm.open_pair(trio.mllm, trio.math, trio.base)


@pytest.fixture(scope="module")
def demo() -> ModelPair:
    return ipm.open_pair(DEMO / "mllm", DEMO / "math", DEMO / "base")


def merged(plan: ipm.MergePlan, out: Path, device: str) -> dict[str, torch.Tensor]:
    ipm.merge(plan, out, device=device)
    return load_file(out / "model.safetensors")


def assert_close(a: dict[str, Any], b: dict[str, Any], atol: float) -> None:
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert torch.allclose(weight, b[name], rtol=0, atol=atol), name


# --- decompositions ---


@pytest.mark.parametrize("method", ["exact", "gram", "randomized"])
@pytest.mark.parametrize("shape", [(40, 24), (1000, 900), (900, 2000)])
def test_a_spectrum_is_the_one_of_the_cpu(method: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, 8, generator=generator) for size in shape)
    strengths = torch.linspace(8, 2, 8)  # apart, so that directions are determined
    A = (left * strengths) @ right.T + torch.randn(*shape, generator=generator)
    rank = 6 if method == "randomized" else None
    on_cpu, on_gpu = (svd(A.to(device), method=method, rank=rank) for device in ("cpu", "cuda"))
    assert on_gpu.S.device.type == "cuda"
    assert torch.allclose(on_gpu.S.cpu(), on_cpu.S, rtol=1e-4, atol=1e-4 * float(on_cpu.S[0]))
    cosines = (on_gpu.Vh[:6].cpu() * on_cpu.Vh[:6]).sum(1)  # the sign is fixed, too
    assert torch.allclose(cosines, torch.ones(6), atol=1e-4)


def test_an_analysis_finds_the_same_numbers(demo: ModelPair) -> None:
    on_cpu, on_gpu = (ipm.analyse(demo, device=device) for device in ("cpu", "cuda"))
    for a, b in zip(on_cpu.records, on_gpu.records, strict=True):
        assert (a.name, a.expert) == (b.name, b.expert)
        assert a.similarity == pytest.approx(b.similarity, abs=1e-4)
        for number in ("rho", "mllm_nuclear", "math_nuclear", "inner"):
            assert getattr(a, number) == pytest.approx(getattr(b, number), rel=1e-4), number
        for kind, norms in a.updates.items():
            assert norms.norm2 == pytest.approx(b.updates[kind].norm2, rel=1e-3)


def test_an_analysis_does_not_depend_on_the_number_of_streams(
    demo: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = ipm.analyse(demo, device="cuda").records
    monkeypatch.setattr(devices, "STREAMS", 1)
    assert ipm.analyse(demo, device="cuda").records == several


def test_a_fresh_process_may_begin_with_several_streams() -> None:
    code = (
        f"import ipmerge_core as ipm, pathlib; demo = pathlib.Path({str(DEMO)!r});"
        "pair = ipm.open_pair(demo / 'mllm', demo / 'math', demo / 'base');"
        "print(len(ipm.analyse(pair, device='cuda').records))"
    )
    root = str(Path(__file__).parents[1])
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["28"]


def test_one_analysis_after_the_other_takes_no_more_memory(demo: ModelPair) -> None:
    ipm.analyse(demo, device="cuda")
    held = torch.cuda.memory_reserved()
    for _ in range(3):
        ipm.analyse(demo, device="cuda")
    assert torch.cuda.memory_reserved() <= 1.5 * held  # which blocks are cut for whom varies


# --- merges ---


@pytest.mark.parametrize("name", METHODS)
def test_a_method_computes_what_its_definition_says_and_what_the_cpu_computes(name: str) -> None:
    cases = sample(6, [(256, 256), (688, 256), (256, 512)], list(METHODS).index(name))
    found = {case: measure(name, case, "cuda") for case in cases}
    assert any(found.values())
    for case, finding in found.items():
        if finding is None:
            continue
        assert finding.excess <= tolerance_of(name), (case, finding)
        assert finding.flipped <= MOST_FLIPPED, (case, finding)
        stored = models(case)
        on_cpu, on_gpu = (merged_matrix(name, stored.to(d)).cpu() for d in ("cpu", "cuda"))
        apart = compare(name, stored, on_gpu, on_cpu.double())
        assert apart.excess <= 2 * tolerance_of(name), (case, apart)
        assert apart.flipped <= 2 * MOST_FLIPPED, (case, apart)


@pytest.mark.parametrize("method", DATA_FREE)
def test_a_merge_is_nearly_the_one_of_the_cpu(method: str, pair: ModelPair, tmp_path: Path) -> None:
    plan = (
        ipm.make_plan(ipm.analyse(pair), similarity_threshold=0.0)
        if method == "ip_merging"
        else ipm.make_plan(pair, method)
    )
    on_cpu, on_gpu = (merged(plan, tmp_path / device, device) for device in ("cpu", "cuda"))
    assert_close(on_cpu, on_gpu, 2e-3 if method == "wudi" else 1e-4)  # WUDI walks many steps
    assert_close(on_gpu, merged(plan, tmp_path / "again", "cuda"), 0.0)
    manifest = json.loads((tmp_path / "cuda" / "ipmerge.json").read_text())
    assert manifest["device"].startswith("cuda")


def test_a_threshold_of_the_whole_model_is_found_there_too(pair: ModelPair, tmp_path: Path) -> None:
    plan = ipm.make_plan(pair, "ties", scope="model", density=0.3)
    made = [merged(plan, tmp_path / device, device) for device in ("cpu", "cuda")]
    assert_close(*made, 1e-4)


def test_an_adapter_holds_the_same_change(demo: ModelPair, tmp_path: Path) -> None:
    plan = ipm.make_plan(ipm.analyse(demo), similarity_threshold=0.0)
    changes = []
    for device in ("cpu", "cuda"):
        export_adapter(plan, tmp_path / device, device=device)
        factors = load_file(tmp_path / device / "adapter_model.safetensors")
        down = {name: weight for name, weight in factors.items() if "lora_A" in name}
        changes.append({n: factors[n.replace("lora_A", "lora_B")] @ w for n, w in down.items()})
    assert_close(*changes, 1e-4)


# --- runs of the app ---


def test_a_merge_of_the_app_runs_on_the_gpu_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path))
    backend = Backend()
    plan = plan_of("pack", PlanChoice())
    assert devices.resolve_device() == devices.resolve_device("cuda") == "cuda"
    found = readiness(backend, "pack", PlanChoice())
    assert "on the GPU (cuda), estimated" in found.confirmation
    assert torch.cuda.get_device_name() in found.confirmation
    for device in ("auto", "cpu"):
        run = backend.start_merge(plan, f"on-{device}", device=device)
        while backend.store.status(run.id).is_running:
            time.sleep(0.1)
        status = backend.store.status(run.id)
        assert status.state == "finished", status.error
        manifest = json.loads((Path(status.arguments["out"]) / "ipmerge.json").read_text())
        assert manifest["device"] == status.arguments["device"]
        assert manifest["device"] == {"auto": "cuda", "cpu": "cpu"}[device]
    preview = backend.merged_folder(plan_of("pack", PlanChoice(0.1)), lambda _: None)
    assert json.loads((preview / "ipmerge.json").read_text())["device"] == "cuda"


# --- models that run ---


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_a_calibration_measures_the_same(kind: str, demo: ModelPair, tmp_path: Path) -> None:
    samples = tuple(load_samples("demo", 3, takes_images=images) for images in (True, False))
    settings = (
        CalibrationSettings(kind)
        if kind == "gram"
        else CalibrationSettings(kind, estimator="empirical")
    )
    name = demo.matrices[0].name
    found = []
    for device in ("cpu", "cuda"):
        measured = calibrate(demo, tmp_path / device, settings, *samples, device=device)
        found.append(measured.inputs(name, [0])[f"mllm_{kind}"])
    assert torch.allclose(*found, rtol=1e-2, atol=1e-3 * float(found[0].max()))
    plan = ipm.make_plan(
        demo, "regmean" if kind == "gram" else "fisher", calibration=tmp_path / "cuda"
    )
    made = [merged(plan, tmp_path / f"merged-{device}", device) for device in ("cpu", "cuda")]
    assert_close(*made, 1e-2)


def test_a_model_answers_as_on_the_cpu() -> None:
    asked = problems("sides", 4, seed=5)
    answers = []
    for device in ("cpu", "cuda"):
        loaded = load_model(DEMO / "mllm", device)
        answers.append([answer(loaded, problem.question, problem.image) for problem in asked])
    assert answers[0] == answers[1]
