"""Knocking out a module: what is replaced, in which tensors, and that nothing else changes."""

from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, Trio
from family_layouts import FAMILIES, build

from ipmerge_core.errors import PlanError
from ipmerge_core.evaluation.cuts import (
    ATTENTION,
    BLOCKS,
    MLP,
    OF_A_PAIR,
    VALUES,
    Cut,
    cut_tensors,
    list_cuts,
    matrices_of_model,
    matrices_of_pair,
    place_of,
    strided,
)
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.pairing import open_pair

CASES = [(name, layout) for name, family in FAMILIES.items() for layout in family.layouts]


@pytest.fixture(scope="module")
def pair(trio: Trio):
    return open_pair(trio.mllm, trio.math, trio.base)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    @cache
    def written(name: str) -> dict[str, Path]:
        return build(FAMILIES[name], tmp_path_factory.mktemp("family"))

    return written


# --- which matrices ---


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_folder_alone_has_the_matrices_that_its_pair_has(name, layout, folders):
    found = folders(name)
    pair = open_pair(found[layout], found["math"], found["base"])
    known = {(m.layer, m.module, m.address) for m in matrices_of_pair(pair)}
    alone = {
        (m.layer, m.module, m.address) for m in matrices_of_model(Checkpoint.open(found[layout]))
    }
    assert alone == known
    blocks = {cut.module for cut in list_cuts(matrices_of_pair(pair))}
    assert blocks == {ATTENTION, MLP}


@pytest.mark.parametrize(("name", "layout"), CASES)
@pytest.mark.parametrize("value", VALUES)
def test_a_cut_replaces_its_matrices_in_every_family_and_nothing_else(name, layout, value, folders):
    found = folders(name)
    pair = open_pair(found[layout], found["math"], found["base"])
    matrices = matrices_of_pair(pair)
    merged = {
        n: torch.full_like(pair.mllm.read(n), 3.0)
        for n in {m.address.partition("[")[0] for m in matrices}
    }
    for module in BLOCKS:
        cut = Cut(1, module, value)
        tensors = dict(cut_tensors(cut, matrices, pair.mllm, pair=pair, merged=merged))
        covered = [m for m in matrices if cut.covers(m)]
        assert tensors.keys() == {m.address.partition("[")[0] for m in covered}
        for matrix in matrices:
            stored = matrix.address.partition("[")[0]
            if stored not in tensors:
                continue
            now = place_of(tensors[stored], matrix.address, pair.mllm)
            if not cut.covers(matrix):
                assert torch.equal(now, torch.full_like(now, 3.0))
                continue
            expected = {
                "constant": torch.full_like(now, 1 / now.shape[0]),
                "zero": torch.zeros_like(now),
                "base": pair.base.read_matrix(matrix.base),
                "math": pair.math[0].read_matrix(matrix.math),
                "update": pair.mllm.read_matrix(matrix.address),
            }[value]
            assert torch.equal(now, expected)


def test_the_constant_is_one_over_the_number_of_output_features(pair):
    tensors = dict(cut_tensors(Cut(0, MLP), matrices_of_pair(pair), pair.mllm))
    rows = {name.split(".")[-2]: float(t[0, 0]) for name, t in tensors.items()}
    assert rows == pytest.approx({"gate_proj": 1 / 24, "up_proj": 1 / 24, "down_proj": 1 / 16})
    assert all(len(tensor.unique()) == 1 for tensor in tensors.values())


def test_a_cut_leaves_the_merged_tensors_as_they_were(pair):
    matrices = matrices_of_pair(pair)
    name = matrices[0].address
    merged = {name: pair.mllm.read(name) + 1}
    before = merged[name].clone()
    tensors = dict(cut_tensors(Cut(0, "q", "zero"), matrices, pair.mllm, merged=merged))
    assert list(tensors) == [name]
    assert torch.equal(merged[name], before)


# --- which cuts ---


def test_cuts_are_listed_by_layer_and_can_be_restricted(pair):
    matrices = matrices_of_pair(pair)
    assert list_cuts(matrices) == [Cut(n, m) for n in range(LAYERS) for m in BLOCKS]
    assert list_cuts(matrices, "zero", layers=[2, 0], modules=["q", "down"]) == [
        Cut(n, m, "zero") for n in (0, 2) for m in ("q", "down")
    ]
    assert len({cut.key for cut in list_cuts(matrices)}) == 2 * LAYERS
    assert strided(range(8), 2) == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [LAYERS]}, f"no layer {LAYERS}"),
        ({"layers": [-1]}, "no layer -1"),
        ({"modules": ["attn"]}, "no chosen layer has the module 'attn'|No chosen layer"),
        ({"modules": []}, "No chosen layer"),
    ],
)
def test_what_the_model_does_not_have_is_refused(pair, options, message):
    with pytest.raises(PlanError, match=message):
        list_cuts(matrices_of_pair(pair), **options)


def test_a_stride_below_one_is_refused():
    with pytest.raises(PlanError, match="stride is 0"):
        strided(range(4), 0)


@pytest.mark.parametrize("value", OF_A_PAIR)
def test_weights_of_other_models_require_the_models_of_a_merge(trio, value):
    model = Checkpoint.open(trio.mllm)
    with pytest.raises(PlanError, match="requires the models of a merge"):
        next(cut_tensors(Cut(0, MLP, value), matrices_of_model(model), model))
