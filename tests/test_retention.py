"""What a hosted app deletes: old results, and those beyond the disk budget; never what is used."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from quick_runs import idle

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.host import ON_A_SPACE, Limits, limits
from ipmerge_core.runtime.jobs import JobStore
from ipmerge_core.runtime.retention import sweep

HOUR = 3600


def made(path: Path, *, hours: float, nbytes: int = 1000) -> Path:
    """Make a folder as it would be so many hours after it was made."""
    path.mkdir(parents=True)
    (path / "file").write_bytes(os.urandom(nbytes))
    for each in (path / "file", path):
        os.utime(each, (time.time() - hours * HOUR,) * 2)
    return path


def kept(home: Path) -> set[str]:
    return {path.parent.name for path in home.rglob("file")}


def test_what_is_older_than_the_limit_is_deleted(tmp_path):
    store = JobStore(tmp_path / "runs", Limits(keep_hours=24))
    for place in ("models", "previews", "calibrations", "packs", "runs", "others"):
        made(tmp_path / place / f"{place}-old", hours=25)
        made(tmp_path / place / f"{place}-new", hours=23)
    gone = sweep(store, tmp_path)
    assert {path.name for path in gone} == {
        f"{place}-old" for place in ("models", "previews", "calibrations", "packs", "runs")
    }
    assert "others-old" in kept(tmp_path)
    assert len(kept(tmp_path)) == 7


def test_a_change_deep_inside_keeps_a_folder(tmp_path):
    store = JobStore(tmp_path / "runs", Limits(keep_hours=24))
    model = made(tmp_path / "models" / "growing.partial", hours=30)
    (model / "file").touch()
    assert not sweep(store, tmp_path)


def test_the_oldest_results_beyond_the_budget_are_deleted(tmp_path):
    store = JobStore(tmp_path / "runs", Limits(disk_gb=250_000 / 1e9))
    for hours in (1, 2, 3, 4):
        made(tmp_path / "models" / f"made-{hours}", hours=hours, nbytes=100_000)
    made(tmp_path / "models" / "just-made", hours=0, nbytes=100_000)
    sweep(store, tmp_path)
    assert kept(tmp_path) == {"just-made", "made-1"}


def test_what_a_run_uses_and_what_lies_elsewhere_stays(tmp_path):
    home = tmp_path / "home"
    store = JobStore(home / "runs", Limits(keep_hours=1, disk_gb=1e-9))
    out = home / "models" / "busy"
    started = store.start(idle, {"out": str(out)}, title="x")
    made(out, hours=2)
    made(home / "models" / "busy.partial", hours=2)
    made(home / "models" / "busy-not", hours=2)
    elsewhere = made(tmp_path / "elsewhere", hours=2)
    (home / "models" / "link").symlink_to(elsewhere)
    sweep(store, home)
    assert kept(home) == {"busy", "busy.partial"}
    assert (elsewhere / "file").exists()
    assert store.status(started.id).is_running
    store.cancel(started.id, started.key)


def test_a_user_without_limits_keeps_everything(tmp_path):
    made(tmp_path / "models" / "ancient", hours=1e5)
    assert not sweep(JobStore(tmp_path / "runs", Limits()), tmp_path)


def test_limits_are_those_of_the_host_and_of_the_environment(monkeypatch):
    for name in ("SPACE_ID", *(f"IPMERGE_{field.upper()}" for field in Limits._fields)):
        monkeypatch.delenv(name, raising=False)
    assert limits() == Limits()
    monkeypatch.setenv("SPACE_ID", "someone/space")
    assert limits() == ON_A_SPACE
    monkeypatch.setenv("IPMERGE_RUN_MINUTES", "5.5")
    monkeypatch.setenv("IPMERGE_DISK_GB", "None")
    assert limits() == ON_A_SPACE._replace(run_minutes=5.5, disk_gb=None)


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf", "1e999"])
def test_a_wrong_limit_is_refused(monkeypatch, value):
    monkeypatch.setenv("IPMERGE_RUNS", value)
    with pytest.raises(RunError, match=f"IPMERGE_RUNS is '{value}'; expected a positive number"):
        limits()
