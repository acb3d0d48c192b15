"""README's examples, run as they stand there: from two siblings to a merged model that answers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

import ipmerge_core as ipm
from ipmerge_core import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


SHORTER = {  # what makes a command of README quick
    "evaluate": ["--limit", "2"],
    "sweep": ["--limit", "2"],
    "search": ["--limit", "3", "--validation", "0.5", "--budget", "2", "--optimizer", "random"],
    "knockout": ["--limit", "2"],
    "drift": ["--limit", "16", "--max-steps", "2"],
    "chat": ["--max-new-tokens", "4"],
}


def code_under(heading: str, number: int = 0) -> str:
    """Return one of the code blocks of a section."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)[number]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the clone that README's reader stands in."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_makes_a_model(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(code_under("In Python"), names)  # the reader's own session
    assert "relative_change" in capsys.readouterr().out
    plan = names["plan"]
    assert isinstance(plan, ipm.MergePlan)
    before = load_file(clone / "assets/demo/mllm/model.safetensors")
    after = load_file(clone / "runs/merged/model.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert len(changed) == len(plan.selected) > 0


def test_the_command_line_example_makes_the_same_model(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (clone / "runs").mkdir()
    for line in code_under("On the command line").splitlines():
        command, *arguments = shlex.split(line)
        assert command == "ipmerge"
        assert cli.main(arguments) == 0, capsys.readouterr().err
    assert (clone / "runs/merged-by-command/ipmerge.json").exists()


def test_the_commands_on_models_in_memory_write_their_results(
    clone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPMERGE_HOME", str(clone / "home"))
    (clone / "runs").mkdir()
    for line in code_under("On the command line").splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    for line in code_under("On the command line", 1).splitlines():
        command, *arguments = shlex.split(line)[1:]
        found = cli.main([command, *arguments, *SHORTER[command]])
        assert found == 0, f"{command}: {capsys.readouterr().err}"
    written = {path.name for path in (clone / "runs").iterdir()}
    assert written >= {"report.json", "sweep.json", "search", "knockout.json", "tuned"}


def test_a_merged_model_loads_and_answers(clone: Path) -> None:
    from PIL import Image

    from ipmerge_core.inference.generation import answer

    exec(code_under("In Python"), {})
    picture = Image.new("RGB", (64, 64), "white")
    for model in ("assets/demo/mllm", "runs/merged"):
        assert isinstance(answer(model, "How many dots?", picture, max_new_tokens=4), str)
