"""Loading in the precision that fits: sizes before loading, progress, eviction, refusals."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ipmerge_core.errors import ModelLoadError, PlanError, RunCancelled
from ipmerge_core.inference import loading, memory, placement
from ipmerge_core.inference.generation import answer
from ipmerge_core.inference.loading import ModelCache, load_model
from ipmerge_core.models.checkpoint import Checkpoint

DEMO = Path(__file__).parents[1] / "assets" / "demo"


@pytest.fixture(scope="module")
def mllm() -> Checkpoint:
    return Checkpoint.open(DEMO / "mllm")


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(memory, "free_on", lambda _: nbytes)


def test_the_sizes_follow_from_the_headers(mllm: Checkpoint) -> None:
    sizes = {each.precision: each.nbytes for each in memory.loading_options(mllm, "cpu")}
    assert sizes["stored"] == mllm.nbytes
    assert sizes["bf16"] == sizes["fp16"] == mllm.nbytes // 2  # it is stored in fp32
    assert sizes["4bit"] < sizes["8bit"] < sizes["bf16"]


def test_auto_takes_the_most_exact_that_fits(
    mllm: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_SMALL", 0)  # as for a large model: room for a conversation
    monkeypatch.setattr(memory, "why_not_quantised", lambda _: "")
    found = []
    for share in (1.2, 1.1, 0.6, 0.5, 0.4, 0.3, 0.22):
        free(monkeypatch, int(share * mllm.nbytes))
        found.append(memory.choose_precision(mllm, "cpu"))
    assert found == ["stored", "bf16", "bf16", "8bit", "8bit", "4bit", "4bit"]
    free(monkeypatch, mllm.nbytes // 100)
    with pytest.raises(ModelLoadError, match=r"needs .* GB as stored, .* 0.0 GB are free on cpu"):
        memory.choose_precision(mllm, "cpu")


def test_a_model_that_does_not_fit_is_refused_with_a_choice(
    mllm: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, int(0.6 * mllm.nbytes))
    with pytest.raises(ModelLoadError, match=r"Load it as bf16\.$"):
        load_model(DEMO / "mllm", precision="stored")
    free(monkeypatch, 1000)
    with pytest.raises(ModelLoadError, match="8 and 4 bit are not available: .* bitsandbytes"):
        load_model(DEMO / "mllm")


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_quantised_loading_without_its_library_says_so(precision: Any) -> None:
    with pytest.raises(ModelLoadError, match=f"as {precision}: it requires the library bitsand"):
        load_model(DEMO / "mllm", precision=precision)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(PlanError, match="precision is '3bit'; expected one of auto, stored"):
        load_model(DEMO / "mllm", precision="3bit")  # type: ignore[arg-type]


def test_half_precision_answers() -> None:
    loaded = load_model(DEMO / "mllm", precision="bf16")
    assert loaded.model.dtype == torch.bfloat16
    assert answer(loaded, "What shape is this?", max_new_tokens=4)


def test_quantised_weights_are_placed_by_transformers(
    mllm: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the library: what `from_pretrained` is given."""
    monkeypatch.setattr(memory, "why_not_quantised", lambda _: "")
    monkeypatch.setattr(placement, "_quantisation", lambda precision: f"config of {precision}")
    place = placement.placement(mllm, "cpu", "4bit")
    assert place.options() == {
        "dtype": torch.bfloat16, "device_map": {"": "cpu"}, "quantization_config": "config of 4bit"
    }  # fmt: skip
    assert placement.placement(mllm, "cpu", "auto").options() == {"dtype": "auto"}


def test_a_model_larger_than_one_gpu_is_spread(
    mllm: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    free(monkeypatch, int(0.8 * mllm.nbytes))
    monkeypatch.setattr(placement, "free_on", lambda _: int(0.8 * mllm.nbytes))
    assert placement.placement(mllm, "cuda", "auto").device_map == "auto"
    with pytest.raises(ModelLoadError):
        placement.placement(mllm, "cuda:0", "stored")


def test_progress_rises_to_one_and_can_be_stopped() -> None:
    shares: list[float] = []
    load_model(DEMO / "mllm", progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    stop = threading.Event()

    def halfway(share: float) -> None:
        if share > 0.5:
            stop.set()

    with pytest.raises(RunCancelled):
        load_model(DEMO / "mllm", stops=[stop], progress=halfway)


def test_out_of_memory_while_loading_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(loading, "_refuse_size", full)
    with pytest.raises(ModelLoadError, match="too little memory to load .* lower precision"):
        load_model(DEMO / "mllm")


def test_models_make_room_for_one_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ModelCache(most_models=3)
    first = cache.get(DEMO / "mllm")
    copy = Path(shutil.copytree(DEMO / "mllm", tmp_path / "copy"))
    assert len(cache.loaded()) == 1
    cache.get(copy)
    assert len(cache.loaded()) == 2
    sizes = iter([1000, 1000, *[10**12] * 9])  # too little until both are released
    monkeypatch.setattr(memory, "free_on", lambda _: next(sizes))
    third = cache.get(DEMO / "math")
    assert cache.loaded() == (third,)
    assert first is not cache.get(DEMO / "mllm")
