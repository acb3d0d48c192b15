"""Interrupted merges: killed at any moment, a merge resumes to the same bytes and leaks nothing."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model, write_trio

import ipmerge_core as ipm
from ipmerge_core.errors import CheckpointError, IPMergeError, RunError
from ipmerge_core.merging.merge import iter_merge
from ipmerge_core.merging.parts import rows_of
from ipmerge_core.models import writer as writing
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.files import Pace
from ipmerge_core.models.pairing import MatrixMatch
from ipmerge_core.planning.plan import MergePlan


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, whose times differ from run to run."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "ipmerge.json"
    }


def arithmetic(trio: Trio, **parameters: float) -> MergePlan:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    return ipm.make_plan(pair, method="task_arithmetic", **parameters)


def in_pieces(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Let files on disk be read in small pieces."""
    monkeypatch.setattr("ipmerge_core.models.pairing.FROM_DISK", Pace(nbytes, 1 << 26, 1))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return write_trio(tmp_path_factory.mktemp("sharded"), dtype=torch.bfloat16, shards=3)


@pytest.fixture(scope="module")
def whole(sharded: Trio, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an uninterrupted merge."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ipm.merge(arithmetic(sharded), out)
    return files_of(out)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_end_in_the_same_bytes(
    sharded: Trio, whole: dict[str, bytes], tmp_path: Path
) -> None:
    plan, out = arithmetic(sharded), tmp_path / "out"
    chance = random.Random(3)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["ipmerge_core.merging.merge"])
    kills = 0
    while kills < 50:
        child = processes.Process(target=ipm.merge, args=(plan, out))
        child.start()
        began = time.monotonic()
        while not place_left(out) and child.is_alive() and time.monotonic() - began < 60:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.05))
        kills += child.is_alive()
        child.kill()
        child.join()
        if out.exists():  # it got to the end, or was killed right behind it
            list(iter_merge(plan, out)) if place_left(out) else None
            assert files_of(out) == whole
            shutil.rmtree(out)
        else:
            with pytest.raises(IPMergeError):
                Checkpoint.open(writing.run_folders(out).model)
    ipm.merge(plan, out)
    assert files_of(out) == whole
    assert not place_left(out)


def place_left(out: Path) -> bool:
    return writing.run_folders(out).run.exists()


class Killed(BaseException):
    """Stands for the end of the process: no handler of the package knows it."""


@pytest.mark.parametrize("moment", [*range(1, 60, 6), *range(60, 90)])
def test_an_end_before_any_change_on_disk_can_be_resumed(
    moment: int, sharded: Trio, whole: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The n-th call that changes the disk never happens, nor anything after it."""
    plan, out = arithmetic(sharded), tmp_path / "out"
    calls = 0

    def dying(real: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls >= moment:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", dying(os.pwrite))
        patch.setattr(os, "truncate", dying(os.truncate))
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        patch.setattr(Path, "rmdir", dying(Path.rmdir))
        with contextlib.suppress(Killed):
            ipm.merge(plan, out)
    list(iter_merge(plan, out)) if place_left(out) or not out.exists() else None
    assert files_of(out) == whole
    assert not place_left(out)


@pytest.mark.parametrize("stop", ["rename a shard", "tidy up"])
def test_an_end_during_the_last_renames_can_be_resumed(
    stop: str, sharded: Trio, whole: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plan, out = arithmetic(sharded), tmp_path / "out"
    renamed = []
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        renamed.append(self.name)
        if stop == "rename a shard" and len([n for n in renamed if "safetensors" in n]) == 2:
            raise Killed
        return replace(self, target)

    def no_tidying(_: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        patch.setattr(writing, "_remove", no_tidying)
        with pytest.raises(Killed):
            ipm.merge(plan, out)
    assert out.exists() == (stop == "tidy up")
    steps = list(iter_merge(plan, out))
    assert steps[-1].nbytes_done == steps[-1].nbytes_total
    assert files_of(out) == whole
    assert not place_left(out)


def test_ctrl_c_leaves_finished_work(
    sharded: Trio, whole: dict[str, bytes], tmp_path: Path
) -> None:
    plan, out = arithmetic(sharded), tmp_path / "out"
    threads = threading.active_count()
    steps = iter_merge(plan, out)
    for _ in range(5):
        next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert threading.active_count() == threads
    assert not out.exists()
    again = list(iter_merge(plan, out))
    assert sum(step.action == "resumed" for step in again) >= 5
    assert files_of(out) == whole


def test_a_second_run_into_one_folder_is_refused(sharded: Trio, tmp_path: Path) -> None:
    plan, out = arithmetic(sharded), tmp_path / "out"
    steps = iter_merge(plan, out)
    next(steps)
    with pytest.raises(RunError, match="Another run is writing"):
        ipm.merge(plan, out)
    list(steps)
    assert out.exists()


def test_a_source_that_vanishes_can_be_put_back(
    own_trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = arithmetic(own_trio), tmp_path / "out"
    read = os.preadv
    reads = 0

    def vanishing(*arguments: object) -> int:
        nonlocal reads
        ahead = threading.current_thread().name.startswith("read-ahead")
        reads += ahead
        if ahead and reads > 20:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", vanishing)
        with pytest.raises(RunError, match="Stale file handle.*Restore it.*finished tensors"):
            ipm.merge(plan, out)
    assert not out.exists()
    assert any(step.action == "resumed" for step in iter_merge(plan, out))


def test_a_full_disk_in_mid_merge_is_one_sentence_and_can_be_resumed(
    sharded: Trio, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = arithmetic(sharded), tmp_path / "out"
    write, writes = os.pwrite, 0

    def filling(*arguments: object) -> int:
        nonlocal writes
        writes += 1
        if writes > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        with pytest.raises(RunError, match="disk is full; free some space"):
            ipm.merge(plan, out)
    assert not out.exists()
    ipm.merge(plan, out)
    assert files_of(out) == whole


def test_what_the_disk_does_not_keep_is_noticed(
    sharded: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writes = os.pwrite, 0

    def forgetting(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal writes
        writes += 1
        return len(data) if writes == 30 else write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", forgetting)
    with pytest.raises(RunError, match="read back from .* differs"):
        ipm.merge(arithmetic(sharded), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_manifest_records_the_audit(sharded: Trio, tmp_path: Path) -> None:
    manifest = ipm.merge(arithmetic(sharded), tmp_path / "out")
    model = Checkpoint.open(sharded.mllm)
    assert manifest["audit"]["tensors"] == len(model.tensors)
    assert manifest["audit"]["equal_to_the_mllm"] == len(model.tensors) - manifest["n_merged"]
    assert manifest["processes"] == 1


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinities_in_tensors_that_are_only_copied_are_copied(
    own_trio: Trio, tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    buffers = {
        "vision_tower.attn_mask": torch.full((4, 4), -torch.inf).triu(1),
        "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.tensor([1, torch.inf]),
        "language_model.model.layers.0.self_attn.masked_bias": torch.tensor(float("nan")),
        "language_model.model.rotary_emb.inv_freq": torch.tensor([torch.nan]),
    }
    weights = as_mllm(fine_tuned(text_weights(), 1)) | buffers
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    folder = write_model(tmp_path / "m", weights, config, dtype=dtype)
    pair = ipm.open_pair(folder, own_trio.math, own_trio.base)
    ipm.merge(ipm.make_plan(pair, method=method), tmp_path / "out")
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    for name in buffers:
        assert after.read_bytes(name) == before.read_bytes(name)


def test_infinities_in_norms_matter_only_where_norms_are_merged(
    own_trio: Trio, tmp_path: Path
) -> None:
    weights = as_mllm(fine_tuned(text_weights(), 1))
    weights["language_model.model.norm.weight"] = torch.full_like(
        weights["language_model.model.norm.weight"], torch.inf
    )
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    folder = write_model(tmp_path / "m", weights, config)
    pair = ipm.open_pair(folder, own_trio.math, own_trio.base)
    ipm.merge(ipm.make_plan(pair, method="task_arithmetic"), tmp_path / "kept")
    plan = ipm.make_plan(pair, method="task_arithmetic", norms="merge")
    with pytest.raises(CheckpointError, match="model.norm.weight' .* NaN or infinite"):
        ipm.merge(plan, tmp_path / "merged")


def test_a_large_tensor_is_copied_in_pieces(
    own_trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch, 100)
    ipm.merge(arithmetic(own_trio, math_weight=0.0), tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (own_trio.mllm / name).read_bytes()


@pytest.mark.parametrize(
    "name", ["task_arithmetic", "linear", "layer_swap", "metagpt", "nan", "ties"]
)
def test_merging_in_pieces_or_in_threads_gives_the_same_bytes(
    name: str, trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ipm.open_pair(trio.mllm, [trio.math], trio.base)
    changes = {"last_kept_layer": 0} if name == "layer_swap" else {}
    plan = ipm.make_plan(pair, name, **changes)
    ipm.merge(plan, tmp_path / "whole")
    in_pieces(monkeypatch, 300)
    monkeypatch.setattr("ipmerge_core.runtime.processes.Ranks.cores", 3)
    ipm.merge(plan, tmp_path / "pieces")
    shard = "model.safetensors"
    assert (tmp_path / "whole" / shard).read_bytes() == (tmp_path / "pieces" / shard).read_bytes()
    assert (tmp_path / "whole" / shard).read_bytes() != (trio.mllm / shard).read_bytes()


def test_rows_of_rows_are_rows_of_the_stored_tensor() -> None:
    matrix = MatrixMatch("a", 0, "k", (8, 4), "qkv[16:24]", "qkv[16:24]", ("b",))
    rows = rows_of(matrix, 2, 5)
    assert (rows.name, rows.mllm, rows.math) == ("a[2:5]", "qkv[18:21]", ("b[2:5]",))
    assert rows.shape == (3, 4)


def test_nan_found_in_a_piece_is_counted_in_the_whole_tensor(
    own_trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(monkeypatch, 300)
    changed = text_weights(seed=9)
    name = "model.layers.1.mlp.up_proj.weight"
    changed[name][0, 0] = changed[name][-1, -1] = float("nan")
    folder = write_model(tmp_path / "math", changed, TEXT_CONFIG)
    with pytest.raises(CheckpointError, match=rf"'{name}' .* holds 2 NaN or infinite"):
        ipm.merge(arithmetic(own_trio._replace(math=folder)), tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()
    assert not place_left(tmp_path / "out")


def test_a_statistic_of_the_whole_model_reaches_the_method(trio: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(trio.mllm, trio.math, trio.base)
    method = ipm.METHODS["metagpt"]
    plan = ipm.make_plan(pair, method="metagpt", scope="model")
    ipm.merge(plan, tmp_path / "out")
    models = [
        (pair.base.read(m.name), pair.mllm.read(m.mllm), [pair.math[0].read(m.math[0])], {})
        for m in pair.matrices
    ]
    assert method.statistic is not None
    found = method.statistic.over(lambda: models, plan.parameters)
    merged = Checkpoint.open(tmp_path / "out")
    for matrix, (base, mllm, experts, _) in zip(pair.matrices, models, strict=True):
        expected = method(base, mllm, experts, **plan.parameters, statistic=found)
        torch.testing.assert_close(merged.read(matrix.mllm), expected)
