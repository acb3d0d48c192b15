"""A merge in memory gives the bytes that a merge writes, for every method, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trio, write_trio
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core.errors import PairingError, RunCancelled
from ipmerge_core.merging.in_memory import changed_tensors, in_memory_cost, iter_merged_tensors
from ipmerge_core.methods import METHODS
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.planning.plan import MergePlan

WITHOUT_DATA = sorted(name for name, method in METHODS.items() if method.data is None)
OPTIONS: dict[str, dict[str, Any]] = {"wudi": {"iterations": 5}, "layer_swap": {}}


def plan_of(trio: Trio, method: str, **settings: Any) -> MergePlan:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    source = ipm.analyse(pair) if METHODS[method].needs_analysis else pair
    own = {"similarity_threshold": 0.0} if METHODS[method].needs_analysis else {}
    return ipm.make_plan(source, method=method, **{**own, **OPTIONS.get(method, {}), **settings})


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(a.view(torch.uint8).equal(b.view(torch.uint8)))
    )


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_every_method_gives_the_bytes_of_its_folder(method: str, tmp_path: Path) -> None:
    trio = write_trio(tmp_path / "models", dtype=torch.bfloat16)
    plan = plan_of(trio, method)
    ipm.merge(plan, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    steps = list(iter_merged_tensors(plan))
    found = {step.name: step.tensor for step in steps if step.tensor is not None}
    assert found
    assert all(same_bits(value, written[name]) for name, value in found.items())
    rest = set(written) - set(found)
    kept = load_file(trio.mllm / "model.safetensors")
    assert all(same_bits(written[name], kept[name]) for name in rest)
    cost = in_memory_cost(plan)
    assert cost.nbytes == sum(value.nbytes for value in found.values())
    assert (cost.tensors, steps[-1].number) == (len(found), len(found))
    assert steps[-1].nbytes_done == steps[-1].nbytes_total


@pytest.mark.parametrize("options", [{"norms": "merge"}, {"include": "layers.0"}])
def test_extras_and_a_scope_are_as_in_the_folder(options: dict[str, Any], tmp_path: Path) -> None:
    trio = write_trio(tmp_path / "models", shards=2)
    plan = plan_of(trio, "task_arithmetic", **options)
    ipm.merge(plan, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    for step in iter_merged_tensors(plan):
        assert step.tensor is not None
        assert same_bits(step.tensor, written.read(step.name))
    changed = changed_tensors(tmp_path / "out", Checkpoint.open(trio.mllm))
    names = {step.name for step in changed if step.tensor is not None}
    assert names <= {step.name for step in iter_merged_tensors(plan)}


def test_it_stops_and_refuses_as_a_merge_does(own_trio: Trio) -> None:
    plan, stop = plan_of(own_trio, "linear"), threading.Event()
    steps = iter_merged_tensors(plan, stops=[stop])
    next(steps)
    stop.set()
    with pytest.raises(RunCancelled):
        next(steps)
    path = own_trio.math / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(PairingError, match="have changed since the plan was made"):
        next(iter_merged_tensors(plan))
