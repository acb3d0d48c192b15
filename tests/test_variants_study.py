"""The study of the variants: its choices, tests and page, on a case of few training steps."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ipmerge_core.errors import PlanError
from ipmerge_core.evaluation.merged_models import MergedModels
from ipmerge_core.methods import METHODS

ROOT = Path(__file__).parents[1]
for place in ("benchmarks", "assets/demo"):
    sys.path.append(str(ROOT / place))  # scripts that import each other
import cases  # noqa: E402
import study_page  # noqa: E402
import study_rows  # noqa: E402
import variants_study as study  # noqa: E402
from study_controls import relative_size  # noqa: E402

CASE = cases.Case("elicited", 1)
ROWS = ("task arithmetic", "task arithmetic, upper half", "gamma max", "complement 0.8",
        "task arithmetic, AIM 0.2", "Fisher merging")  # fmt: skip
COUNTS = {"validation": 1, "test": 1}


def table() -> list[study_rows.Row]:
    """Some rows, and the gains of each."""
    return [row._replace(gains=row.gains[-1:]) for row in study_rows.rows() if row.label in ROWS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("cases")
    list(cases.Trainer(out, shorten=600).make(CASE))
    return out


@pytest.fixture(scope="module")
def studied(made, tmp_path_factory):
    """A finished case, with gains that are chosen although nothing is learned in a few steps."""
    folder = tmp_path_factory.mktemp("study")
    run = study.CaseStudy(CASE, made, folder, COUNTS, table())
    patch = pytest.MonkeyPatch()
    patch.setattr(study, "chosen_gain", lambda tried, unmerged: tried[0]["gain"])
    with patch.context(), MergedModels(run.analysis.sources) as models:
        lines = list(run.run(models, None))
        sizes = control_sizes(run)
    patch.undo()
    return folder, lines, sizes


def control_sizes(run: study.CaseStudy) -> dict[str, tuple[float, float]]:
    """The sizes of a control and of what it controls."""
    row = next(r for r in run.table if r.label == "complement 0.8")
    plan = run.plan(row, row.gains[-1])
    pair = run.models.pair
    own = run.models.tensors(study.Point("complement", plan))
    other = study.random_subspace(plan, pair, own, 0)
    row = next(r for r in run.table if r.label.endswith("upper half"))
    upper = run.plan(row, row.gains[-1])
    random = study.random_matrices(run.analysis, upper, 0)
    return {
        "subspace": (relative_size(pair, own), relative_size(pair, other)),
        "matrices": tuple(
            relative_size(pair, run.models.tensors(study.Point(each.hash, each)))
            for each in (upper, random)
        ),
    }


def test_every_method_is_a_row_and_every_row_has_the_same_number_of_gains():
    rows = study_rows.rows()
    assert {row.method for row in rows} == set(METHODS)
    assert {len(set(row.gains)) for row in rows} == {study_rows.TRIES}
    assert len({row.label for row in rows}) == len(rows)


def test_a_case_is_studied_once_and_its_rows_are_stored(made, studied):
    folder, lines, _ = studied
    result = json.loads((folder / "elicited-1-math.json").read_text())
    assert set(result["rows"]) == set(ROWS)
    for row in result["rows"].values():
        assert len(row["test"]["math"]) == 5
        assert len(row["test"]["perception"]) == 4
    assert set(result["controls"]) == {"gamma permuted", "random subspace", "random matrices"}
    assert len(lines) == 1 + len(ROWS) + 3
    again = study.CaseStudy(CASE, made, folder, COUNTS, table())
    with MergedModels(again.analysis.sources) as models:
        assert list(again.run(models, None)) == []
        # A row that is lost is made again from the stored replies: nothing is answered twice.
        del again.results["rows"]["gamma max"]
        models.exchanged = None  # answering would need it
        assert len(list(again.run(models, None))) == 1
    other = study.CaseStudy(CASE, made, folder, {"validation": 1, "test": 2}, table())
    assert other.results["rows"] == {}


def test_controls_are_as_large_as_what_they_control(studied):
    for own, control in studied[2].values():
        assert own > 0
        assert control == pytest.approx(own, rel=1e-3)


def test_the_setting_for_all_cases_is_reported_on_other_cases_only(made, studied, tmp_path):
    folder, _, _ = studied
    setting = {"row": "gamma max", "gain": 16.0, "cases": ["elicited-1-math"]}
    run = study.CaseStudy(CASE, made, folder, COUNTS, table())
    with MergedModels(run.analysis.sources) as models:
        assert list(run.run(models, setting)) == []
        assert len(list(run.run(models, {**setting, "cases": []}))) == 1
    result = json.loads((folder / "elicited-1-math.json").read_text())
    assert result["setting"]["at"] == 16.0
    text = study_page.page([result], write=False)
    assert "gamma max at 16, chosen from the validation draws of seed 0" in text


@pytest.mark.parametrize(
    ("tried", "gain"),
    [
        ([(1.0, 0.2, 0.9), (2.0, 0.8, 0.5)], 1.0),  # the better one costs perception
        ([(1.0, 0.2, 0.9), (2.0, 0.2, 0.9)], 1.0),
        ([(1.0, 0.2, 0.9), (2.0, 0.3, 0.88)], 2.0),
        ([(1.0, 0.1, 0.9)], None),  # no better than the MLLM
        ([(1.0, 0.9, 0.5)], None),
    ],
)
def test_the_best_gain_that_keeps_perception_is_chosen(tried, gain):
    unmerged = {"math": [True] + [False] * 9, "perception": [True] * 9 + [False]}
    named = [dict(zip(("gain", "math", "perception"), each, strict=True)) for each in tried]
    assert study.chosen_gain(named, unmerged) == gain


SCALE = {
    "parameters": 9.3e5, "layers": 4, "width": 128, "change": 0.01, "rank": 0.2, "first": 0.3,
    "similarity": 0.2, "chance": 0.1, "selected": 0.3, "principal": 0.5,
}  # fmt: skip


def result_of(case: str, seed: int, rows: dict[str, tuple[float, float]], n: int = 60):
    """A result with shares of right answers, the first ones of each draw."""

    def outcomes(share: float) -> list[bool]:
        return [i < round(share * n) for i in range(n)]

    def row(math: float, perception: float):
        tried = [{"gain": 1.0, "math": math, "perception": perception}]
        test = {"math": outcomes(math), "perception": outcomes(perception)}
        return {"gain": 1.0, "size": 1.0, "tried": tried, "test": test}

    nothing = {"math": outcomes(0.0), "perception": outcomes(0.9)}
    return {
        "case": case,
        "facts": {"trio": "elicited", "seed": seed, "kind": "many", "experts": ["math"]},
        "what": {"counts": {"test": 1, "validation": 1}},
        "unmerged": {"validation": nothing, "test": nothing},
        "scale": SCALE,
        "overlaps": dict.fromkeys(("inputs", "chance", "inside", "on_inputs"), 0.5),
        "rows": {label: row(*shares) for label, shares in rows.items()},
        "controls": {},
    }


def test_the_setting_is_the_one_with_the_best_worst_case():
    baseline = {"task arithmetic": (0.5, 0.9)}
    first = {**baseline, "A": (0.9, 0.9), "B": (0.6, 0.9), "C": (0.9, 0.9)}
    shares = {
        "elicited-0-math": first,
        # A is worse in one case, and C costs perception there.
        "taught-0-math": {**baseline, "A": (0.1, 0.9), "B": (0.6, 0.9), "C": (0.9, 0.5)},
        "elicited-0-over": first,
    }
    found = [result_of(case, 0, rows) for case, rows in shares.items()]
    assert [study._relative(found[1], row, 0) for row in ("A", "B", "C")] == [0.2, 1.2, 0.0]
    chosen = study.chosen_setting(found)
    assert (chosen["row"], chosen["gain"]) == ("B", 1.0)
    assert chosen["least"] == pytest.approx(1.2)
    with pytest.raises(SystemExit, match="no results of elicited-0-over"):
        study.chosen_setting(found[:2])


def test_only_differences_that_survive_the_correction_are_listed():
    rows = {"task arithmetic": (0.3, 0.9), "A": (0.9, 0.9), "B": (0.32, 0.9), "C": (0.0, 0.2)}
    results = [result_of(f"elicited-{seed}-math", seed, rows) for seed in range(3)]
    text = study_page.page(results, write=False)
    math, perception = text.split("### Image+math")[1].split("### Perception")
    assert "Of 3 rows in groups of cases, better than task arithmetic: 1; worse: 1." in math
    assert "+60.0, +60.0, +60.0" in math
    assert "| A | +60.0" in math
    assert "| B |" not in math
    assert "| C |" not in math
    assert "better than task arithmetic: 0; worse: 1." in perception
    every = text.split("### All rows")[1]
    assert "| A | 1 | +60.0 | 1 | 0 | +0.0 | 0 | 0 |" in every
    assert "| C | 1 | -30.0 | 0 | 1 | -70.0 | 0 | 1 |" in every
    assert "elicited, math (3 seeds)" in text
    assert "(90.0 to 90.0)" in text  # the same in every seed


def test_the_page_and_its_figure_are_written(monkeypatch, tmp_path):
    rows = {"task arithmetic": (0.3, 0.9), "complement 0.8": (0.9, 0.9), "TIES": (0.2, 0.8)}
    page, picture = tmp_path / "page.md", tmp_path / "page.svg"
    page.write_text(f"Head.\n\n{study_page.MARK}\n\nOld.\n")
    monkeypatch.setattr(study_page, "PAGE", page)
    monkeypatch.setattr(study_page, "FIGURE", picture)
    monkeypatch.setattr(study_page, "PRESETS", tmp_path / "presets.json")
    result = result_of("elicited-0-math", 0, rows)
    result["setting"] = {"row": "TIES", "at": 0.5, **result["rows"]["TIES"]}
    study_page.page([result], write=True)
    assert page.read_text().startswith("Head.")
    assert "Old." not in page.read_text()
    circles = list(ET.fromstring(picture.read_text()).iter("{http://www.w3.org/2000/svg}circle"))
    titles = [circle[0].text for circle in circles if len(circle)]
    assert len(titles) == 3
    assert "complement 0.8: 90.0 / 90.0, 1.00 dM" in titles
    presets = json.loads((tmp_path / "presets.json").read_text())
    assert [p["name"].split(": ")[1] for p in presets] == [
        "one setting for all", "complement 0.8", "task arithmetic", "TIES",
    ]  # fmt: skip
    setting, complement = presets[:2]
    assert (setting["method"], setting["arguments"]) == ("ties", {"math_weight": 0.5})
    assert complement["arguments"]["energy"] == 0.8
    assert complement["arguments"]["lambda_"] == 1.0
    assert "toy models" in complement["source"]
    assert "image+math is 90 % and perception 90 %, of 60 and 60 answers" in complement["source"]


def test_sizes_and_the_explanation_are_compared_over_cases():
    rows = {"task arithmetic": (0.3, 0.9), "IP-Merging": (0.2, 0.9)}
    results = []
    for number in range(8):
        result = result_of(f"elicited-{number}-math", number, rows)
        result["overlaps"] = {
            "inputs": 0.5,
            "chance": 0.2,
            "inside": number / 8,
            "on_inputs": 1 - number / 8,
        }
        tried = result["rows"]["task arithmetic"]["tried"][0]
        tried["perception"] = 0.9 - number / 10  # the more inside, the more it costs
        results.append(result)
    text = study_page.page(results, write=False)
    assert "above chance in 8 of 8 cases" in text
    assert "inside the directions +1.00" in text
    assert "Does it change with size?" not in text
    results[0]["scale"] = SCALE | {"parameters": 1.35e8}
    text = study_page.page(results, write=False)
    assert "1 of 135 M parameters, 7 of 0.9 M parameters" in text
    assert "| elicited-0-math | 135 M | 4 x 128 | 1.00 % |" in text
    tried = text.split("### Gains tried on elicited-0-math")[1]
    assert "| IP-Merging | 1 | 20 / 90 |" in tried


def test_a_row_that_a_case_cannot_take_is_refused_with_its_reason(made, tmp_path):
    run = study.CaseStudy(CASE, made, tmp_path, COUNTS, table())
    row = study_rows.Row("x", "ties", {"density": 2.0}, "math_weight", (1.0,))
    with MergedModels(run.analysis.sources) as run.models:
        assert "density is 2.0" in run._tried(row)["refused"]
        with pytest.raises(PlanError):
            run.plan(row, 1.0)
