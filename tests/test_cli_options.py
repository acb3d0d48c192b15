"""Every option of every command acts, or is refused: a walk over the parser in all its forms."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import TEXT_CONFIG, Trio, fine_tuned, text_weights, write_model

from ipmerge_core import cli
from ipmerge_core.analysis.records import read_pack
from ipmerge_core.cli.combinations import RULES, is_given
from ipmerge_core.cli.parser import make_parser
from ipmerge_core.evaluation.knockout import Knockout
from ipmerge_core.evaluation.report import Report
from ipmerge_core.evaluation.sweeps import Sweep
from ipmerge_core.planning.choice_file import FORMAT, VERSION

NAME = "model.layers.0.self_attn.q_proj.weight"
COMMON = {"help", "quiet", "json"}  # how a result is shown: tests/test_cli.py, and below
CONDITIONAL = {"strict", "force"}  # they act where the check has a warning or a refusal
# Options whose effect needs models that can run, or tokenizers: tested where those are.
TESTED_ELSEWHERE = {
    ("plan", "calibration"),
    ("plan", "embeddings"),
    ("plan", "input_share"),
    ("evaluate", "base"),
}


def parsers() -> dict[str, argparse.ArgumentParser]:
    found = next(a for a in make_parser()._actions if isinstance(a.choices, dict))
    return dict(found.choices)


class Captured(BaseException):
    """Ends a command where its work would start, with what it was asked to do."""


class Outcome(NamedTuple):
    """What a command did: its exit code, its output, the file it wrote, the work it started."""

    code: int
    printed: str
    written: str
    asked: str


@pytest.fixture(scope="module")
def files(trio: Trio, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Packs, plans and recipes of a trio, and a copy of the trio at another place."""
    folder = tmp_path_factory.mktemp("options")
    moved = {role: shutil.copytree(getattr(trio, role), folder / role) for role in trio._fields}
    known = {"folder": folder, "trio": trio, "moved": Trio(**moved)}
    known["alien"] = write_model(folder / "alien", text_weights(seed=5), TEXT_CONFIG)
    models = [f"--{r}={getattr(trio, r)}" for r in ("mllm", "math", "base")]
    known["models"] = models
    known["base 2"] = shutil.copytree(trio.base, folder / "base2")
    weights = text_weights()
    config = {**TEXT_CONFIG, "rope_theta": 1e6}
    known["warned"] = write_model(folder / "warned", fine_tuned(weights, 2), config)
    (folder / "samples.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    for name, arguments in {
        "pack.json.gz": ["analyse", *models],
        "other.json.gz": ["analyse", *models, "--rank", "3"],
        "own.json.gz": ["analyse", *models, "--base-mllm", str(moved["base"])],
        "own.json": ["plan", str(folder / "own.json.gz")],
        "ip.json": ["plan", str(folder / "pack.json.gz")],
        "ta.json": ["plan", *models, "--method", "task_arithmetic"],
        "linear.json": ["plan", *models, "--method", "linear"],
        "graded.json": ["plan", *models, "--method", "task_arithmetic", "--layer-gains", "0", "1"],
        "ta.yaml": ["recipe", str(folder / "ta.json")],
        "linear.yaml": ["recipe", str(folder / "linear.json")],
        "graded.yaml": ["recipe", str(folder / "graded.json")],
    }.items():
        known[name] = str(folder / name)
        with contextlib.redirect_stdout(io.StringIO()):
            assert cli.main([*arguments, "--quiet", "-o", known[name]]) == 0
    for name, method in (("table.csv", "linear"), ("other.csv", "ties")):
        known[name] = str(folder / name)
        rows = "".join(f"{method},{x},{x * x}\n" for x in (0, 0.5, 1))
        (folder / name).write_text(f"method,x,score\n{rows}")
    (folder / "picture.png").write_bytes(b"x")
    line = '{"question": "1 + 1", "answer": "2", "image": "picture.png"}\n'
    for name, lines in (("prompts.jsonl", line), ("more.jsonl", 2 * line)):
        known[name] = str(folder / name)
        (folder / name).write_text(lines)
    pack = read_pack(folder / "pack.json.gz")[0]
    pair = {"id": "of-another-machine", **{k: pack[k] for k in ("name", "created", "parameters")}}
    choice = {"format": FORMAT, "version": VERSION, "pair": pair}
    for name, arguments in (("choice.json", {}), ("ties.json", {"method": "ties"})):
        known[name] = str(folder / name)
        (folder / name).write_text(json.dumps({**choice, "arguments": arguments}))
    return known


def forms_of(command: str, files: dict[str, Any]) -> dict[str, list[str]]:
    """The ways to call a command that differ in what they use."""
    models, pack = files["models"], files["pack.json.gz"]
    alien = [*models, f"--base={files['alien']}"]
    mllm = str(files["trio"].mllm)
    found: dict[str, dict[str, list[str]]] = {
        "check": {
            "models": models,
            "refused": alien,
            "warned": [*models[::2], f"--math={files['warned']}"],
        },
        "analyse": {"models": models, "quick": [*models, "--quick"], "refused": alien},
        "calibrate": {
            f"{kind}{dry}": [*models, "--limit", "3", "--kind", kind, *dry.split()]
            for kind in ("gram", "fisher")
            for dry in ("", " --dry-run")
        },
        "plan": {
            "pack": [pack],
            "pack, ties": [pack, "--method", "ties"],
            "models": [*models, "--method", "task_arithmetic"],
            "recipe": ["--recipe", files["ta.yaml"]],
            "recipe without base": ["--recipe", files["linear.yaml"], models[2]],
            "recipe with gains": ["--recipe", files["graded.yaml"]],
            "measure": [*models, "--method", "metagpt", "--measure"],
            "unmeasured": [*models, "--method", "metagpt"],
        },
        "recipe": {"plan": [files["ta.json"]], "app": [files["ties.json"]]},
        "merge": {
            "plan": [files["ip.json"]],
            "dry": [files["ip.json"], "--dry-run"],
            "own base": [files["own.json"]],
            "app": [files["choice.json"]],
        },
        "adapter": {
            "plan": [files["ip.json"]],
            "own base": [files["own.json"]],
            "app": [files["choice.json"]],
        },
        "drift": {
            form: [*models[:2], "--data", "demo", *more]
            for form, more in (
                ("adaptive", []),
                ("absolute", ["--rule", "absolute"]),
                ("fine-tuning", ["--rule", "none"]),
                ("dry", ["--dry-run"]),
            )
        },
        "chat": {"one": ["A", "--prompt", "q"], "two": ["A", "--compare", "B", "--prompt", "q"]},
        "record": {
            name: [files[plan], "--prompts", files["prompts.jsonl"]]
            for name, plan in {
                "plan": "ip.json",
                "own base": "own.json",
                "app": "choice.json",
            }.items()
        },
        "evaluate": {
            "models": [mllm, "--tasks", "demo"],
            "math": [mllm, "--tasks", "demo:math"],
            "lmms-eval": [mllm, "--tasks", "mmmu_val", "--harness", "lmms-eval",
                          "--harness-python", "python"],
            "no harness": [mllm, "--tasks", "MMStar", "--harness-model", "LLaVA_Next"],
            "vlmevalkit": [mllm, "--tasks", "MMStar", "--harness", "vlmevalkit",
                           "--harness-model", "LLaVA_Next"],
        },
        "search": {
            "demo": [pack, "--tasks", "demo"],
            "math": [pack, "--tasks", "demo:math"],
            "own base": [files["own.json.gz"], "--tasks", "demo"],
        },
        "replay": {"table": [files["table.csv"]]},
        "sweep": {
            "one": [pack, "--parameter", "lambda", "--values", "1,2", "--tasks", "demo:math"],
            "two": [pack, "--parameter", "lambda", "--values", "1,2", "--parameter2",
                    "similarity-threshold", "--values2", "0.1,0.2", "--tasks", "demo:math"],
            "ablation": [pack, "--ablation", "--tasks", "demo:math"],
            "own base": [files["own.json.gz"], "--ablation", "--tasks", "demo:math"],
            "nothing": [pack, "--tasks", "demo:math"],
        },
        "experiment": {
            f"{form}{dry}": [*models, *tasks, *dry.split()]
            for form, tasks in (("usual", []), ("math", ["--tasks", "demo:math"]))
            for dry in ("", " --dry-run")
        },
        "knockout": {
            "plan": [files["ip.json"], "--tasks", "demo:math"],
            "app": [files["choice.json"], "--tasks", "demo:math"],
            "own base": [files["own.json"], "--tasks", "demo:math"],
            "folder": [mllm, "--tasks", "demo:math"],
        },
        "app": {"app": []},
    }  # fmt: skip
    return found[command]


def values_of(command: str, files: dict[str, Any]) -> dict[str, list[str]]:
    """Another value of every option, by its destination."""
    moved = files["moved"]
    others = {  # `check` shows no places: other models are needed to see a difference
        "mllm": ["--mllm", str(moved.math_2)],
        "math": ["--math", str(moved.math_2)],
        "base": ["--base", str(files["alien"])],
    }
    return {
        "mllm": ["--mllm", str(moved.mllm)],
        "math": ["--math", str(moved.math)],
        "base": ["--base", str(moved.base)],
        "base_mllm": ["--base-mllm", str(files["base 2"])],
        "strict": ["--strict"],
        "exact": ["--exact"],
        "output": ["-o", str(files["folder"] / "other")],
        "device": ["--device", "cuda:7"],
        "rank": ["--rank", "3"],
        "temperature": ["--temperature", "8"],
        "directions": ["--directions", "all"],
        "quick": ["--quick"],
        "force": ["--force"],
        "kind": ["--kind", "fisher"],
        "mllm_samples": ["--mllm-samples", str(files["folder"] / "samples.jsonl")],
        "math_samples": ["--math-samples", str(files["folder"] / "samples.jsonl")],
        "limit": ["--limit", "2"],
        "estimator": ["--estimator", "empirical"],
        "wide": ["--wide", "diagonal"],
        "image_tokens": ["--no-image-tokens"],
        "dry_run": ["--dry-run"],
        "pack": [
            files["other.json.gz" if command in ("plan", "search", "sweep") else "pack.json.gz"]
        ],
        "method": ["--method", "dare_linear"],
        "similarity_threshold": ["--similarity-threshold", "0.9"],
        "similarity": ["--similarity", "max"],
        "lambda_": ["--lambda", "2"],
        "set": ["--set", "temperature=8"],
        "calibration": ["--calibration", str(files["folder"])],
        "measure": ["--measure"],
        "modules": ["--modules", "all"],
        "include": ["--include", "q_proj"],
        "exclude": ["--exclude", "q_proj"],
        "force_merge": ["--force-merge", NAME, "--similarity-threshold", "1"],
        "force_keep": ["--force-keep", NAME],
        "layer_gains": ["--layer-gains", "0", "1"],
        "layer_profile": ["--layer-profile", "upper_half"],
        "input_share": ["--input-share", "0.5"],
        "norms": ["--norms", "merge"],
        "embeddings": ["--embeddings", "merge-shared"],
        "anchor": ["--anchor", "root"],
        "recipe": ["--recipe", files["ta.yaml"]],
        "plan": [files["graded.json"]],
        "resume": ["--no-resume"],
        "tolerance": ["--tolerance", "0.1"],
        "max_rank": ["--max-rank", "3"],
        "updates": ["--updates", str(files["folder"] / "updates")],
        "model": ["C"],
        "compare": ["--compare", "C"],
        "image": ["--image", str(files["folder"] / "picture.png")],
        "prompt": ["--prompt", "another"],
        "max_new_tokens": ["--max-new-tokens", "3"],
        "max_thinking_tokens": ["--max-thinking-tokens", "7"],
        "precision": ["--precision", "bf16"],
        "prompts": ["--prompts", str(files["more.jsonl"])],
        "max_reply_tokens": ["--max-reply-tokens", "3"],
        "models": [str(moved.math_2)],
        "tasks": ["--tasks", "demo:shape"],
        "seed": ["--seed", "5"],
        "batch_size": ["--batch-size", "3"],
        "store": ["--store", str(files["folder"] / "store")],
        "no_guard": ["--no-guard"],
        "harness": ["--harness", "vlmevalkit"],
        "harness_python": ["--harness-python", "other"],
        "harness_model": ["--harness-model", "Other"],
        "harness_include": ["--harness-include", str(files["folder"])],
        "parameter": ["--parameter", "temperature"],
        "values": ["--values", "3,4"],
        "parameter2": ["--parameter2", "temperature", "--values2", "3"],
        "values2": ["--values2", "0.3"],
        "ablation": ["--ablation"],
        "controls": ["--controls", "1"],
        "replace_by": ["--replace-by", "zero"],
        "layers": ["--layers", "0,1"],
        "stride": ["--stride", "2"],
        "csv": ["--csv", str(files["folder"] / "rows.csv")],
        "map": ["--map", str(files["folder"] / "map.json")],
        "host": ["--host", "0.0.0.0"],
        "port": ["--port", "7999"],
        "range": ["--range", "lambda=0:3"],
        "optimizer": ["--optimizer", "random"],
        "budget": ["--budget", "7"],
        "items": ["--items", "70"],
        "minutes": ["--minutes", "3"],
        "maximise": ["--maximise", "math"],
        "validation": ["--validation", "0.3"],
        "racing": ["--racing"],
        "no_labels": ["--no-labels", "--optimizer", "grid"],
        "search_seed": ["--search-seed", "4"],
        "storage": ["--storage", "sqlite://"],
        "worker": ["--worker", "3"],
        "table": [files["other.csv"]],
        "seeds": ["--seeds", "3"],
        "data": ["--data", "demo:mul"],
        "math_base": ["--math-base", str(moved.base)],
        "rule": ["--rule", "grad_norm"],
        "strength": ["--strength", "2"],
        "skip_first_layers": ["--skip-first-layers", "1"],
        "last_layer": ["--last-layer", "1"],
        "biases": ["--no-biases"],
        "module_strength": ["--module-strength", "mlp=0.5"],
        "per_micro_batch": ["--per-micro-batch"],
        "normalize_prior": ["--normalize-prior"],
        "prior_on": ["--prior-on", "files"],
        "learning_rate": ["--learning-rate", "0.5"],
        "epochs": ["--epochs", "7"],
        "max_steps": ["--max-steps", "7"],
        "accumulation": ["--accumulation", "7"],
        "warmup": ["--warmup", "0.5"],
        "weight_decay": ["--weight-decay", "0.5"],
        "max_grad_norm": ["--max-grad-norm", "7"],
        "longest": ["--longest", "70"],
        "most_pixels": ["--most-pixels", "700"],
        "held_out": ["--held-out", "0.2"],
        "patience": ["--patience", "2", "--held-out", "0.2"],
        "save_every": ["--save-every", "7"],
        "log_every": ["--log-every", "7"],
        "trained": ["--trained", "all"],
        "schedule": ["--schedule", "linear"],
        "gradient_checkpointing": ["--gradient-checkpointing"],
        "add_token": ["--add-token", "<think>"],
        "report_to": ["--report-to", "trackio"],
        "baseline": ["--baseline", "dare-ties", "--base", str(moved.base)],
        "keep_checkpoints": ["--keep-checkpoints"],
        "show_examples": ["--show-examples", "1"],
        **(others if command == "check" else {}),
        **(
            {
                "modules": ["--modules", "attn"],
                "base": ["--base", str(moved.base), "--baseline", "ties"],
            }
            if command == "drift"
            else {}
        ),
        # a second expert, as a copy of the first is refused
        **({"math": others["math"]} if command == "analyse" else {}),
        **(
            {"modules": ["--modules", "q"], "model": [files["graded.json"]]}
            if command == "knockout"
            else {}
        ),
    }


WORK = {
    "ipmerge_core.analysis.analyse.iter_pack_of": "analyse",
    "ipmerge_core.calibration.calibrate.iter_calibration": "calibrate",
    "ipmerge_core.calibration.calibrate.estimate_calibration": "calibrate",
    "ipmerge_core.merging.merge.iter_merge": "merge",
    "ipmerge_core.merging.merge.estimate_merge": "merge",
    "ipmerge_core.adapters.export.iter_adapter": "adapter",
    "ipmerge_core.finetuning.baselines.check_baselines": "drift",
    "ipmerge_core.finetuning.train.iter_drift": "drift",
    "ipmerge_core.finetuning.train.check_drift": "drift",
    "ipmerge_core.inference.generation.answer": "chat",
    "ipmerge_core.evaluation.recording.iter_recording": "record",
    "ipmerge_core.evaluation.evaluate.iter_evaluation": "evaluate",
    "ipmerge_core.evaluation.harness.run_lmms_eval": "evaluate",
    "ipmerge_core.search.coefficients.iter_search": "search",
    "ipmerge_core.plots.replay_report.iter_replay_report": "replay",
    "ipmerge_core.evaluation.sweeps.iter_sweep": "sweep",
    "ipmerge_core.evaluation.sweeps.iter_ablation": "sweep",
    "ipmerge_core.evaluation.experiment.iter_experiment": "experiment",
    "ipmerge_core.evaluation.experiment_estimate.estimate_experiment": "experiment",
    "ipmerge_core.evaluation.knockout.iter_knockout": "knockout",
    "ipmerge_core.evaluation.knockout.iter_model_knockout": "knockout",
    "ipmerge_core.ui.app.launch": "app",
}
RETURNS = ("evaluate", "sweep", "knockout")  # their work gives a result, which they write


def finished(place: str) -> object:
    """What the work of evaluations returns, which they write to --output."""
    if place.endswith("run_lmms_eval"):
        return []
    report = Report("", {}, {}, {}, (), (), (), {})

    def evaluated() -> Generator[None, None, object]:
        if "sweeps" in place:
            return Sweep("sweep", "", None, (), (), report)
        return Knockout("", "", "", (), {}) if "knockout" in place else report
        yield

    return evaluated()


def described(value: object) -> object:
    """What an argument of some work is, without the address of an object."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "roles"):
        return [model.id for _, model in value.roles()]
    return [repr(part)[:200] for part in value] if isinstance(value, list) else str(value)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace the work of one command by a capture of its arguments, and allow every device."""

    def measured(plan: object, *, device: str) -> Generator[None, None, object]:
        print("measured on", device)
        return plan
        yield

    def capture(command: str) -> None:
        monkeypatch.setattr("ipmerge_core.merging.whole_model.iter_first_pass", measured)
        for place, owner in WORK.items():
            if owner == command:

                def work(*arguments: object, _place: str = place, **options: object) -> object:
                    shown = [_place, *map(described, arguments)]
                    named = {name: described(value) for name, value in options.items()}
                    asked = json.dumps([shown, named], sort_keys=True, default=str)
                    if command in RETURNS:
                        print(asked)
                        return finished(_place)
                    if command != "chat":  # whose two models are asked one after the other
                        raise Captured(asked)
                    print(asked)
                    return None

                monkeypatch.setattr(place, work)
        monkeypatch.setattr(
            "ipmerge_core.runtime.devices.resolve_device", lambda name="auto", **_: name
        )

    return capture


def outcome_of(command: str, arguments: list[str], output: Path | None) -> Outcome:
    """Run a command and say what it did."""
    written, asked, code = "", "", 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        try:
            code = cli.main([command, *arguments])
        except Captured as found:
            asked = str(found)
        except SystemExit as end:
            code = int(str(end.code))
    if output is not None and output.is_file():
        written = output.read_text()
        output.unlink()
    if code == 2 and "Traceback" in stderr.getvalue():
        raise AssertionError(stderr.getvalue())
    return Outcome(code, stdout.getvalue(), written, asked)


@pytest.mark.parametrize("command", sorted(parsers()))
def test_every_option_acts_or_is_refused_in_every_form(
    command: str, files: dict[str, Any], tmp_path: Path, captured: Callable[[str], None]
) -> None:
    captured(command)
    actions = {action.dest: action for action in parsers()[command]._actions}
    takes_output = "output" in actions
    values, acting = values_of(command, files), set()
    for form, base in forms_of(command, files).items():
        target = tmp_path / "target"
        output = ["-o", str(target)] if takes_output else []
        plain = outcome_of(command, [*base, *output], target)
        for name in [each for each in actions.keys() - COMMON if not repeats(base, values[each])]:
            arguments = with_option(base, actions[name], values[name])
            found = outcome_of(command, [*output, *arguments], target)
            (files["folder"] / "other").unlink(missing_ok=True)
            if found == plain:
                excused = plain.code == 2 or name in CONDITIONAL
                assert excused, f"{command}, {form}: {values[name]} does nothing"
            elif found.code != 2 or found.printed:
                acting.add(name)
    idle = actions.keys() - COMMON - acting
    assert {(command, name) for name in idle} <= TESTED_ELSEWHERE, "never acts"


def repeats(base: list[str], words: list[str]) -> bool:
    """Whether arguments already have this option with this value."""
    return " ".join(words) in " ".join(base)


def with_option(base: list[str], action: argparse.Action, words: list[str]) -> list[str]:
    """Add an option to arguments; a positional one takes the place of another."""
    if action.option_strings:
        named = words if words[0].startswith("-") else [action.option_strings[0], *words]
        return [*base, *named]
    return [*words, *(base[1:] if base and not base[0].startswith("-") else base)]


def test_the_rules_name_options_of_their_command() -> None:
    for command, rules in RULES.items():
        known = {action.dest for action in parsers()[command]._actions}
        for rule in rules:
            assert set(rule.names) <= known, command


def test_an_option_whose_effect_depends_on_others_has_no_default() -> None:
    """A default would look as if it had been given."""
    for command, rules in RULES.items():
        defaults = {action.dest: action.default for action in parsers()[command]._actions}
        for rule in rules:
            for name in rule.names:
                assert not is_given(argparse.Namespace(**defaults), name), (command, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "temperature=8", "--set", "temperature=9"], "given 2 times"),
        (["--set", "method=ties"], "Use --method"),
        (["--set", "lambda_=3"], "Use --lambda"),
        (["--set", "include=q_proj"], "Use --include"),
        (["--set", "overrides=1"], "Use --force-merge and --force-keep"),
        (["--force-merge", NAME, "--force-keep", NAME], "both --force-merge and --force-keep"),
        (["--measure"], "--measure has no effect"),
        (["--device", "cpu"], "--device has no effect without --measure"),
        (["--method", "ties", "--similarity", "first"], "--similarity has no effect with TIES"),
        (["--method", "ties", "--lambda", "1"], "--lambda has no effect with TIES"),
    ],
)
def test_what_does_not_go_together_is_named(
    words: list[str], message: str, files: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    target = tmp_path / "p.json"
    assert cli.main(["plan", files["pack.json.gz"], *words, "-o", str(target)]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["PACK"], ["--mllm", "x"], ["--math", "x"], ["--base-mllm", "x"], ["--method", "ties"],
        ["--similarity-threshold", "0.4"], ["--similarity", "first"], ["--lambda", "1"],
        ["--set", "density=0.2"], ["--calibration", "x"], ["--base", "x"],
    ],
)  # fmt: skip
def test_a_recipe_takes_no_second_models_or_method(
    words: list[str], files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", *words, "--recipe", files["ta.yaml"], "-o", str(tmp_path / "p.json")]
    assert cli.main(arguments) == 2
    assert f"{words[0]} has no effect" in capsys.readouterr().err


def test_the_same_model_twice_is_not_a_comparison(
    trio: Trio, capsys: pytest.CaptureFixture[str]
) -> None:
    same = str(trio.mllm / ".." / trio.mllm.name)
    assert cli.main(["chat", str(trio.mllm), "--compare", same, "--prompt", "q"]) == 2
    assert "are the same model" in capsys.readouterr().err


def test_the_app_speaks_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: dict[str, object] = {}

    def launch(*_: object, **options: object) -> tuple[None, str, str]:
        served.update(options)
        return None, "http://127.0.0.1:7999/", ""

    monkeypatch.setattr("ipmerge_core.ui.app.launch", launch)
    monkeypatch.setattr("ipmerge_core.cli.commands.Event.wait", lambda _: None)
    assert cli.main(["app", "--json", "--port", "7999"]) == 0
    assert json.loads(capsys.readouterr().out)["address"] == "http://127.0.0.1:7999/"
    assert served == {"block": False, "device": "auto", "precision": "auto", "quiet": True}


@pytest.mark.parametrize("error", [OSError("Cannot find empty port"), OverflowError("port")])
def test_a_port_that_cannot_be_used_is_named(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("ipmerge_core.ui.app.launch", launch)
    assert cli.main(["app", "--port", "7999"]) == 2
    assert "port 7999" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "CUDA", "cuda:99", "cuda:x", "", "mps:3", "cpu:1"])
def test_every_command_that_computes_refuses_a_device_that_is_not_there(
    device: str, files: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, parser in parsers().items():
        if "device" not in {action.dest for action in parser._actions}:
            assert command in ("check", "recipe", "replay"), f"{command} computes without --device"
            continue
        forms = forms_of(command, files)
        form = forms["measure"] if command == "plan" else next(iter(forms.values()))
        output = ["-o", str(tmp_path / "x")] if command not in ("chat", "app") else []
        assert cli.main([command, *form, *output, "--device", device]) == 2, command
        message = capsys.readouterr().err
        assert "one of: " in message or "available device: " in message
        assert "cpu" in message
    assert list(tmp_path.iterdir()) == []
