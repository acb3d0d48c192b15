"""The kinds of files from outside: how a sound one is made, and what reads it.

Every `Case` prepares a folder with sound files, names those to damage, and gives the commands (or
the function of the app) that read them. Used by `mutations.py`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import write_trio
from safetensors.torch import save_file

import ipmerge_core as ipm
from ipmerge_core.analysis.analyse import iter_pack
from ipmerge_core.analysis.records import read_pack
from ipmerge_core.calibration.store import Measured, Measurements
from ipmerge_core.merging.merge import iter_merge
from ipmerge_core.merging.provenance import read_provenance
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.models.writer import run_folders
from ipmerge_core.planning.mergekit import export_recipe
from ipmerge_core.runtime.jobs import JobStore
from ipmerge_core.ui.chat.recorded import read_records
from ipmerge_core.ui.pairs import DEMO
from ipmerge_core.ui.plan_choice import PlanChoice, read_cells, read_commit

LAYOUTS = {".jsonl": "jsonl", ".journal": "jsonl", ".safetensors": "safetensors", ".yaml": "yaml",
           ".yml": "yaml", ".gz": "gzip"}  # fmt: skip
Commands = Callable[[Path, random.Random], list[list[str]]]


class Case(NamedTuple):
    """A kind of file: its name, how to make sound ones, which to damage, what reads them."""

    name: str
    prepare: Callable[[Path], object]
    patterns: tuple[str, ...]
    commands: Commands = lambda place, chance: []
    function: Callable[[Path], object] | None = None

    def files(self, place: Path) -> list[Path]:
        """The files to damage in a copy."""
        return sorted(path for pattern in self.patterns for path in place.glob(pattern))

    def layout_of(self, path: Path) -> str:
        """How a file is written."""
        return LAYOUTS.get(path.suffix, "json")


def pair_of(place: Path) -> ModelPair:
    return ipm.open_pair(place / "mllm", place / "math", place / "base")


def named(place: Path) -> list[str]:
    return [part for role in ("mllm", "math", "base") for part in (f"--{role}", str(place / role))]


def models(place: Path, **options: object) -> Path:
    trio = write_trio(place, **options)
    shutil.rmtree(trio.math_2)
    return place


# --- packs, plans, recipes -------------------------------------------------------------------


def pack(place: Path) -> None:
    models(place)
    ipm.analyse(pair_of(place)).save(place / "a.pack.json.gz")
    (place / "out").mkdir()


def plain_pack(place: Path) -> None:
    pack(place)
    ipm.Analysis.load(place / "a.pack.json.gz").save(place / "a.json")


def read_a_pack(place: Path, chance: random.Random) -> list[list[str]]:
    name = "a.json" if (place / "a.json").exists() else "a.pack.json.gz"
    how = ["ip_merging", "task_arithmetic", "ties"][chance.randrange(3)]
    return [["plan", str(place / name), "--method", how, "-o", str(place / "out" / "p.json")]]


def plan(place: Path) -> None:
    pack(place)
    analysis = ipm.Analysis.load(place / "a.pack.json.gz")
    options = {"include": "layers", "layer_gains": (0.5, 1.0), "norms": "merge"}
    ipm.make_plan(analysis, "task_arithmetic", **options).save(place / "a.plan.json")
    ipm.make_plan(analysis, similarity_threshold=0.1).save(place / "b.plan.json")
    ipm.make_plan(pair_of(place), "ties").save(place / "c.plan.json")


def use_plans(place: Path, chance: random.Random) -> list[list[str]]:
    number = chance.randrange(3)
    out = str(place / "out" / "o")
    return [
        [["merge", str(path), "-o", out], ["merge", str(path), "-o", out, "--dry-run"],
         ["recipe", str(path), "-o", out]][number]
        if path.name != "b.plan.json"
        else ["adapter", str(path), "-o", out]
        for path in changed(place, "*.plan.json")
    ]  # fmt: skip


def changed(place: Path, pattern: str) -> list[Path]:
    """The file that differs from the sound one: the last written."""
    return [max(place.glob(pattern), key=lambda path: path.stat().st_mtime_ns)]


def recipe(place: Path) -> None:
    models(place)
    (place / "out").mkdir()
    for name, method in (("a", "task_arithmetic"), ("b", "ties"), ("c", "linear")):
        text = export_recipe(ipm.make_plan(pair_of(place), method))
        (place / f"{name}.yaml").write_text(text)


def use_recipe(place: Path, _: random.Random) -> list[list[str]]:
    (path,) = changed(place, "*.yaml")
    return [["plan", "--recipe", str(path), "--base", str(place / "base"),
             "-o", str(place / "out" / "p.json")]]  # fmt: skip


# --- samples and calibrations ----------------------------------------------------------------


def samples(place: Path) -> None:
    models(place)
    lines = [{"question": f"{n} + {n}?", "answer": str(2 * n), "image": None} for n in range(6)]
    (place / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def use_samples(place: Path, _: random.Random) -> list[list[str]]:
    file = str(place / "s.jsonl")
    return [["calibrate", *named(place), "--kind", "gram", "--mllm-samples", file,
             "--math-samples", file,
             "--dry-run", "-o", str(place / "out")]]  # fmt: skip


def calibration(place: Path) -> None:
    """A calibration with made-up Gram matrices."""
    models(place)
    pair, folder = pair_of(place), place / "calibration"
    folder.mkdir()
    measured = []
    for role, model in (("mllm", pair.mllm), ("math", pair.math[0])):
        grams = {m.name: torch.eye(m.shape[1]) for m in pair.matrices}
        save_file(grams, folder / f"{role}-000.safetensors")
        places = {name: (f"{role}-000.safetensors", name) for name in grams}
        measured.append(Measured(role, model.id, model.fingerprint, 4, 99, 1.0, places, 0.1))
    Measurements(folder, "gram", {"kind": "gram"}, tuple(measured)).save()
    (place / "out").mkdir()


def use_calibration(place: Path, chance: random.Random) -> list[list[str]]:
    plan_file = str(place / "out" / "p.json")
    made = ["plan", *named(place), "--method", "regmean", "--calibration",
            str(place / "calibration"), "-o", plan_file]  # fmt: skip
    return [made]


def use_measurements(place: Path, _: random.Random) -> list[list[str]]:
    return [["merge", str(place / "p.json"), "-o", str(place / "out" / "m")]]


def planned_calibration(place: Path) -> None:
    calibration(place)
    folder = place / "calibration"
    ipm.make_plan(pair_of(place), "regmean", calibration=folder).save(place / "p.json")


def unfinished_calibration(place: Path) -> None:
    """What a calibration leaves that could not load its model."""
    models(place)
    folder = place / "calibration"
    folder.mkdir()
    settings = {"kind": "gram", "estimator": "sampled", "image_tokens": True, "wide": "full"}
    record = {"settings": settings, "models": [["mllm", "a" * 64, "b" * 64]]}
    (folder / "calibration.partial.json").write_text(json.dumps(record))


def resume_calibration(place: Path, _: random.Random) -> list[list[str]]:
    return [["calibrate", *named(place), "--kind", "gram", "--limit", "1",
             "-o", str(place / "calibration")]]  # fmt: skip


# --- unfinished work -------------------------------------------------------------------------


def unfinished_merge(place: Path) -> None:
    models(place)
    (place / "out").mkdir()
    made = ipm.make_plan(pair_of(place), "metagpt")
    made.save(place / "p.json")
    steps = iter_merge(made, place / "out" / "m")
    for _, step in zip(range(40), steps, strict=False):
        if step.action != "measured" and step.index > 8:
            break
    steps.close()
    assert run_folders(place / "out" / "m").run.exists()


def resume_merge(place: Path, _: random.Random) -> list[list[str]]:
    return [["merge", str(place / "p.json"), "-o", str(place / "out" / "m"), "--resume"]]


def finished_merge(place: Path) -> None:
    """A merge that was killed after its last rename: the model is whole, its run is not gone."""
    models(place)
    made = ipm.make_plan(pair_of(place), "task_arithmetic")
    made.save(place / "p.json")
    ipm.merge(made, place / "m")
    run = run_folders(place / "m").run
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"run": made.digest}))


def finish_merge(place: Path, _: random.Random) -> list[list[str]]:
    read_provenance(place / "m")
    return [["merge", str(place / "p.json"), "-o", str(place / "m")]]


def unfinished_analysis(place: Path) -> None:
    models(place)
    names = str(place / "mllm"), [str(place / "math")], str(place / "base")
    steps = iter_pack(*names, place / "a.pack.json.gz")
    for _, _ in zip(range(8), steps, strict=False):
        pass
    steps.close()


def resume_analysis(place: Path, _: random.Random) -> list[list[str]]:
    return [["analyse", *named(place), "-o", str(place / "a.pack.json.gz")]]


# --- model folders ---------------------------------------------------------------------------


def sharded(place: Path) -> None:
    models(place, dtype=torch.bfloat16, shards=2)
    (place / "out").mkdir()


def open_models(place: Path, chance: random.Random) -> list[list[str]]:
    made = ["plan", *named(place), "--method", "task_arithmetic",
            "-o", str(place / "out" / "p.json")]  # fmt: skip
    return [["check", *named(place)] if chance.random() < 0.3 else made]


def with_adapter(place: Path) -> None:
    """An expert that is an adapter with every kind of option."""
    models(place, dtype=torch.bfloat16)
    (place / "out").mkdir()
    shutil.rmtree(place / "math")
    (place / "math").mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {"base_model.model.lm_head.weight": torch.ones(20, 16)}
    for layer in range(2):
        for module, rows in (("q_proj", 16), ("v_proj", 8)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(2, 16, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 2, generator=generator)
    save_file(tensors, place / "math" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "base", "revision": None, "r": 1,
        "lora_alpha": 2.0, "rank_pattern": {r".*\.(q|v)_proj": 2}, "alpha_pattern": {"v_proj": 1},
        "use_rslora": True, "use_dora": False, "fan_in_fan_out": False, "bias": "none",
        "init_lora_weights": True, "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*mlp.*", "modules_to_save": ["lm_head"], "lora_dropout": 0.1,
        "layers_to_transform": [0, 1], "layers_pattern": "layers", "lora_bias": False,
    }  # fmt: skip
    (place / "math" / "adapter_config.json").write_text(json.dumps(config))


def with_tokenizers(place: Path) -> None:
    models(place)
    (place / "out").mkdir()
    vocabulary = {f"t{row}": row for row in range(12)}
    for role in ("base", "mllm", "math"):
        content = {
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
            "added_tokens": [{"id": 12, "content": "<s>", "special": True}],
        }
        (place / role / "tokenizer.json").write_text(json.dumps(content))


def share_tokens(place: Path, _: random.Random) -> list[list[str]]:
    return [["plan", *named(place), "--method", "task_arithmetic", "--embeddings", "merge-shared",
             "-o", str(place / "out" / "p.json")]]  # fmt: skip


# --- read by the app -------------------------------------------------------------------------


def job(place: Path) -> None:
    folder = place / "jobs" / ("a" * 32)
    folder.mkdir(parents=True)
    request = {"target": "ipmerge_core.merging.merge:iter_merge", "title": "a merge",
               "arguments": {"out": "m", "device": "cpu"}, "files": {},
               "claim": ["m", "abc"], "key": "c" * 64}  # fmt: skip
    status = {"id": "a" * 32, "title": "a merge", "state": "cancelled", "step": {"index": 3},
              "arguments": {}, "started": 1.5, "updated": 2, "error": ""}  # fmt: skip
    (folder / "job.json").write_text(json.dumps(request))
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "lock").touch()


def list_jobs(place: Path) -> None:
    store = JobStore(place / "jobs")
    (found,) = store.all()  # a damaged job is listed as such
    assert found.id == "a" * 32
    assert store.writer_of("m") is None
    store.status("a" * 32)
    store.holds_key("a" * 32, "key")


def recorded(place: Path) -> None:
    place.mkdir()
    for name in ("recorded.json", "pack.json.gz"):
        shutil.copy(DEMO / name, place / name)
    shutil.copytree(DEMO / "examples", place / "examples")


def show_recorded(place: Path) -> None:
    for example in read_records(place / "recorded.json", place / "pack.json.gz", "pack"):
        assert example.outcome


def commit(place: Path) -> None:
    place.mkdir()
    shutil.copy(DEMO / "pack.json.gz", place)
    name = "model.layers.0.self_attn.q_proj.weight"
    plan = {**PlanChoice(0.3, 2.0).to_browser(), "overrides": {name: "keep"}}
    content = [plan, {"name": name, "expert": 0, "pinned": {"name": name, "expert": 0}}]
    (place / "commit.json").write_text(json.dumps(content))


def take_commit(place: Path) -> None:
    from ipmerge_core.errors import PlanError

    content, analysis = read_pack(place / "pack.json.gz")
    try:  # as gradio parses what a browser sends
        sent = json.loads((place / "commit.json").read_bytes())
        plan, cells = sent
    except (ValueError, TypeError, RecursionError):
        raise PlanError("The browser sent something that is not JSON of two values.") from None
    choice = read_commit(plan, content)
    read_cells(cells, content)
    ipm.make_plan(analysis, **choice.arguments).preview()


CASES = [
    Case("pack", pack, ("a.pack.json.gz",), read_a_pack),
    Case("pack, not compressed", plain_pack, ("a.json",), read_a_pack),
    Case("plan", plan, ("*.plan.json",), use_plans),
    Case("recipe", recipe, ("*.yaml",), use_recipe),
    Case("samples", samples, ("s.jsonl",), use_samples),
    Case("calibration", calibration, ("calibration/calibration.json",), use_calibration),
    Case("measurements", planned_calibration, ("calibration/*.safetensors",), use_measurements),
    Case("unfinished calibration", unfinished_calibration, ("calibration/*",), resume_calibration),
    Case("unfinished merge", unfinished_merge, ("out/*/*.json*",), resume_merge),
    Case("manifest", finished_merge, ("m/ipmerge.json", "*.partial/*"), finish_merge),
    Case("unfinished analysis", unfinished_analysis, ("*.journal",), resume_analysis),
    Case("index", sharded, ("*/*.index.json",), open_models),
    Case("header", sharded, ("*/*.safetensors",), open_models),
    Case("config", sharded, ("*/config.json",), open_models),
    Case("adapter", with_adapter, ("math/*.json", "math/*.safetensors"), open_models),
    Case("tokenizer", with_tokenizers, ("*/tokenizer.json",), share_tokens),
    Case("job", job, ("jobs/*/*.json",), function=list_jobs),
    Case("recorded answers", recorded, ("recorded.json",), function=show_recorded),
    Case("commit", commit, ("commit.json",), function=take_commit),
]
