"""A pack while it is being made: found again, read by watchers, whole when it appears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model

import ipmerge_core as ipm
from ipmerge_core.analysis.analyse import AnalysisStep, iter_pack
from ipmerge_core.analysis.comparison import Options
from ipmerge_core.analysis.partial import journal_of, read_journal
from ipmerge_core.analysis.records import Analysis
from ipmerge_core.cli import main
from ipmerge_core.errors import CheckpointError, PairingError, PlanError, RunError
from ipmerge_core.merging.estimates import estimate_analysis


def run(trio: Trio, out: Path, steps: int = 1000, **options: object) -> list[AnalysisStep]:
    """Take so many steps of an analysis, then close it."""
    run = iter_pack(str(trio.mllm), [str(trio.math)], str(trio.base), out, **options)
    taken = [step for _, step in zip(range(steps), run, strict=False)]
    run.close()
    return taken


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tiny.pack.json.gz"


def test_a_finished_run_leaves_the_pack_that_analyse_makes_and_nothing_else(
    trio: Trio, out: Path
) -> None:
    steps = run(trio, out)
    assert [step.number for step in steps] == list(range(22))
    assert (steps[-1].cost_done, steps[-1].cost_before) == (steps[-1].cost_total, 0)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    made = Analysis.load(out)
    expected = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    assert made.records == expected.records
    assert made.sources == expected.sources


def test_the_command_and_python_go_on_with_each_others_work(trio: Trio, out: Path) -> None:
    run(trio, out, steps=6)
    names = ["--mllm", str(trio.mllm), "--math", str(trio.math), "--base", str(trio.base)]
    assert main(["analyse", *names, "-o", str(out), "--device", "cpu", "--quiet"]) == 0
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    made = Analysis.load(out)
    cached = ipm.analyse(
        ipm.open_pair(trio.mllm, trio.math, trio.base), cache_dir=out.with_name("cache")
    )
    assert (made.records, made.sources) == (cached.records, cached.sources)
    assert len(list(out.with_name("cache").iterdir())) == 1


def test_watchers_see_the_records_so_far_and_ask_only_for_new_ones(trio: Trio, out: Path) -> None:
    run(trio, out, steps=6)
    seen = read_journal(journal_of(out))
    assert (seen.n_done, len(seen.records), len(seen.places)) == (5, 5, 21)
    assert [(place.layer, place.module) for place in seen.places[:2]] == [(0, "q"), (0, "k")]
    assert 0 < seen.share < 1
    partial = Analysis.from_dict({**seen.pack, "records": seen.records})
    whole = ipm.analyse(ipm.open_pair(trio.mllm, trio.math, trio.base))
    assert partial.records == whole.records[:5]
    assert (partial.totals, partial.sources) == (whole.totals, whole.sources)
    assert [r["module"] for r in read_journal(journal_of(out), 3).records] == ["o", "gate"]


def test_an_interrupted_run_goes_on_and_says_what_was_there(trio: Trio, out: Path) -> None:
    run(trio, out, steps=6)
    with journal_of(out).open("a") as journal:
        journal.write('[{"name": "torn')
    assert read_journal(journal_of(out)).n_done == 5
    again = run(trio, out)
    assert [step.number for step in again] == list(range(5, 22))
    assert {step.cost_before for step in again} == {again[0].cost_done}
    assert len(Analysis.load(out).records) == 21


def test_a_journal_that_has_not_begun_is_refused(out: Path) -> None:
    for content in (None, ""):
        if content is not None:
            journal_of(out).write_text(content)
        with pytest.raises(PlanError, match="has not started"):
            read_journal(journal_of(out))


def test_a_file_that_is_no_journal_is_refused_and_kept(trio: Trio, out: Path) -> None:
    for content in ("nonsense", json.dumps([1]), json.dumps({"format": "other"})):
        journal_of(out).write_text(content)
        with pytest.raises(PlanError, match="is not the journal of an analysis of this version"):
            read_journal(journal_of(out))
        with pytest.raises(PlanError, match="Delete it to start"):
            run(trio, out)
        assert journal_of(out).read_text() == content


def test_strangers_existing_packs_and_folders_for_the_hub_are_refused(
    trio: Trio, out: Path, tmp_path: Path
) -> None:
    with pytest.raises(PairingError, match="equals the base"):
        list(iter_pack(str(trio.mllm), [str(trio.base)], str(trio.base), out))
    with pytest.raises(CheckpointError, match="is not a valid hub id"):
        run(trio, out, hub_only=True)
    with pytest.raises(PlanError, match="rank is 0"):
        run(trio, out, rank=0)
    out.write_text("mine")
    with pytest.raises(RunError, match="already exists"):
        run(trio, out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_estimate_counts_every_byte_that_is_read(trio: Trio, tmp_path: Path) -> None:
    pair = ipm.open_pair(trio.mllm, [trio.math, trio.math_2], trio.base)
    need = estimate_analysis(pair, Options())
    assert need.n_matrices == 21
    per_model = sum(pair.base.spec(matrix.name).nbytes for matrix in pair.matrices)
    assert (need.nbytes_read, need.nbytes_fetched) == (4 * per_model, 0)
    root = text_weights(seed=11)
    config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    own = write_model(tmp_path / "own", root, TEXT_CONFIG)
    mllm = write_model(tmp_path / "mllm", as_mllm(fine_tuned(root, 1)), config)
    rooted = ipm.open_pair(mllm, trio.math, trio.base, base_mllm=own)
    assert estimate_analysis(rooted, Options()).nbytes_read == 4 * per_model
    quick = estimate_analysis(pair, Options(quick=True))
    assert quick.nbytes_memory < need.nbytes_memory
