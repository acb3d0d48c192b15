"""Paths are checked before any work, and what cannot be written is not left half-written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import Trio
from full_disk import no_room

from ipmerge_core import cli
from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.merging.merge import iter_merge, merge
from ipmerge_core.models import writer
from ipmerge_core.models.opening import open_model
from ipmerge_core.models.pairing import open_pair
from ipmerge_core.planning.plan import make_plan
from ipmerge_core.runtime import atomic, host, paths

COMMANDS = ("plan", "analyse", "recipe", "merge", "adapter", "calibrate")


def models(trio: Trio) -> list[str]:
    return ["--mllm", str(trio.mllm), "--math", str(trio.math), "--base", str(trio.base)]


@pytest.fixture(scope="module")
def made(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arguments of every command that writes, without its output."""
    folder = tmp_path_factory.mktemp("made")
    pack, plan, other = (str(folder / name) for name in ("p.json.gz", "p.json", "q.json"))
    assert cli.main(["analyse", *models(trio), "-o", pack, "--quiet"]) == 0
    assert cli.main(["plan", pack, "-o", plan]) == 0
    assert cli.main(["plan", *models(trio), "--method", "ties", "-o", other]) == 0
    calibrate = ["calibrate", *models(trio), "--kind", "gram", "--limit", "1"]
    return {
        "plan": ["plan", pack],
        "analyse": ["analyse", *models(trio)],
        "recipe": ["recipe", other],
        "merge": ["merge", other],
        "adapter": ["adapter", plan],
        "calibrate": calibrate,
    }


def run(arguments: list[str]) -> str:
    """Run a command that fails, and return the one sentence that it prints last."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert cli.main([*arguments, "--quiet"]) == 2
    lines = stderr.getvalue().splitlines()
    assert lines[-1].startswith("ipmerge: "), lines
    return lines[-1]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every read of weights fail: nothing may be read before the path is refused."""

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("ipmerge_core.models.pairing.ModelPair.read", read)
    monkeypatch.setattr("ipmerge_core.calibration.calibrate.load_model", read)


def bad_outputs(folder: Path) -> dict[str, str]:
    (folder / "file").write_text("text")
    (folder / "loop").symlink_to("loop")
    (folder / "full").mkdir()
    (folder / "full" / "thesis").write_text("years")
    return {
        "device": "/dev/full",
        "below a file": str(folder / "file" / "x"),
        "loop": str(folder / "loop"),
        "empty": " ",
        "nobody's home": "~no-such-user-here/x",
        "long name": str(folder / ("n" * 256)),
        "long in bytes": str(folder / ("é" * 128)),
        "long path": str(folder) + "/d" * 2100,
        "null": str(folder / "a\0b"),
        "full folder": str(folder / "full"),
    }


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_impossible_output_before_any_work(
    command: str, made: dict[str, list[str]], tmp_path: Path
) -> None:
    outputs = bad_outputs(tmp_path)
    before = tree(tmp_path)
    for kind, output in outputs.items():
        assert len(run([*made[command], "-o", output])) < 600, kind
        assert tree(tmp_path) == before, kind


@pytest.mark.parametrize("command", ["plan", "analyse", "recipe"])
def test_a_file_in_a_folder_that_does_not_exist_is_refused(
    command: str, made: dict[str, list[str]], tmp_path: Path
) -> None:
    message = run([*made[command], "-o", str(tmp_path / "no" / "file.json")])
    assert f"the folder '{tmp_path / 'no'}' does not exist" in message
    assert "it is a folder" in run([*made[command], "-o", str(tmp_path)])


@pytest.mark.parametrize(
    ("command", "suffix", "spare"), [("merge", ".partial", 7), ("analyse", ".journal", 7)]
)
def test_the_longest_name_leaves_room_for_the_unfinished_form(
    command: str, suffix: str, spare: int, made: dict[str, list[str]], tmp_path: Path
) -> None:
    assert len(suffix) == spare + 1
    longest = "n" * (255 - len(suffix))
    assert f"at most {len(longest)}" in run([*made[command], "-o", str(tmp_path / (longest + "n"))])
    assert cli.main([*made[command], "-o", str(tmp_path / longest), "--quiet"]) == 0
    assert tree(tmp_path)[0] == longest


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_permission_is_refused_before_any_work(
    command: str, made: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access

    def denied(path: str | Path, mode: int) -> bool:
        inside = Path(path).is_relative_to(tmp_path)
        return access(path, mode) and not (mode & os.W_OK and inside)

    monkeypatch.setattr(os, "access", denied)
    message = run([*made[command], "-o", str(tmp_path / "x")])
    assert "does not permit writing" in message
    assert tree(tmp_path) == []


@pytest.mark.parametrize("command", ["plan", "analyse", "recipe", "merge", "adapter"])
@pytest.mark.parametrize("former", [True, False])
def test_a_disk_that_refuses_ends_in_one_sentence_and_the_former_file_stays(
    command: str, former: bool, made: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    is_file = command in ("plan", "analyse", "recipe")
    if former and is_file:
        out.write_text("former")
    with no_room(200):
        message = run([*made[command], "-o", str(out)])
    assert "the file is larger than the system permits" in message
    assert "run the same command again" in message
    if former and is_file:
        assert out.read_text() == "former"
    else:
        assert not out.exists()
    left = set(tree(tmp_path)) - {"out"}
    kept = {"merge": "out.partial", "analyse": "out.journal"}.get(command, "nothing")
    assert {name.split("/")[0] for name in left} <= {kept}
    assert not (left and "are kept" not in message)


def test_a_full_disk_in_a_library_is_told_by_its_number(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with (
        no_room(100),
        pytest.raises(RunError, match="larger than the system permits"),
        atomic.writing(tmp_path / "x"),
    ):
        save_file({"a": torch.zeros(999)}, tmp_path / "x")
    with pytest.raises(ZeroDivisionError), atomic.writing(tmp_path):
        raise ZeroDivisionError


def test_the_home_folder_is_expanded_in_every_path(
    made: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    commands = ("plan", "analyse", "recipe", "merge")
    for command in commands:
        assert cli.main([*made[command], f"--output=~/{command}", "--quiet"]) == 0
    assert cli.main(["merge", "~/plan", "-o", "~/deep/er/m", "--quiet"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*commands, "deep"}


# --- folders that cannot be replaced ---------------------------------------------------------


@pytest.fixture
def plan(trio: Trio) -> object:
    return make_plan(open_pair(trio.mllm, trio.math, trio.base), method="task_arithmetic")


def files_of(folder: Path) -> dict[str, bytes]:
    changing = ("ipmerge.json", "README.md")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in changing}


def test_a_link_to_an_empty_folder_stays_a_link_and_is_filled(plan: object, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    merge(plan, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("command", ["merge", "adapter"])
def test_the_current_folder_is_filled_and_stays_the_same_folder(
    command: str, made: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "here"
    out.mkdir()
    monkeypatch.chdir(out)
    before = out.stat().st_ino
    assert cli.main([*made[command], "-o", ".", "--quiet"]) == 0
    assert out.stat().st_ino == before
    assert Path("README.md").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert all(path.is_file() for path in out.iterdir())


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_folder_is_filled_whole_after_a_kill_at_any_move(
    plan: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount point is filled file by file: no loader finds a model before all are there."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    merge(plan, whole)
    expected = files_of(whole)
    monkeypatch.setattr(writer, "is_fixed", lambda folder: folder == out and folder.is_dir())
    real = Path.replace
    for moment in range(1, 40):
        out.mkdir()
        calls = 0

        def dying(path: Path, target: Path, moment: int = moment) -> Path:
            nonlocal calls
            calls += 1
            if calls >= moment:
                raise Killed
            return real(path, target)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(Path, "replace", dying)
            merge(plan, out)
        if calls < moment:
            break
        assert not (out / "config.json").exists() or files_of_models(out) == set(expected)
        list(iter_merge(plan, out))
        assert files_of(out) == expected, moment
        for entry in out.iterdir():
            entry.unlink()
        out.rmdir()
    assert moment > 5
    assert files_of(out) == expected


def files_of_models(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_file()} - {"ipmerge.json", "README.md"}


def test_files_of_others_in_a_folder_that_is_being_filled_are_not_touched(
    plan: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(writer, "is_fixed", lambda folder: folder == out)
    with contextlib.closing(iter_merge(plan, out)) as steps:
        next(steps)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(IPMergeError, match="is not empty"):
        merge(plan, out)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_a_mount_point_is_fixed_and_an_ordinary_folder_is_not(tmp_path: Path) -> None:
    assert paths.is_fixed(Path("/proc"))
    assert not paths.is_fixed(tmp_path)
    assert not paths.is_fixed(tmp_path / "missing")


# --- home folders ----------------------------------------------------------------------------


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A user without HOME and without an entry in the password database."""
    import pwd

    def unknown(_: object) -> None:
        raise KeyError

    for name in ("HOME", "IPMERGE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return monkeypatch


def test_a_user_without_a_home_folder_gets_the_name_of_the_variable(
    homeless: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"no such home folder.*IPMERGE_HOME"):
        host.home_folder()
    assert "IPMERGE_HOME" in run(["app"])
    homeless.setenv("IPMERGE_HOME", str(tmp_path))
    assert host.home_folder() == tmp_path


def test_commands_other_than_the_app_need_no_home_folder(
    homeless: pytest.MonkeyPatch, made: dict[str, list[str]], tmp_path: Path
) -> None:
    for command in ("plan", "recipe", "merge"):
        assert cli.main([*made[command], "-o", str(tmp_path / command), "--quiet"]) == 0


def test_a_home_folder_that_cannot_be_written_to_is_named_at_the_first_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ipmerge_core.runtime.jobs import JobStore

    monkeypatch.delenv("IPMERGE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    folder = host.home_folder()
    assert folder.is_relative_to("/proc")
    monkeypatch.setattr(os, "access", lambda path, mode: "/proc" not in str(path))
    with pytest.raises(RunError, match="IPMERGE_HOME"):
        JobStore(folder / "runs").start(iter_merge, {}, title="t")


# --- what a result is printed to -------------------------------------------------------------


def test_a_reader_that_ends_ends_the_command_without_a_word(
    made: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        code = cli.main([*made["plan"], "-o", str(tmp_path / "p.json")])
    assert code == 141
    assert stderr.getvalue() == ""
    assert json.loads((tmp_path / "p.json").read_text())["format"] == "ipmerge-plan"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_full_standard_output_is_named(
    made: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        message = run([*made["plan"], "-o", str(tmp_path / "p.json")])
    assert "standard output: No space left" in message
    with contextlib.suppress(OSError):
        stdout.close()


@pytest.mark.parametrize(
    "text",
    ["", " ", "a\0b", "a\ud800b", "~no-such-user/a", "x" * 256, "x/" * 3000, "é" * 128],
    ids=["empty", "space", "null", "surrogate", "home", "long name", "long path", "bytes"],
)
def test_a_path_that_no_system_has_is_an_error_in_one_sentence(text: str) -> None:
    for check in (paths.expand_path, paths.resolve_path, paths.output_file, paths.output_folder):
        with pytest.raises(RunError, match=r"path|home folder|Choose a shorter name"):
            check(text)
    with pytest.raises(RunError, match=r"path|home folder|Choose a shorter name"):
        paths.input_file(text, "plan")
    with pytest.raises(IPMergeError):
        open_model(text)
