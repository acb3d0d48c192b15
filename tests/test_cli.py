"""Every command says one sentence when its input is at fault, and nothing but the result else."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, Trio, fine_tuned, text_weights, write_model
from safetensors.torch import load_file, save_file

from ipmerge_core import cli
from ipmerge_core.cli.printing import Progress
from ipmerge_core.version import __version__

Output = pytest.CaptureFixture[str]


def models(trio: Trio, **changed: Path) -> list[str]:
    chosen = {"mllm": trio.mllm, "math": trio.math, "base": trio.base, **changed}
    return [word for role, path in chosen.items() for word in (f"--{role}", str(path))]


@pytest.fixture
def pack(trio: Trio, tmp_path: Path, capsys: Output) -> str:
    path = str(tmp_path / "pack.json.gz")
    assert cli.main(["analyse", *models(trio), "-o", path]) == 0
    capsys.readouterr()
    return path


def fails(arguments: list[str], words: str, capsys: Output) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert words in last
    assert last.startswith("ipmerge: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_check_prints_one_finding_a_line(trio: Trio, capsys: Output) -> None:
    assert cli.main(["check", *models(trio)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 4
    assert all(line.startswith("ok") for line in lines)


def test_check_refuses_a_stranger_with_exit_code_2(
    trio: Trio, tmp_path: Path, capsys: Output
) -> None:
    stranger = write_model(tmp_path / "s", text_weights(seed=5), TEXT_CONFIG)
    assert cli.main(["check", *models(trio, base=stranger)]) == 2
    assert "REFUSAL" in capsys.readouterr().out


def test_check_warns_with_exit_code_1_only_when_strict(
    trio: Trio, tmp_path: Path, capsys: Output
) -> None:
    config = {**TEXT_CONFIG, "rope_theta": 1e6}
    expert = write_model(tmp_path / "e", fine_tuned(text_weights(), 2), config)
    assert cli.main(["check", *models(trio, math=expert)]) == 0
    assert cli.main(["check", *models(trio, math=expert), "--strict"]) == 1
    assert "WARNING" in capsys.readouterr().out


def test_check_speaks_json(trio: Trio, capsys: Output) -> None:
    assert cli.main(["check", *models(trio), "--json"]) == 0
    assert {finding["level"] for finding in json.loads(capsys.readouterr().out)} == {"ok"}


def test_plan_says_what_changes(pack: str, tmp_path: Path, capsys: Output) -> None:
    arguments = ["plan", pack, "--similarity-threshold", "0.7", "-o", str(tmp_path / "p.json")]
    assert cli.main(arguments) == 0
    assert "of 21 decoder matrices are merged; decoder weights change by" in capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["relative_change"] < 1


def test_plan_takes_a_methods_own_parameters(pack: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    arguments = ["plan", pack, "--set", "gamma_norm=max", "--set", "rank=none"]
    assert cli.main([*arguments, "--lambda", "4", "-o", str(path)]) == 0
    parameters = json.loads(path.read_text())["parameters"]
    assert parameters["gamma_norm"] == "max"
    assert parameters["lambda_"] == 4.0
    assert parameters["rank"] is None


@pytest.mark.parametrize(
    ("text", "read"),
    [("count", "count"), ("none", "none"), ("true", "weights"), ("False", "none")],
)
def test_plan_takes_words_and_what_they_were(
    text: str, read: str, pack: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    arguments = ["plan", pack, "--method", "ties", "--set", f"normalize={text}", "-o", str(path)]
    assert cli.main(arguments) == 0
    assert json.loads(path.read_text())["parameters"]["normalize"] == read


def test_plan_forces_single_matrices(pack: str, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    path = tmp_path / "p.json"
    arguments = ["plan", pack, "--similarity-threshold", "1", "--force-merge", name]
    assert cli.main([*arguments, "-o", str(path)]) == 0
    plan = json.loads(path.read_text())
    assert [d["name"] for d in plan["decisions"] if d["experts"]] == [name]


def test_a_method_without_similarity_needs_no_pack(trio: Trio, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    arguments = ["plan", *models(trio), "--method", "task_arithmetic", "--set", "math_weight=0.5"]
    assert cli.main([*arguments, "-o", str(path)]) == 0
    assert cli.main(["merge", str(path), "-o", str(tmp_path / "out")]) == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = load_file(tmp_path / "out" / "model.safetensors")["language_model." + name]
    parts = [load_file(folder / "model.safetensors") for folder in trio]
    base, mllm, math = parts[0][name], parts[1]["language_model." + name], parts[2][name]
    torch.testing.assert_close(merged, mllm + 0.5 * (math - base))


def test_a_dry_run_writes_nothing(pack: str, tmp_path: Path, capsys: Output) -> None:
    path = str(tmp_path / "p.json")
    assert cli.main(["plan", pack, "-o", path]) == 0
    before = sorted(tmp_path.iterdir())
    assert cli.main(["merge", path, "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "Nothing was written." in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


def test_a_plan_that_selects_nothing_says_so_before_anything_is_written(
    pack: str, tmp_path: Path, capsys: Output
) -> None:
    path = str(tmp_path / "p.json")
    words = (
        "WARNING: No matrix reaches the similarity threshold 1.0: the merged model would be "
        "identical to the vision-language model."
    )
    assert cli.main(["plan", pack, "--similarity-threshold", "1", "-o", path]) == 0
    assert words in capsys.readouterr().out
    for more in (["--dry-run"], []):
        assert cli.main(["merge", path, "-o", str(tmp_path / "out"), "--json", *more]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith(words)
        json.loads(captured.out)
    only_norms = ["--include", "nothing", "--norms", "merge"]
    assert cli.main(["plan", pack, "--method", "linear", *only_norms, "-o", path]) == 0
    words = "overrides limit: only the decoder's norms and biases in scope would be merged"
    assert words in capsys.readouterr().out


def test_progress_goes_to_stderr_and_can_be_silenced(
    pack: str, tmp_path: Path, capsys: Output
) -> None:
    path = str(tmp_path / "p.json")
    assert cli.main(["plan", pack, "-o", path]) == 0
    capsys.readouterr()
    assert cli.main(["merge", path, "-o", str(tmp_path / "a"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "merging 100%" in captured.err
    assert json.loads(captured.out)["model"] == str(tmp_path / "a")
    assert cli.main(["merge", path, "-o", str(tmp_path / "b"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def show_two_steps(*, quiet: bool = False) -> None:
    """Show two kinds of work, the second of which fails."""
    options = argparse.Namespace(quiet=quiet, device="cpu", one_thread=False)
    with contextlib.suppress(KeyError), Progress(options) as progress:
        progress.show("measuring", 4, 4, "1/1 first")
        progress.show("merging", 1, 4, "1/4 a\x1b[2Jb\r\nc\u202ed{bar}" + 500 * "e")
        raise KeyError


def read_screen(screen: int) -> bytes:
    """Read what went to a terminal that nobody writes to any more."""
    found = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(screen, 1 << 16):
            found += part
    os.close(screen)
    return found


def test_a_log_gets_a_line_per_report_in_which_names_cannot_act(capsys: Output) -> None:
    show_two_steps()
    place, *lines = capsys.readouterr().err.splitlines()
    assert place.startswith("Computing on CPU")
    assert [line[:14] for line in lines] == [
        "measuring   0%", "measuring 100%", "merging   0%, ", "merging  25%, ",
    ]  # fmt: skip
    assert lines[1].endswith("<?, 1/1 first")  # one step is no speed
    assert ", 1/4 a\ufffd[2Jb\ufffd\ufffdc\ufffdd{bar}eee" in lines[3]
    assert len(lines[3]) < 200


def test_a_terminal_gets_a_bar_per_kind_of_work_and_its_line_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with os.fdopen(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        show_two_steps()
    written = read_screen(screen).decode()
    place, *bars, rest = written.split("\r\n")
    assert place.startswith("Computing on CPU")
    first, second = (bar.rpartition("\r")[2] for bar in bars)
    assert first.startswith("measuring 100%|████")
    assert second.startswith("merging  25%|")
    assert rest == ""
    assert "\x1b" not in written
    assert max(map(len, written.replace("\r", "\n").split("\n"))) < 80


def test_a_quiet_command_reports_no_progress(capsys: Output) -> None:
    show_two_steps(quiet=True)
    assert capsys.readouterr().err == ""


def test_merging_into_a_full_folder_is_refused(pack: str, tmp_path: Path, capsys: Output) -> None:
    path = str(tmp_path / "p.json")
    assert cli.main(["plan", pack, "-o", path]) == 0
    capsys.readouterr()
    fails(["merge", path, "-o", str(tmp_path)], "exists and is not empty", capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--similarity-threshold", "1.5"], "similarity threshold"),
        (["--similarity-threshold", "nan"], "similarity threshold"),
        (["--lambda", "-1"], "lambda is -1.0"),
        (["--lambda", "inf"], "lambda is inf"),
        (["--method", "tis"], "Did you mean 'ties'?"),
        (["--set", "gamma_norm"], "expected NAME=VALUE"),
        (["--set", "gamma_norm=mean"], "expected one of sum, max"),
        (["--set", "temperature=hot"], "temperature is 'hot'"),
        (["--force-keep", "nothing"], "not a decoder matrix of this pair"),
    ],
)
def test_impossible_choices_are_refused_in_one_sentence(
    arguments: list[str], words: str, pack: str, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "plan.json"
    fails(["plan", pack, "-o", str(out), *arguments], words, capsys)
    assert not out.exists()


def test_analyse_refuses_strangers_unless_forced(
    trio: Trio, tmp_path: Path, capsys: Output
) -> None:
    stranger = write_model(tmp_path / "s", text_weights(seed=5), TEXT_CONFIG)
    arguments = ["analyse", *models(trio, base=stranger), "-o", str(tmp_path / "p.json.gz")]
    fails(arguments, "specify the model it was trained from", capsys)
    assert cli.main([*arguments, "--force"]) == 0


def test_analyse_refuses_a_folder_that_is_not_there_before_any_work(
    trio: Trio, tmp_path: Path, capsys: Output
) -> None:
    target = str(tmp_path / "nowhere" / "pack.json.gz")
    fails(["analyse", *models(trio), "-o", target], "does not exist", capsys)


def test_nan_weights_are_refused_by_name(own_trio: Trio, tmp_path: Path, capsys: Output) -> None:
    weights = load_file(own_trio.math / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, own_trio.math / "model.safetensors")
    target = tmp_path / "pack.json.gz"
    fails(["analyse", *models(own_trio), "-o", str(target)], "1 NaN or infinite", capsys)
    assert not target.exists()


@pytest.mark.parametrize("missing", ["mllm", "math", "base"])
def test_a_model_that_is_not_there_is_named(
    missing: str, trio: Trio, tmp_path: Path, capsys: Output
) -> None:
    arguments = ["check", *models(trio, **{missing: tmp_path / "nowhere"})]
    fails(arguments, "The model folder", capsys)


def test_models_that_are_not_given_are_asked_for(capsys: Output) -> None:
    fails(["check", "--mllm", "a"], "--mllm A --math B --base Z", capsys)


def test_the_version_is_told(capsys: Output) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"ipmerge {__version__}"


def test_no_command_loads_torch_before_it_is_needed() -> None:
    code = "import sys, ipmerge_core.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_keeps_the_finished_work_and_says_so(pack: str, tmp_path: Path) -> None:
    plan = str(tmp_path / "p.json")
    assert cli.main(["plan", pack, "-o", plan]) == 0
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "import ipmerge_core.merging.merge as merging\n"
        "steps = merging.iter_merge\n"
        "def stopping(*arguments, **options):\n"
        "    for number, step in enumerate(steps(*arguments, **options)):\n"
        "        yield step\n"
        "        if number == 5:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "merging.iter_merge = stopping\n"
        "from ipmerge_core.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, "merge", plan, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert "run the same command again to resume" in done.stderr
    assert not out.exists()
    assert cli.main(["merge", plan, "-o", str(out)]) == 0


@pytest.mark.parametrize("module", ["ipmerge_core.cli.parser", "torch"])
def test_ctrl_c_while_modules_are_imported_is_one_sentence(module: str, pack: str) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from ipmerge_core.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "merge", "plan.json", "-o", "out", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "\nipmerge: interrupted; run the same command again to resume.\n"


def test_a_plan_goes_out_as_a_recipe_and_comes_in_again(
    trio: Trio, tmp_path: Path, capsys: Output
) -> None:
    plan, recipe, again = (str(tmp_path / name) for name in ("p.json", "r.yaml", "q.json"))
    choice = ["--method", "ties", "--set", "density=0.5", "-o", plan]
    assert cli.main(["plan", *models(trio), *choice]) == 0
    assert cli.main(["recipe", plan, "-o", recipe]) == 0
    assert cli.main(["plan", "--recipe", recipe, "-o", again]) == 0
    capsys.readouterr()
    merged = [tmp_path / "one", tmp_path / "two"]
    for path, out in zip((plan, again), merged, strict=True):
        assert cli.main(["merge", path, "-o", str(out)]) == 0
    capsys.readouterr()
    files = [(out / "model.safetensors").read_bytes() for out in merged]
    assert files[0] == files[1]
    fails(["plan", "--recipe", str(tmp_path / "none"), "-o", again], "Cannot read the", capsys)


def test_the_number_of_threads_is_told_where_nobody_chose_it(
    trio: Trio, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["analyse", *models(trio), "-o", str(tmp_path / "pack.json.gz")]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cli.main(arguments) == 0
    assert "one thread" not in capsys.readouterr().err
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cli.main(arguments) == 0
    assert "Computing on CPU with one thread" in capsys.readouterr().err
