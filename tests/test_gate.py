"""Models that the sibling check refuses are merged only with force, however a merge starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from conftest import TEXT_CONFIG, Trio, as_mllm, fine_tuned, text_weights, write_model

import ipmerge_core as ipm
from ipmerge_core.cli import main
from ipmerge_core.errors import PairingError
from ipmerge_core.planning.plan import MergePlan
from ipmerge_core.ui import api
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.plan_choice import PlanChoice, plan_of

REFUSED = "of the weights' norm"
PAIR = "packs-unrelated"


@pytest.fixture(scope="module")
def unrelated(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """An expert that was not fine-tuned from the base."""
    folder, base = tmp_path_factory.mktemp("unrelated"), text_weights()
    mllm_config = {"model_type": "llava", "text_config": TEXT_CONFIG}
    math = write_model(folder / "math", fine_tuned(text_weights(5), 2), TEXT_CONFIG)
    return Trio(
        base=write_model(folder / "base", base, TEXT_CONFIG),
        mllm=write_model(folder / "mllm", as_mllm(fine_tuned(base, 1)), mllm_config),
        math=math,
        math_2=math,
    )


@pytest.fixture(scope="module")
def analysis(unrelated: Trio) -> ipm.Analysis:
    return ipm.analyse(ipm.open_pair(unrelated.mllm, unrelated.math, unrelated.base))


@pytest.fixture
def backend(analysis: ipm.Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("IPMERGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPACE_ID", raising=False)
    (tmp_path / "home" / "packs").mkdir(parents=True)
    analysis.save(tmp_path / "home" / "packs" / "unrelated.pack.json.gz")
    return Backend()


def endpoint(backend: Backend, name: str) -> Callable[..., Any]:
    made = (*api._plans(backend), *api._runs(backend))
    return next(each for each in made if each.__name__ == name)


def plans(unrelated: Trio, analysis: ipm.Analysis) -> list[MergePlan]:
    pair = ipm.open_pair(unrelated.mllm, unrelated.math, unrelated.base)
    return [
        ipm.make_plan(analysis, similarity_threshold=0.0),
        ipm.make_plan(analysis, "ties"),
        ipm.make_plan(pair, "task_arithmetic"),
    ]


@pytest.mark.parametrize("number", range(3))
def test_python_merges_it_only_with_force(
    number: int, unrelated: Trio, analysis: ipm.Analysis, tmp_path: Path
) -> None:
    plan = plans(unrelated, analysis)[number]
    with pytest.raises(PairingError, match=f"{REFUSED}.* force=True"):
        ipm.merge(plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    manifest = ipm.merge(plan, tmp_path / "out", force=True)
    assert manifest["check"]["forced"]
    assert any(f["level"] == "refusal" for f in manifest["check"]["findings"])
    assert "although the sibling check failed" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_is_exported_only_with_force(analysis: ipm.Analysis, tmp_path: Path) -> None:
    plan = ipm.make_plan(analysis, similarity_threshold=0.0)
    with pytest.raises(PairingError, match=REFUSED):
        ipm.export_adapter(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ipm.export_adapter(plan, tmp_path / "out", force=True)


def test_the_command_line_merges_it_only_with_force(
    unrelated: Trio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    models = ["--mllm", unrelated.mllm, "--math", unrelated.math, "--base", unrelated.base]
    words = ["plan", *map(str, models), "--method", "task_arithmetic", "-o", plan, "--quiet"]
    assert main(words) == 0
    for more in ([], ["--dry-run"]):
        assert main(["merge", plan, "-o", out, "--quiet", *more]) == 2
        assert REFUSED in capsys.readouterr().err
        assert not Path(out).exists()
    assert main(["merge", plan, "-o", out, "--quiet", "--force", "--dry-run"]) == 0
    assert main(["merge", plan, "-o", out, "--quiet", "--force"]) == 0
    manifest = json.loads((Path(out) / "ipmerge.json").read_text("utf-8"))
    assert manifest["check"]["forced"]


@pytest.mark.parametrize("method", ["ip_merging", "ties"])
def test_the_endpoints_merge_it_only_with_force(
    method: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, start = endpoint(backend, "plan_check"), endpoint(backend, "merge_start")
    found = check(PAIR, method=method)
    assert not found["ready"]
    assert any(f["level"] == "refusal" and REFUSED in f["message"] for f in found["findings"])
    assert check(PAIR, method=method, force=True)["ready"]
    started: list[dict[str, Any]] = []

    def record(*_: Any, **how: Any) -> Any:
        started.append(how)
        raise gr.Error("started")

    monkeypatch.setattr(backend.store, "start", record)
    for digest in ("", found["digest"]):
        with pytest.raises(PairingError, match=REFUSED):
            start(PAIR, "out", method=method, digest=digest)
    assert not started
    with pytest.raises(gr.Error, match="started"):
        start(PAIR, "out", method=method, force=True)
    assert len(started) == 1


def test_the_chat_does_not_merge_it(backend: Backend) -> None:
    with pytest.raises(PairingError, match=REFUSED):
        backend.merged_folder(plan_of(PAIR, PlanChoice(0.0)), lambda _: None)
