"""Packs, plans, calibrations and jobs from before the package had folders still open and go on.

`before_packages.tar.gz` is a home folder as the code of 2026-11-29 wrote it for the demo trio, with
@ROOT@ and @HOME@ for its paths and identities for the calibration's Gram matrices: a pack, a plan,
a calibration, and a merge, an analysis and a calibration that were cancelled at their first step.
"""

from __future__ import annotations

import gzip
import json
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import ipmerge_core as ipm
from ipmerge_core.runtime.jobs import JobStore
from ipmerge_core.ui.backend import Backend

ROOT = Path(__file__).parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    with tarfile.open(Path(__file__).with_name("before_packages.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    for path in folder.rglob("*.json"):
        text = path.read_text("utf-8")
        path.write_text(text.replace("@ROOT@", str(ROOT)).replace("@HOME@", str(folder)), "utf-8")
    pack = folder / "packs" / "older.pack.json"
    pack.with_suffix(".json.gz").write_bytes(gzip.compress(pack.read_bytes()))
    monkeypatch.setenv("IPMERGE_HOME", str(folder))
    monkeypatch.delenv("SPACE_ID", raising=False)
    return folder


def resumed(home, name):
    store = JobStore(home / "runs")
    job, key = json.loads((home / "keys.json").read_text("utf-8"))[name]
    assert store.status(job).state == "cancelled"
    store.resume(job, key)
    deadline = time.monotonic() + 200
    while store.status(job).is_running and time.monotonic() < deadline:
        time.sleep(0.1)
    status = store.status(job)
    assert status.state == "finished", status.error
    return Path(str(status.arguments["out"]))


def test_a_pack_and_a_plan_open_and_agree(home):
    analysis = ipm.Analysis.load(home / "packs" / "older.pack.json.gz")
    plan = ipm.MergePlan.load(home / "plan.json")
    again = ipm.make_plan(analysis, similarity_threshold=0.1, lambda_=2.0)
    assert plan.digest == again.digest
    assert plan.preview() == again.preview()


def test_a_merge_goes_on_and_writes_the_model_that_its_plan_describes(home):
    out = resumed(home, "merge")
    direct = home / "direct"
    ipm.merge(ipm.MergePlan.load(home / "plan.json"), direct)
    for file in direct.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_an_analysis_goes_on_and_leaves_its_pack(home):
    made = ipm.Analysis.load(resumed(home, "analyse"))
    older = ipm.Analysis.load(home / "packs" / "older.pack.json.gz").records
    assert all(record.spectra for record in made.records)  # which packs did not have
    for record, before in zip(made.records, older, strict=True):
        found, kept = (values_of(asdict(each)) for each in (replace(record, spectra=None), before))
        assert found.keys() == kept.keys()
        for place, value in kept.items():
            close = isinstance(value, float)
            assert found[place] == (pytest.approx(value, rel=1e-4, abs=1e-7) if close else value)


def values_of(value: object, name: str = "") -> dict[str, object]:
    """The values of nested data by their place; other processors round numbers differently."""
    inside = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    if not isinstance(inside, dict):
        return {name: inside}
    parts = [values_of(part, f"{name}.{key}") for key, part in inside.items()]
    return {place: found for part in parts for place, found in part.items()}


def test_a_calibration_is_found_again_and_one_goes_on(home):
    backend = Backend()
    pack = "packs-older"
    found = backend.finished_calibrations(pack, "gram")
    assert [folder.name for folder in found] == ["mllm-gram"]
    out = resumed(home, "calibrate")
    assert out in backend.finished_calibrations(pack, "gram")
    plan = ipm.make_plan(
        ipm.open_pair(*(ROOT / "assets/demo" / name for name in ("mllm", "math", "base"))),
        "regmean",
        calibration=found[0],
    )
    ipm.merge(plan, home / "regmean")
    assert (home / "regmean" / "model.safetensors").is_file()
