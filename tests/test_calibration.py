"""Calibration on the demo trio: what is measured, in groups, with resumes, and used in a merge."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from full_disk import no_room
from PIL import Image

from ipmerge_core.calibration.calibrate import (
    calibrate,
    estimate_calibration,
    iter_calibration,
    iter_calibration_of,
)
from ipmerge_core.calibration.passes import CalibrationSettings, Passes, encode_sample, find_module
from ipmerge_core.calibration.samples import (
    MOST_SAMPLES,
    Sample,
    check_source,
    load_samples,
)
from ipmerge_core.calibration.store import Measurements
from ipmerge_core.cli import main
from ipmerge_core.errors import CheckpointError, ModelLoadError, PairingError, PlanError, RunError
from ipmerge_core.inference.loading import load_model
from ipmerge_core.merging.merge import merge
from ipmerge_core.methods import METHODS
from ipmerge_core.models.checkpoint import Checkpoint
from ipmerge_core.models.files import local_copy
from ipmerge_core.models.pairing import open_pair
from ipmerge_core.planning.plan import MergePlan, make_plan
from ipmerge_core.tasks.demo import MATH_TASKS, PERCEPTION_TASKS, problems

DEMO = Path(__file__).parents[1] / "assets" / "demo"
GRAM, FISHER = CalibrationSettings("gram"), CalibrationSettings("fisher")
QUERY = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def pair():
    return open_pair(DEMO / "mllm", DEMO / "math", DEMO / "base")


@pytest.fixture(scope="module")
def samples():
    return load_samples("demo", 3, takes_images=True), load_samples("demo", 4, takes_images=False)


@pytest.fixture(scope="module")
def grams(pair, samples, tmp_path_factory):
    return calibrate(pair, tmp_path_factory.mktemp("grams") / "out", GRAM, *samples)


@pytest.fixture(scope="module")
def information(pair, samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("information") / "out"
    return calibrate(pair, out, replace(FISHER, estimator="empirical"), *samples)


def inputs_of(folder, module, samples):
    """What a layer reads, from full forward passes."""
    loaded = load_model(folder)
    seen = []
    layer = dict(loaded.model.named_modules())[module]
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0][0].double()))
    with torch.no_grad():
        for sample in samples:
            loaded.model(**encode_sample(loaded, sample)[0])
    return torch.cat(seen)


def test_grams_are_means_over_the_tokens_of_all_samples(grams, samples):
    for name, module in [
        (QUERY, "model.language_model.layers.1.self_attn.q_proj"),
        (DOWN, "model.language_model.layers.2.mlp.down_proj"),
    ]:
        x = inputs_of(DEMO / "mllm", module, samples[0])
        measured = grams.inputs(name, [0])["mllm_gram"]
        assert torch.allclose(measured.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert grams.models[0].tokens == len(x)
    x = inputs_of(DEMO / "math", "model.layers.2.mlp.down_proj", samples[1])
    (measured,) = grams.inputs(DOWN, [0])["math_gram"]
    assert torch.allclose(measured.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_matrices_that_read_one_input_share_one_gram(grams):
    query = grams.inputs(QUERY, [0])["mllm_gram"]
    for other in ("k_proj", "v_proj"):
        same = grams.inputs(QUERY.replace("q_proj", other), [0])["mllm_gram"]
        assert torch.equal(query, same)
    stored = set(grams.models[0].places.values())
    assert len(grams.models[0].places) == 4 * 7
    assert len(stored) == 4 * 4


def test_fisher_is_the_mean_of_squared_gradients_one_sample_at_a_time(information, samples):
    loaded = load_model(DEMO / "math")
    weight = loaded.model.model.layers[1].self_attn.q_proj.weight
    total = torch.zeros_like(weight)
    for sample in samples[1]:
        inputs, answer = encode_sample(loaded, sample)
        labels = inputs["input_ids"].clone()
        labels[0, :-answer] = -100
        loss = loaded.model(**inputs, labels=labels).loss
        total += torch.autograd.grad(loss, weight)[0] ** 2
    (measured,) = information.inputs(QUERY, [0])["math_fisher"]
    assert torch.allclose(measured, total.detach() / len(samples[1]), rtol=1e-3, atol=1e-12)
    norm2 = 0.0
    for name in information.models[1].places:
        norm2 += float(information.inputs(name, [0])["math_fisher"][0].double().square().sum())
    assert information.statistic(["norm"])[1] == pytest.approx(norm2**0.5)


def test_sampled_fisher_draws_answers_by_a_stream_of_its_own(pair, samples, tmp_path):
    few = samples[0][:1], samples[1][:2]
    first = calibrate(pair, tmp_path / "a", FISHER, *few)
    torch.manual_seed(5)
    again = calibrate(pair, tmp_path / "b", FISHER, *few)
    other = calibrate(pair, tmp_path / "c", replace(FISHER, seed=1), *few)
    found = [m.inputs(QUERY, [0])["math_fisher"][0] for m in (first, again, other)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_small_budgets_measure_in_groups_to_the_same_numbers(pair, samples, tmp_path, grams):
    tight = replace(GRAM, memory=700_000)
    steps = list(iter_calibration(pair, tmp_path / "out", tight, *samples))
    assert steps[0].groups > 2
    assert steps[-1].done == steps[-1].total == steps[0].groups * 7
    measured = Measurements.open(tmp_path / "out")
    for name in (QUERY, DOWN):
        one, other = measured.inputs(name, [0]), grams.inputs(name, [0])
        assert torch.equal(one["mllm_gram"], other["mllm_gram"])
    assert measured.statistic(["norm"]) == pytest.approx(grams.statistic(["norm"]))


def test_a_stopped_run_goes_on_and_ends_with_the_same_files(pair, samples, tmp_path):
    tight = replace(GRAM, memory=700_000)
    whole = calibrate(pair, tmp_path / "whole", tight, *samples)
    run = iter_calibration(pair, tmp_path / "cut", tight, *samples)
    for _ in range(8):
        next(run)
    run.close()
    with pytest.raises(CheckpointError, match="no finished calibration"):
        Measurements.open(tmp_path / "cut")
    steps = list(iter_calibration(pair, tmp_path / "cut", tight, *samples))
    assert [step.action for step in steps[:2]] == ["resumed", "resumed"]
    assert steps[-1].done == steps[-1].total
    cut = Measurements.open(tmp_path / "cut")
    assert cut.models == whole.models
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()


def test_a_full_disk_ends_in_one_sentence_and_the_run_goes_on(pair, samples, tmp_path, grams):
    out = tmp_path / "out"
    with no_room(5000), pytest.raises(RunError, match="Cannot write to .*are kept"):
        calibrate(pair, out, GRAM, *samples)
    assert not out.exists()  # nothing was measured
    assert calibrate(pair, out, GRAM, *samples).models == grams.models


def test_weights_that_are_written_during_a_run_leave_no_measurements(samples, tmp_path):
    folders = [shutil.copytree(DEMO / role, tmp_path / role) for role in ("mllm", "math", "base")]
    changing = open_pair(*folders)
    steps = iter_calibration(changing, tmp_path / "out", GRAM, *samples)
    next(steps)
    weights = next(folders[1].glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(PairingError, match="was written while it was in use"):
        list(steps)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_with_anything_else_is_left_alone(pair, samples, tmp_path, grams):
    with pytest.raises(RunError, match="a finished calibration"):
        calibrate(pair, grams.folder, GRAM, *samples)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="other files"):
        calibrate(pair, tmp_path, GRAM, *samples)


def test_image_tokens_can_be_left_out(pair, samples, grams, tmp_path):
    text_only = calibrate(pair, tmp_path / "out", replace(GRAM, image_tokens=False), *samples)
    missing = grams.models[0].tokens - text_only.models[0].tokens
    assert missing == 16 * len(samples[0])
    assert text_only.models[1].tokens == grams.models[1].tokens


def test_wide_grams_can_be_kept_as_diagonals(pair, samples, grams, tmp_path):
    narrow = calibrate(pair, tmp_path / "out", replace(GRAM, wide="diagonal"), *samples)
    kept = narrow.inputs(DOWN, [0])["mllm_gram"]
    full = grams.inputs(DOWN, [0])["mllm_gram"]
    assert torch.allclose(kept, full.diagonal(), rtol=1e-4, atol=1e-6)
    matrix = next(m for m in pair.matrices if m.name == DOWN)
    merged = METHODS["regmean"](*read(pair, matrix), **narrow.inputs(DOWN, [0]))
    assert merged.isfinite().all()


def read(pair, matrix):
    models = (pair.base, matrix.name), (pair.mllm, matrix.mllm), (pair.math[0], matrix.math[0])
    return [model.read_matrix(name) for model, name in models]


def test_measurements_are_what_the_methods_ask_for(pair, grams, information):
    for matrix in pair.matrices[:7]:
        base, mllm, math = read(pair, matrix)
        merged = METHODS["regmean"](base, mllm, math, **grams.inputs(matrix.name, [0]))
        x = grams.inputs(matrix.name, [0])
        loss = [
            sum(
                float((((W - own).double() @ G.double()) * (W - own).double()).sum())
                for own, G in ((mllm, x["mllm_gram"]), (math, x["math_gram"][0]))
            )
            for W in (merged, (mllm + math) / 2)
        ]
        assert loss[0] < loss[1]  # closer to both models on their own inputs than the mean
        data = information.inputs(matrix.name, [0])
        fisher = METHODS["fisher"]
        found = information.statistic(("norm", "mean"))
        merged = fisher(base, mllm, math, statistic=found, **data)
        low, high = torch.minimum(mllm, math), torch.maximum(mllm, math)
        assert (merged >= low - 1e-6).all()
        assert (merged <= high + 1e-6).all()


def test_measurements_of_other_models_or_another_kind_are_refused(pair, grams):
    mllm, math = pair.mllm, pair.math[0]
    grams.check([mllm, math], "gram")
    with pytest.raises(PairingError, match="--kind fisher"):
        grams.check([mllm, math], "fisher")
    with pytest.raises(PairingError, match="have changed since the calibration"):
        grams.check([mllm, pair.base], "gram")
    with pytest.raises(PairingError, match="1 math models, but 2 are merged"):
        grams.check([mllm, math, math], "gram")


@pytest.mark.parametrize(("method", "kind"), [("regmean", "grams"), ("fisher", "information")])
def test_a_plan_with_a_calibration_merges_the_whole_model(method, kind, pair, tmp_path, request):
    measured = request.getfixturevalue(kind)
    plan = make_plan(pair, method, calibration=measured.folder, exclude="mlp")
    plan.save(tmp_path / "plan.json")
    plan = MergePlan.load(tmp_path / "plan.json")
    merge(plan, tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    matrix = next(m for m in pair.matrices if m.name == QUERY)
    numbers = {"statistic": measured.statistic(("norm", "mean"))}
    statistic = numbers if method == "fisher" else {}
    data = measured.inputs(QUERY, [0])
    expected = METHODS[method](*read(pair, matrix), **statistic, **data)
    assert torch.equal(merged.read_matrix(matrix.mllm), expected)
    kept = next(m for m in pair.matrices if m.name == DOWN)
    assert torch.equal(merged.read_matrix(kept.mllm), pair.mllm.read_matrix(kept.mllm))


def test_what_was_not_measured_gets_the_mean_of_the_models(pair, grams, tmp_path):
    plan = make_plan(pair, "regmean", calibration=grams.folder, alpha=0.75, norms="merge")
    merge(plan, tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    for vector in pair.vectors:
        mllm, math = pair.mllm.read(vector.mllm), pair.math[0].read(vector.math[0])
        expected = 0.75 * mllm + 0.25 * math
        assert torch.allclose(merged.read(vector.mllm), expected, atol=1e-6)


def test_the_command_line_calibrates_plans_and_merges(tmp_path, capsys):
    models = [f"--{role}={DEMO / role}" for role in ("mllm", "math", "base")]
    folder, plan, out = (str(tmp_path / name) for name in ("measured", "plan.json", "out"))
    measure = ["calibrate", *models, "--kind", "gram", "--limit", "2", "-o", folder]
    assert main([*measure, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passes"] == 4
    assert not Path(folder).exists()
    assert main([*measure, "--quiet"]) == 0
    assert "ipmerge plan --calibration" in capsys.readouterr().out
    assert main(["plan", *models, "--method=regmean", "--calibration", folder, "-o", plan]) == 0
    assert main(["merge", plan, "-o", out, "--quiet"]) == 0
    assert main([*measure]) == 2
    assert "already contains a finished calibration" in capsys.readouterr().err


def test_a_plan_asks_for_the_calibration_that_its_method_needs(pair, grams, tmp_path):
    with pytest.raises(PlanError, match="ipmerge calibrate --kind gram"):
        make_plan(pair, "regmean")
    with pytest.raises(PlanError, match="does not use calibration data; omit the calibration"):
        make_plan(pair, "linear", calibration=grams.folder)
    with pytest.raises(PairingError, match="the method requires Fisher information"):
        make_plan(pair, "fisher", calibration=grams.folder)
    copy = tmp_path / "copy"
    shutil.copytree(grams.folder, copy)
    plan = make_plan(pair, "regmean", calibration=copy)
    assert plan.hash == make_plan(pair, "regmean", calibration=grams.folder).hash
    record = json.loads((copy / "calibration.json").read_text())
    record["settings"]["seed"] = 1
    (copy / "calibration.json").write_text(json.dumps(record))
    with pytest.raises(PlanError, match="has changed since the plan was made"):
        merge(plan, tmp_path / "out")


def test_damaged_and_foreign_records_are_refused_in_words(pair, grams, tmp_path):
    record = json.loads((grams.folder / "calibration.json").read_text())
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "calibration.json").write_text(json.dumps(record))
    damaged = Measurements.open(folder)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        damaged.inputs(QUERY, [0])
    with pytest.raises(CheckpointError, match="has no measurement of 'lm_head"):
        grams.inputs("lm_head.weight", [0])
    (folder / "calibration.json").write_text(json.dumps(record | {"version": 9}))
    with pytest.raises(CheckpointError, match="not a calibration of this version"):
        Measurements.open(folder)


def test_the_estimate_says_memory_disk_and_passes(pair, tmp_path):
    cost = estimate_calibration(pair, tmp_path / "new", GRAM, 3, 4)
    hidden, feed = 128, 352
    per_layer = 4 * (3 * hidden**2 + feed**2)
    assert cost.nbytes_held == 4 * per_layer
    assert cost.nbytes_written == 2 * 4 * per_layer
    assert cost.passes == 7
    tight = estimate_calibration(pair, tmp_path / "new", replace(GRAM, memory=per_layer), 3, 4)
    assert tight.nbytes_held <= per_layer
    assert tight.passes == 4 * 7
    assert cost.nbytes_free > 0


def test_a_disk_that_is_too_small_is_refused_before_anything_runs(
    pair, samples, tmp_path, monkeypatch
):
    full = namedtuple("Usage", "free")(10)
    monkeypatch.setattr("ipmerge_core.calibration.calibrate.shutil.disk_usage", lambda _: full)
    with pytest.raises(RunError, match="Free some space"):
        calibrate(pair, tmp_path / "out", GRAM, *samples)
    assert not (tmp_path / "out").exists()


def test_samples_without_answers_or_none_at_all_are_refused(pair, samples, tmp_path):
    silent = [Sample("What is 2+2?", "")]
    with pytest.raises(PlanError, match=r"Sample 1 for the math models has no answer"):
        calibrate(pair, tmp_path / "out", FISHER, samples[0], silent)
    with pytest.raises(PlanError, match="No calibration samples for the MLLM"):
        calibrate(pair, tmp_path / "out", GRAM, [], samples[1])
    with pytest.raises(ModelLoadError, match="is a text model and does not support images"):
        calibrate(pair, tmp_path / "out", GRAM, samples[0], samples[0])


def test_modules_are_found_by_name_and_numbers(pair):
    loaded = load_model(DEMO / "mllm")
    matrix = pair.matrices[0]
    module = find_module(loaded, pair.mllm, matrix.mllm)
    assert torch.equal(module.weight, pair.mllm.read_matrix(matrix.mllm))
    with pytest.raises(ModelLoadError, match="no separate layer"):
        find_module(load_model(DEMO / "math"), pair.mllm, matrix.mllm)
    with pytest.raises(ModelLoadError, match="does not support fused matrices"):
        find_module(loaded, pair.mllm, "model.layers.0.self_attn.qkv_proj.weight[0:4]")


def test_a_group_stops_the_forward_pass_where_it_ends(pair, samples):
    loaded = load_model(DEMO / "math")
    layer = loaded.model.model.layers[0].self_attn.q_proj
    reached = []
    loaded.model.model.layers[3].register_forward_pre_hook(lambda *_: reached.append(1))
    passes = Passes(loaded, [layer], [(128, 128)], GRAM, "math")
    passes.add(0, samples[1][0])
    assert not reached
    assert passes.tokens > 0
    assert not layer._forward_pre_hooks


# --- estimators, on a head of three classes ---


class Head(torch.nn.Module):
    """Logits of the token after x; a stand-in for a causal model with two positions."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3, bias=False, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.5, -0.5], [0, 1], [-1, 0.25]]))
        self.device = torch.device("cpu")

    def forward(self, input_ids, x, use_cache):
        return SimpleNamespace(logits=torch.stack([self.layer(x), self.layer(x)])[None])


EXAMPLES = [([1.0, 2.0], 0), ([-1.0, 0.5], 2)]


def estimated(monkeypatch, settings, draws=1, dtype=torch.float32, scale=1.0):
    """Fisher information of the head over both examples, each taken `draws` times."""
    head = Head(dtype)
    monkeypatch.setattr(
        "ipmerge_core.calibration.passes.encode_sample", lambda _, sample: (sample, 1)
    )
    passes = Passes(SimpleNamespace(model=head), [head.layer], [(3, 2)], settings, "mllm")
    for number in range(draws):
        for place, (x, label) in enumerate(EXAMPLES):
            inputs = {"input_ids": torch.tensor([[0, label]])}
            inputs["x"] = scale * torch.tensor(x, dtype=dtype)
            passes.add(2 * number + place, inputs)
    return passes.means()[0]


def test_the_empirical_estimator_squares_one_example_at_a_time(monkeypatch):
    expected = [
        [0.4361001893, 1.7289362899],
        [0.4191631209, 1.4882567056],
        [0.0856358810, 0.0307306903],
    ]
    found = estimated(monkeypatch, replace(FISHER, estimator="empirical"))
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_sampled_answers_average_to_the_exact_information(monkeypatch):
    exact = [
        [0.0740535483, 0.1413969057],
        [0.1688185446, 0.2693282333],
        [0.1535184435, 0.1612631295],
    ]
    found = estimated(monkeypatch, FISHER, draws=1500)
    assert torch.allclose(found, torch.tensor(exact), rtol=0.12)


def test_small_slopes_survive_half_precision(monkeypatch):
    empirical = replace(FISHER, estimator="empirical")
    exact = estimated(monkeypatch, empirical, scale=2e-5)
    half = estimated(monkeypatch, empirical, dtype=torch.float16, scale=2e-5)
    assert float(exact.min()) > 0
    assert torch.allclose(half, exact, rtol=0.05)


# --- samples ---


def test_samples_come_from_a_jsonl_file(tmp_path):
    lines = [
        {"question": "What is 2+3?", "answer": "5"},
        {"question": "What is drawn?", "answer": "a dot", "image": "dot.png"},
        {"question": "No answer here"},
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    found = load_samples(path, 10, takes_images=False)
    assert found[0] == Sample("What is 2+3?", "5")
    assert found[1].picture == tmp_path / "dot.png"
    assert found[2].answer == ""
    assert len(load_samples(path, 2, takes_images=True)) == 2
    with pytest.raises(RunError, match=r"dot\.png"):
        assert found[1].image


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no samples"),
        ("not json", "Line 1 of"),
        ('{"answer": "5"}', "'question' is missing"),
        ('{"question": 5}', "'question' is 5; expected a valid string"),
        ("[1]", "is invalid"),
    ],
)
def test_lines_that_are_no_samples_are_named(tmp_path, content, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        load_samples(path, 10, takes_images=False)


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the datasets library; what it was asked for is kept."""
    asked = []
    rows = [{"problem": "1+1?", "solution": "2", "images": [Image.new("RGB", (4, 4))]}] * 5

    def load_dataset(path, config, *, split, streaming):
        asked.append((path, config, split))
        if path == "nowhere":
            raise ValueError("no such dataset")
        found = {"empty": [], "other": [{"text": "x"}]}.get(path, rows)
        return SimpleNamespace(take=lambda limit: found[:limit])

    library = SimpleNamespace(load_dataset=load_dataset, asked=asked)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def test_samples_come_from_a_dataset(datasets):
    told = load_samples("datasets:org/maths", 3, takes_images=False)
    assert told == [Sample("1+1?", "2")] * 3
    (seen,) = load_samples("datasets:org/maths:main:test", 1, takes_images=True)
    assert seen.image.size == (4, 4)
    load_samples("datasets:org/maths:test", 1, takes_images=True)
    assert datasets.asked == [
        ("org/maths", None, "train"),
        ("org/maths", "main", "test"),
        ("org/maths", None, "test"),
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "Cannot read the dataset 'nowhere'"),
        ("empty", "has no rows"),
        ("other", "has the columns text"),
    ],
)
@pytest.mark.usefixtures("datasets")
def test_a_dataset_that_cannot_serve_is_refused(name, words):
    with pytest.raises(RunError, match=words):
        load_samples(f"datasets:{name}", 3, takes_images=False)


def test_without_the_library_a_dataset_is_answered_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RunError, match="pip install datasets"):
        load_samples("datasets:org/maths", 3, takes_images=False)


def test_missing_files_and_silly_counts_are_refused(tmp_path):
    with pytest.raises(RunError, match="Expected a jsonl file, datasets:NAME, or demo"):
        load_samples(tmp_path / "none.jsonl", 10, takes_images=False)
    for check in (load_samples, check_source):
        for limit in (-1, 0, MOST_SAMPLES + 1, 10**12):
            with pytest.raises(RunError, match=f"limit of {limit} .*; expected 1 to 5000"):
                check("demo", limit, takes_images=False)


def test_a_source_is_checked_without_drawing_or_reading_its_samples(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a sample was drawn")

    monkeypatch.setattr("ipmerge_core.calibration.samples.problems", refuse)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    for source in ("demo", "demo:math", "demo:perception", "datasets:org/maths"):
        check_source(source, MOST_SAMPLES, takes_images=True)
    path = tmp_path / "samples.jsonl"
    path.write_text('\n{"question": "1 + 1?"}\nnot json\n')
    check_source(path, 3, takes_images=False)
    assert len(load_samples(path, 1, takes_images=False)) == 1
    for source, words in (("demo:cooking", "Unknown demo task"), (tmp_path / "no", "Cannot read")):
        with pytest.raises(RunError, match=words):
            check_source(source, 3, takes_images=False)
    for text, words in (("", "contains no samples"), ("{}\n", "Line 1 of")):
        path.write_text(text)
        with pytest.raises(RunError, match=words):
            check_source(path, 3, takes_images=False)


def test_demo_samples_are_drawn_for_eyes_and_told_in_words_otherwise():
    seen, told = (
        load_samples("demo", 12, takes_images=True),
        load_samples("demo", 12, takes_images=False),
    )
    assert len(seen) == len(told) == 12
    assert all(sample.image is not None for sample in seen)
    assert all(sample.image is None and sample.answer for sample in told)


@pytest.mark.parametrize(
    ("source", "tasks"),
    [
        ("demo:perception", PERCEPTION_TASKS),
        ("demo:math", MATH_TASKS),
        ("demo:dots", ("dots",)),
        ("demo:area, sides,area", ("area", "sides")),
        ("demo:shape,perception", ("shape", "sides", "written", "dots")),
    ],
)
def test_demo_samples_can_be_of_some_tasks_only(source, tasks):
    seen, told = (
        load_samples(source, 2 * len(tasks), takes_images=images) for images in (True, False)
    )
    for i, task in enumerate(tasks):
        first, second = problems(task, 2, seed=1, split="train")
        for sample, problem in ((seen[i], first), (seen[i + len(tasks)], second)):
            assert (sample.question, sample.answer) == (problem.question, problem.answer)
            assert sample.image.tobytes() == problem.image.tobytes()
        assert told[i].question == f"{first.words}\n{first.question}"
        assert told[i].answer == (first.worked if first.is_math else first.answer)
    assert load_samples("demo:math", 7, takes_images=False) == load_samples(
        "demo", 7, takes_images=False
    )


@pytest.mark.parametrize("source", ["demo:", "demo:reading", "demo:dots,reading", "demo:dots,"])
def test_unknown_demo_tasks_are_refused_with_the_known_ones(source):
    with pytest.raises(RunError, match=r"Unknown demo task '(reading)?' .*math, perception, add"):
        load_samples(source, 4, takes_images=True)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("gram", {"estimator": "empirical"}),
        ("fisher", {"wide": "diagonal"}),
        ("fisher", {"image_tokens": False}),
    ],
)
def test_a_setting_that_the_kind_does_not_use_is_refused(kind, setting):
    (name,) = setting
    with pytest.raises(PlanError, match=f"{name} is .*does not use it"):
        CalibrationSettings(kind, **setting)


# --- what a calibration is known by ---

SHA = "0123456789abcdef0123456789abcdef01234567"


def test_a_calibration_is_known_by_its_content_not_by_when_and_where(
    pair, samples, tmp_path, grams, monkeypatch
):
    assert grams.created[:2] == "20"
    assert grams.describe().endswith(" · 3 + 4 samples")
    seen, read = samples
    again = calibrate(pair, tmp_path / "again", GRAM, seen, read)
    later = replace(again, created="2031-01-01T00:00:00+00:00")
    models = [replace(model, id="elsewhere", source="x.jsonl") for model in later.models]
    later = replace(later, models=tuple(models))
    later.save()
    assert later.digest == grams.digest
    assert later.describe() == "2031-01-01 00:00 · 3 + 4 samples · x.jsonl"
    other = calibrate(pair, tmp_path / "other", GRAM, seen, [*read[:-1], Sample("1 + 1", "2")])
    assert other.digest != grams.digest
    assert (
        other.models[0].samples_digest
        == grams.models[0].samples_digest
        != other.models[1].samples_digest
    )


def test_samples_count_by_the_content_of_their_pictures(tmp_path):
    keys = []
    for folder, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4), colour).save(tmp_path / folder / "x.png")
        keys.append(Sample("what?", "it", tmp_path / folder / "x.png").key())
    assert keys[0] == keys[1] != keys[2]
    wide, high = (Sample("what?", "it", Image.new("RGB", size)).key() for size in ((2, 8), (8, 2)))
    assert wide != high, "the same bytes in another shape"
    with pytest.raises(RunError, match=r"Cannot read the picture '.*none.png'"):
        Sample("what?", "it", tmp_path / "none.png").key()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The demo models in the hub's cache; in the work folder, other folders of the same names."""
    import huggingface_hub.constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    for name in ("mllm", "math", "base"):
        place = cache / f"models--org--{name}"
        shutil.copytree(DEMO / name, place / "snapshots" / SHA)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(SHA)
        (tmp_path / "work" / "org" / name).mkdir(parents=True)
        (tmp_path / "work" / "org" / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "work")
    return cache


def test_a_pair_from_the_hub_is_measured_from_the_hubs_cache(hub_cache, tmp_path, grams):
    """A folder with the name of the hub id is another model, and is not touched."""
    names = {"mllm": f"org/mllm@{SHA}", "math": [f"org/math@{SHA}"], "base": f"org/base@{SHA}"}
    steps = list(
        iter_calibration_of(
            **names, base_mllm=None, out=str(tmp_path / "out"), kind="gram", limit=3
        )
    )
    assert steps[-1].done == steps[-1].total == 6
    found = Measurements.open(tmp_path / "out")
    assert [model.id for model in found.models] == ["org/mllm", "org/math"]
    assert found.describe().endswith(" · 3 + 3 samples · demo")
    one, other = found.inputs(QUERY, [0]), grams.inputs(QUERY, [0])
    assert torch.equal(one["mllm_gram"], other["mllm_gram"])


def test_a_model_that_is_not_on_this_machine_is_named_with_what_to_do(hub_cache):
    shutil.rmtree(hub_cache)
    with pytest.raises(CheckpointError, match=f"hf download org/mllm --revision {SHA}"):
        local_copy("org/mllm", SHA)
    with pytest.raises(CheckpointError, match=r"Cannot download 'org/mllm' \(.*HF_HUB_OFFLINE"):
        local_copy("org/mllm", SHA, download=True)
