"""Caches notice a change of everything that their content was made of."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, text_weights, write_model

import ipmerge_core as ipm
from ipmerge_core.errors import PairingError, PlanError
from ipmerge_core.inference import loading
from ipmerge_core.methods import METHODS
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.planning.plan import MergePlan, reopen
from ipmerge_core.runtime.atomic import version_of
from ipmerge_core.ui.backend import Backend

DEMO = Path(__file__).parents[1] / "assets" / "demo"


def opened(trio: Trio) -> ipm.ModelPair:
    return ipm.open_pair(trio.mllm, trio.math, trio.base)


# --- weights -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with matrices of half a megabyte, in bf16."""
    weights = {**text_weights(), "model.layers.0.mlp.up_proj.weight": torch.randn(512, 512)}
    return write_model(
        tmp_path_factory.mktemp("wide") / "model", weights, TEXT_CONFIG, dtype=torch.bfloat16
    )


@pytest.mark.parametrize("part", range(8))
def test_a_rewritten_eighth_of_a_matrix_changes_its_content(
    part: int, wide: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(wide, copy)
    before = Checkpoint.open(copy)
    assert before.content == Checkpoint.open(wide).content  # of a copy it is the same
    spec = before.spec("model.layers.0.mlp.up_proj.weight")
    eighth = spec.nbytes // 8
    with (copy / spec.shard).open("r+b") as file:
        file.seek(spec.start + part * eighth)
        old = file.read(eighth)
        file.seek(spec.start + part * eighth)
        file.write(bytes(byte ^ 1 for byte in old))
    assert Checkpoint.open(copy).content != before.content


@pytest.mark.parametrize("made_of", ["analysis", "pair"])
def test_a_rewritten_row_is_found_before_it_is_merged(
    made_of: str, own_trio: Trio, tmp_path: Path
) -> None:
    pair = opened(own_trio)
    plan = ipm.make_plan(ipm.analyse(pair) if made_of == "analysis" else pair, "task_arithmetic")
    plan.save(tmp_path / "plan.json")
    spec = pair.math[0].spec("model.layers.1.mlp.up_proj.weight")
    path = own_trio.math / spec.shard
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(spec.start + spec.nbytes // 4)
        file.write(b"\x00" * 64)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(PairingError, match="have changed since the plan was made"):
        ipm.merge(MergePlan.load(tmp_path / "plan.json"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert ipm.make_plan(opened(own_trio), "task_arithmetic").digest != plan.digest


def test_plans_without_contents_open_and_keep_their_digest(trio: Trio, tmp_path: Path) -> None:
    plan = ipm.make_plan(opened(trio), "ties")
    sources = plan.sources._each(lambda source: replace(source, content=None))
    older = replace(plan, sources=sources)
    content = older.to_dict()
    for source in (content["sources"]["mllm"], content["sources"]["base"]):
        del source["content"]
    del content["sources"]["math"][0]["content"], content["method_version"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    again = MergePlan.load(tmp_path / "plan.json")
    assert again.digest == older.digest != plan.digest
    reopen(again)


# --- analyses ----------------------------------------------------------------------------------


def test_a_cached_analysis_of_a_copy_has_the_paths_of_the_copy(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ipm.analyse(opened(trio), cache_dir=tmp_path / "cache")
    names = ("base", "mllm", "math", "math_2")
    copy = Trio(*(tmp_path / f"{name}-copied" for name in names))
    for source, target in zip(trio, copy, strict=True):
        shutil.copytree(source, target)
    monkeypatch.setattr("ipmerge_core.analysis.analyse.iter_pack_of", None)  # found, not made
    again = ipm.analyse(opened(copy), cache_dir=tmp_path / "cache")
    assert again.records == first.records
    assert again.name == "mllm-copied + math-copied"
    assert [Path(source.id) for source in again.sources.all()] == [copy.mllm, copy.base, copy.math]
    shutil.rmtree(tmp_path / "mllm-copied")
    assert Path(first.sources.mllm.id) == trio.mllm


@pytest.mark.parametrize(
    "options", [{"temperature": 8.0}, {"rank": 4}, {"quick": True}, {"directions": "all"}]
)
def test_a_cached_analysis_has_its_own_options(
    options: dict[str, Any], trio: Trio, tmp_path: Path
) -> None:
    ipm.analyse(opened(trio), cache_dir=tmp_path)
    found = ipm.analyse(opened(trio), cache_dir=tmp_path, **options)
    assert found.parameters == {**ipm.analyse(opened(trio)).parameters, **options}


# --- models in memory, previews and finished merges ----------------------------------------------

EDITS = {
    "config.json": lambda text: text.replace("{", '{"added": 1, ', 1),
    "chat_template.jinja": lambda text: text + " ",
    "tokenizer_config.json": lambda text: text.replace("{", '{"added": 1, ', 1),
    "a_new_file.txt": lambda text: "new",
}


def edit(folder: Path, name: str) -> None:
    path = folder / name
    text = path.read_text("utf-8") if path.exists() else ""
    path.write_text(EDITS[name](text), "utf-8")


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the demo's models."""
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    for name in ("mllm", "math", "base"):
        shutil.copytree(DEMO / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", EDITS)
def test_a_loaded_model_is_loaded_again_after_a_change(
    name: str, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda folder, device, stops, **_: object())
    cache = loading.ModelCache()
    first = cache.get(demo / "mllm")
    assert cache.get(demo / "mllm") is first
    edit(demo / "mllm", name)
    assert cache.get(demo / "mllm") is not first


@pytest.mark.parametrize("name", EDITS)
def test_a_preview_is_merged_again_after_a_change(name: str, demo: Path) -> None:
    backend = Backend()
    plan = ipm.make_plan(
        ipm.open_pair(demo / "mllm", demo / "math", demo / "base"), "task_arithmetic"
    )
    folder = backend.merged_folder(plan, lambda _: None)
    before = version_of(folder / "ipmerge.json")
    assert backend.merged_folder(plan, lambda _: None) == folder
    assert version_of(folder / "ipmerge.json") == before
    edit(demo / "mllm", name)
    folder = backend.merged_folder(plan, lambda _: None)
    assert version_of(folder / "ipmerge.json") != before
    assert (folder / name).read_bytes() == (demo / "mllm" / name).read_bytes()


@pytest.mark.parametrize("name", EDITS)
def test_a_finished_merge_of_other_files_is_not_the_merge_of_a_plan(
    name: str, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend()
    plan = ipm.make_plan(
        ipm.open_pair(demo / "mllm", demo / "math", demo / "base"), "task_arithmetic"
    )
    ipm.merge(plan, demo / "merged")
    finished = [type("Status", (), {"arguments": {"out": str(demo / "merged")}})()]
    finished[0].state = "finished"
    monkeypatch.setattr(backend.store, "all", lambda: finished)
    assert backend.finished_merge(plan) == demo / "merged"
    edit(demo / "mllm", name)
    assert backend.finished_merge(plan) is None


# --- the mathematics of a method -----------------------------------------------------------------


DATA_FREE = [method.name for method in METHODS.values() if method.data is None]


@pytest.mark.parametrize("name", DATA_FREE)
def test_another_version_of_a_method_is_another_plan(
    name: str, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = opened(trio)
    if METHODS[name].needs_analysis:
        source = ipm.Analysis.load(DEMO / "pack.json.gz")
    plan = ipm.make_plan(source, name)
    plan.save(tmp_path / "plan.json")
    newer = replace(METHODS[name], version=METHODS[name].version + 1)
    monkeypatch.setitem(METHODS, name, newer)
    assert ipm.make_plan(source, name).digest != plan.digest
    with pytest.raises(PlanError, match=f"version {newer.version - 1} of .* Create it again"):
        MergePlan.load(tmp_path / "plan.json")
