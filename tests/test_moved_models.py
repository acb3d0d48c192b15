"""A plan merges where its models are now, and the app's Plan as JSON is a plan of the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Trio, write_trio

import ipmerge_core as ipm
from ipmerge_core import cli
from ipmerge_core.analysis.records import Source, Sources
from ipmerge_core.errors import PairingError
from ipmerge_core.planning.relocation import relocate
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.cite.snippets import snippets_of
from ipmerge_core.ui.pairs import list_packs
from ipmerge_core.ui.plan_choice import PlanChoice, plan_of

Output = pytest.CaptureFixture[str]


def words(trio: Trio, **changed: Path) -> list[str]:
    places = {"mllm": trio.mllm, "math": trio.math, "base": trio.base, **changed}
    return [part for role, path in places.items() for part in (f"--{role}", str(path))]


@pytest.fixture
def moved(trio: Trio, tmp_path: Path) -> Trio:
    """A copy of the trio."""
    copied = {role: shutil.copytree(getattr(trio, role), tmp_path / role) for role in trio._fields}
    return Trio(**copied)


@pytest.fixture
def files(own_trio: Trio, moved: Trio, tmp_path: Path) -> dict[str, str]:
    """Packs and plans of models that are no longer where they were."""
    found = {name: str(tmp_path / name) for name in ("pack.json.gz", "ip.json", "ta.json")}
    assert cli.main(["analyse", *words(own_trio), "-o", found["pack.json.gz"], "--quiet"]) == 0
    assert cli.main(["plan", found["pack.json.gz"], "-o", found["ip.json"]]) == 0
    task = ["--method", "task_arithmetic"]
    assert cli.main(["plan", *words(own_trio), *task, "-o", found["ta.json"]]) == 0
    for folder in (own_trio.mllm, own_trio.math, own_trio.base):
        shutil.rmtree(folder)
    return found


def test_every_command_with_a_plan_takes_the_places_of_its_models(
    files: dict[str, str], moved: Trio, tmp_path: Path, capsys: Output
) -> None:
    assert cli.main(["merge", files["ta.json"], "-o", str(tmp_path / "m")]) == 2
    assert "does not exist" in capsys.readouterr().err
    for name, command in (("ta.json", "merge"), ("ta.json", "recipe"), ("ip.json", "adapter")):
        out = tmp_path / command
        assert cli.main([command, files[name], *words(moved), "-o", str(out), "--quiet"]) == 0
        assert out.exists()
    made = json.loads((tmp_path / "merge" / "ipmerge.json").read_text())
    assert made["sources"]["mllm"]["id"] == str(moved.mllm)
    assert made["plan"]["hash"] == json.loads(Path(files["ta.json"]).read_text())["hash"]
    assert str(moved.math) in (tmp_path / "recipe").read_text()
    again = tmp_path / "again.json"
    assert cli.main(["plan", files["pack.json.gz"], *words(moved), "-o", str(again)]) == 0
    assert json.loads(again.read_text())["sources"]["base"]["id"] == str(moved.base)


def test_models_with_other_weights_are_refused_by_role(
    files: dict[str, str], moved: Trio, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out"
    for role, other in (("mllm", moved.math), ("math", moved.math_2), ("base", moved.math)):
        arguments = ["merge", files["ta.json"], *words(moved, **{role: other}), "-o", str(out)]
        assert cli.main(arguments) == 2
        message = capsys.readouterr().err
        assert f"'{other}' are not those of the {role}" in message
        assert "fingerprint" in message
    assert not out.exists()
    two = [*words(moved), "--math", str(moved.math_2), "-o", str(out)]
    assert cli.main(["merge", files["ta.json"], *two]) == 2
    assert "1 experts and 2 are given" in capsys.readouterr().err
    own = [*words(moved), "--base-mllm", str(moved.base), "-o", str(out)]
    assert cli.main(["merge", files["ta.json"], *own]) == 2
    assert "one base for all models" in capsys.readouterr().err


def test_a_commit_on_the_hub_cannot_be_compared_with_a_folder(moved: Trio) -> None:
    hub = Source("org/name", "0" * 40, "1" * 64)
    sources = Sources(mllm=hub, base=hub, base_mllm=None, math=(hub,))
    with pytest.raises(PairingError, match="a commit on the hub.*Specify a hub id"):
        relocate(sources, mllm=str(moved.mllm))
    assert relocate(sources) == sources


# --- the app's Plan as JSON ------------------------------------------------------------------


@pytest.fixture(scope="module")
def choice() -> PlanChoice:
    return PlanChoice(similarity_threshold=0.3, lambda_=2.5, similarity="max", variant="max")


def test_merge_reads_the_plan_of_the_app(
    choice: PlanChoice, tmp_path: Path, capsys: Output
) -> None:
    pair = list_packs()[0].id
    file = tmp_path / "choice.json"
    file.write_text(snippets_of(ChosenMerge(pair, choice), "http://localhost").json)
    arguments = ["merge", str(file), "-o", str(tmp_path / "out"), "--dry-run"]
    assert cli.main(arguments) == 0
    assert f"Plan {plan_of(pair, choice).hash}" in capsys.readouterr().out
    assert cli.main(["recipe", str(file), "-o", str(tmp_path / "r.yaml")]) == 2
    assert "no counterpart of IP-Merging" in capsys.readouterr().err


def test_a_pack_that_is_not_here_is_given_with_an_option(
    files: dict[str, str], moved: Trio, tmp_path: Path, capsys: Output
) -> None:
    pack = ipm.Analysis.load(files["pack.json.gz"])
    content: dict[str, Any] = {
        "format": "ipmerge-choice",
        "version": 1,
        "pair": {
            "id": "packs-elsewhere",
            "name": pack.name,
            "created": pack.created,
            "parameters": dict(pack.parameters),
        },
        "arguments": {"lambda_": 2.0},
    }
    file, out = tmp_path / "choice.json", tmp_path / "out"

    def merged(*more: str, **changed: object) -> str:
        file.write_text(json.dumps({**content, **changed}))
        code = cli.main(["merge", str(file), *words(moved), *more, "-o", str(out), "--quiet"])
        message = capsys.readouterr().err
        assert code == (2 if message else 0)
        return message

    with_pack = ["--pack", files["pack.json.gz"]]
    assert "is not on this machine. Specify it with --pack" in merged()
    other = {**content["pair"], "created": "1999-01-01T00:00:00+00:00"}
    assert "made from another analysis: its created is" in merged(*with_pack, pair=other)
    assert "expected version 1" in merged(*with_pack, version=2)
    assert "expected version 1" in merged(*with_pack, pair=["id"])
    assert "invalid arguments" in merged(*with_pack, arguments={"source": 1})
    assert "lambda is 'much'" in merged(*with_pack, arguments={"lambda_": "much"})
    assert "Cannot read the pack" in merged("--pack", str(tmp_path / "no"))
    assert not out.exists()
    assert merged(*with_pack) == ""
    made = json.loads((out / "ipmerge.json").read_text())
    assert made["plan"]["parameters"]["lambda_"] == 2.0


def test_a_pack_for_a_plan_that_needs_none_is_refused(
    files: dict[str, str], tmp_path: Path, capsys: Output
) -> None:
    pack = ["--pack", files["pack.json.gz"]]
    assert cli.main(["merge", files["ta.json"], *pack, "-o", str(tmp_path / "o")]) == 2
    assert "--pack has no effect" in capsys.readouterr().err


# --- models that change, and merges that are finished ----------------------------------------


def rewrite(file: Path) -> None:
    """Change the last byte of a file in place: no fingerprint of samples sees it."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)


def plan_for(command: str, trio: Trio, folder: Path) -> str:
    pack, plan = str(folder / "pack.json.gz"), str(folder / "plan.json")
    assert cli.main(["analyse", *words(trio), "-o", pack, "--quiet"]) == 0
    method = ["--method", "ip_merging" if command == "adapter" else "ties"]
    assert cli.main(["plan", pack, *method, "-o", plan]) == 0
    return plan


WORK = {
    "merge": ("ipmerge_core.merging.merge", "iter_merge"),
    "adapter": ("ipmerge_core.adapters.export", "iter_adapter"),
    "analyse": ("ipmerge_core.analysis.analyse", "iter_pack_of"),
}


@pytest.mark.parametrize("command", WORK)
@pytest.mark.parametrize("role", ["mllm", "math", "base"])
def test_weights_that_are_written_during_a_run_end_it_without_a_result(
    command: str, role: str, own_trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:  # fmt: skip
    module, name = WORK[command]
    before = [plan_for(command, own_trio, tmp_path)] if command != "analyse" else words(own_trio)
    work = getattr(__import__(module, fromlist=[name]), name)

    def disturbed(*arguments: object, **options: object) -> object:
        for number, step in enumerate(work(*arguments, **options)):
            if number == 3:
                rewrite(getattr(own_trio, role) / "model.safetensors")
            yield step

    out = tmp_path / "out"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{name}", disturbed)
        assert cli.main([command, *before, "-o", str(out), "--quiet"]) == 2
    assert "was written while it was in use" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "new.json"])
def test_a_file_that_is_written_during_a_merge_is_copied_whole_by_the_next_run(
    name: str, own_trio: Trio, tmp_path: Path, capsys: Output
) -> None:
    plan = ipm.MergePlan.load(plan_for("merge", own_trio, tmp_path))
    out = tmp_path / "out"
    changed = own_trio.mllm / name

    def disturbed() -> None:
        for step in ipm.iter_merge(plan, out):
            if step.index == 5:
                text = changed.read_text() if changed.exists() else "{}"
                changed.write_text(text + " ")

    with pytest.raises(ipm.errors.RunError, match=f"'{name}' .* was written while"):
        disturbed()
    assert not out.exists()
    actions = [step.action for step in ipm.iter_merge(plan, out)]
    assert set(actions) == {"resumed"}
    assert (out / name).read_text() == changed.read_text()


def written(path: Path) -> tuple[int, int, int]:
    """What tells whether a file was written again; reading changes only the time of access."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def test_a_finished_merge_of_the_same_plan_is_a_success(
    own_trio: Trio, tmp_path: Path, capsys: Output
) -> None:
    plan, out = plan_for("merge", own_trio, tmp_path), tmp_path / "out"
    arguments = ["merge", plan, "-o", str(out)]
    assert cli.main(arguments) == 0
    assert "Wrote" in capsys.readouterr().out
    stamp = written(out / "model.safetensors")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"Already complete {out}")
    assert written(out / "model.safetensors") == stamp
    assert cli.main([*arguments, "--no-resume"]) == 2
    other = str(tmp_path / "other.json")
    assert cli.main(["plan", str(tmp_path / "pack.json.gz"), "-o", other]) == 0
    assert cli.main(["merge", other, "-o", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_what_only_looks_like_the_finished_merge_is_refused(own_trio: Trio, tmp_path: Path) -> None:
    plan = ipm.MergePlan.load(plan_for("merge", own_trio, tmp_path))
    out = tmp_path / "out"
    for damage in ("shard", "manifest", "sources"):
        ipm.merge(plan, out)
        manifest = json.loads((out / "ipmerge.json").read_text())
        if damage == "shard":
            (out / "model.safetensors").unlink()
        elif damage == "manifest":
            manifest["plan"]["digest"] = manifest["plan"]["digest"][::-1]
        else:
            manifest["sources"]["mllm"]["fingerprint"] = "0" * 64
        (out / "ipmerge.json").write_text(json.dumps(manifest))
        with pytest.raises(ipm.errors.CheckpointError, match="is not empty"):
            ipm.merge(plan, out)
        shutil.rmtree(out)


def test_forty_shards_fit_into_few_open_files(tmp_path: Path) -> None:
    import resource

    trio = write_trio(tmp_path / "trio", shards=21)
    plan = ipm.make_plan(ipm.open_pair(trio.mllm, trio.math, trio.base), method="ties")
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 28, former[1]))
    try:
        ipm.merge(plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 21
