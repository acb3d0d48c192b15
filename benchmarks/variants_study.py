"""Study every variant and method on all cases, and write docs/variants-study.md.

    python benchmarks/variants_study.py [--cases runs/cases] [--folder runs/study] [--only NAME ...]
        [--limit 100] [--validation 20] [--choose] [--write]

The cases are those of `make cases`, and the trio of `make demo-135m` where it was built. Every row
of `study_rows` gets the same number of gains in a case. The gain is chosen on a validation draw
with other handwriting, and reported on a test draw; both exclude drawings of the training.
Every finished row is stored in the folder, and so is every reply, so that the study continues after
an interruption. --choose picks one setting for all cases from the validation draws of seed 0, and
writes it to benchmarks/study_setting.json; later runs report it on all other cases. --write writes
the page and its figure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package, when it is not installed

from study_cases import OUT, Draw, StudyCase, available, counts_of, rows_of
from study_controls import overlaps, random_matrices, random_subspace, relative_size, scale
from study_page import page
from study_rows import BASELINE, TRIES, Row, rows

from ipmerge_core.analysis.records import Analysis
from ipmerge_core.calibration.calibrate import calibrate
from ipmerge_core.calibration.passes import CalibrationSettings
from ipmerge_core.calibration.samples import load_samples
from ipmerge_core.calibration.store import Measurements
from ipmerge_core.errors import CheckpointError, PlanError
from ipmerge_core.evaluation.answering import Caches
from ipmerge_core.evaluation.evaluate import EvaluationSettings, iter_evaluation
from ipmerge_core.evaluation.merged_models import MergedModels
from ipmerge_core.evaluation.points import UNMERGED, Point
from ipmerge_core.evaluation.replies import ReplyStore
from ipmerge_core.evaluation.subjects import Subject
from ipmerge_core.methods import METHODS
from ipmerge_core.methods.declarations import drained
from ipmerge_core.planning.options import PlanOptions
from ipmerge_core.planning.plan import MergePlan, make_plan
from ipmerge_core.planning.scope import needed_data
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.tasks.demo_items import demo_task, item_of
from ipmerge_core.tasks.items import ItemSet, Task

HERE = Path(__file__).parent
SETTING = HERE / "study_setting.json"
CHOSEN_FROM = ("elicited-0-math", "taught-0-math", "elicited-0-over")
ALLOWED_LOSS = 0.02  # of perception, when a gain is chosen
SAMPLES = 24  # of a calibration
CONTROL_DRAWS = 3
Outcomes = dict[str, list[bool]]


class CaseStudy:
    """One case: its models, its draws, and the rows that are stored in the folder.

    Args:
        case: the case.
        cases: the folder of all cases.
        folder: where results, replies and calibrations are stored.
        counts: problems per task of the validation and the test draw.
        table: the rows of the study.
    """

    def __init__(
        self,
        case: StudyCase,
        cases: Path,
        folder: Path,
        counts: Mapping[Draw, int],
        table: Sequence[Row],
    ) -> None:
        self.case, self.folder = case, folder
        self.counts, self.table = counts_of(case, counts), rows_of(case, table)
        self.analysis = Analysis.load(case.pack(cases))
        self.path = folder / f"{case.name}.json"
        self.store, self.caches = ReplyStore(folder / "replies"), Caches()
        self.tasks = {draw: self._task(draw) for draw in self.counts}
        self.results: dict[str, Any] = self._stored()

    def run(self, models: MergedModels, setting: Mapping[str, Any] | None) -> Iterator[str]:
        """Evaluate what is missing, yielding a line after each row."""
        self.models = models
        if "unmerged" not in self.results:
            self.results["unmerged"] = {
                draw: self.outcomes(Point(UNMERGED), draw) for draw in self.counts
            }
            grams = Measurements.open(self.calibration("gram"))
            self.results["overlaps"] = overlaps(models.pair, grams)
            self._save()
            yield f"{self.case.name}: unmerged"
        for row in self.table:
            if self.results["rows"].get(row.label, {}).get("of") == definition(row):
                continue
            started = time.monotonic()
            self.results["rows"][row.label] = {"of": definition(row), **self._tried(row)}
            controls = self.results["controls"]
            for label in [name for name, each in controls.items() if each["of"] == row.label]:
                del controls[label]
            self._save()
            yield f"{self.case.name}: {row.label}, {time.monotonic() - started:.0f} s"
        yield from self._run_controls()
        yield from self._run_setting(setting)

    # --- rows ---

    def _tried(self, row: Row) -> dict[str, Any]:
        """Try the gains of a row on the validation draw, and report the chosen one."""
        try:
            plans = [(gain, self.plan(row, gain)) for gain in row.gains]
        except PlanError as error:
            return {"refused": str(error)}
        tried = []
        for gain, plan in plans:
            found = self.outcomes(Point(plan.hash, plan), "validation")
            tried.append({"gain": gain, **{group: share(found[group]) for group in found}})
        gain = chosen_gain(tried, self.results["unmerged"]["validation"])
        return {"tried": tried, **self._reported(row, gain)}

    def _reported(self, row: Row, gain: float | None) -> dict[str, Any]:
        """Score a row at a gain on the test draw; without a gain it is the unmerged model."""
        if gain is None:
            return {"gain": None, "size": 0.0, "test": self.results["unmerged"]["test"]}
        plan = self.plan(row, gain)
        point = Point(plan.hash, plan)
        size = relative_size(self.models.pair, self.models.tensors(point))
        found = self.outcomes(point, "test")
        return {"gain": gain, "size": size, "plan": plan.hash, "test": found}

    def plan(self, row: Row, gain: float) -> MergePlan:
        """Make the plan of a row at a gain. Raises: PlanError if the case cannot take it."""
        arguments = row.at(gain)
        method = METHODS[row.method]
        own = {p.name: arguments[p.name] for p in method.parameters if p.name in arguments}
        kind = needed_data(method, own, PlanOptions.read(arguments))
        if kind is not None:
            arguments["calibration"] = self.calibration(kind)
        return make_plan(self.analysis, **arguments)

    def calibration(self, kind: Any) -> str:  # noqa: ANN401
        """Return the folder of a calibration of this case, made once."""
        out = self.folder / "calibrations" / f"{self.case.name}-{kind}"
        with contextlib.suppress(CheckpointError):
            return str(Measurements.open(out).folder)
        samples = [load_samples("demo", SAMPLES, takes_images=images) for images in (True, False)]
        return str(calibrate(self.models.pair, out, CalibrationSettings(kind), *samples).folder)

    # --- controls, and the setting for all cases ---

    def _run_controls(self) -> Iterator[str]:
        """Score the controls of three rows at their chosen gains, several draws of each."""
        for label, controlled in {
            "gamma permuted": "gamma max",
            "random subspace": "complement 0.8",
            "random matrices": f"{BASELINE}, upper half",
        }.items():
            own = self.results["rows"].get(controlled, {})
            if label in self.results["controls"] or own.get("gain") is None:
                continue
            row = next(row for row in self.table if row.label == controlled)
            plan = self.plan(row, own["gain"])
            if len(plan.sources.math) > 1:
                continue
            draws = [self._control(label, plan, seed) for seed in range(CONTROL_DRAWS)]
            self.results["controls"][label] = {"of": controlled, "draws": draws}
            self._save()
            yield f"{self.case.name}: control, {label}"

    def _control(self, label: str, plan: MergePlan, seed: int) -> Outcomes:
        name = f"{label} {seed}"
        if label == "gamma permuted":
            return self.outcomes(Point(name, plan, permuted=seed), "test")
        if label == "random matrices":
            return self.outcomes(Point(name, random_matrices(self.analysis, plan, seed)), "test")

        @contextlib.contextmanager
        def loaded(device: str) -> Iterator[Any]:
            merged = self.models.tensors(Point(plan.hash, plan))
            found = random_subspace(plan, self.models.pair, merged, seed)
            with self.models.exchanged(device, found) as model:
                yield model

        return self._answered(Subject(name, self.models.keyed(plan.digest, name), loaded), "test")

    def _run_setting(self, setting: Mapping[str, Any] | None) -> Iterator[str]:
        """Score the setting for all cases, unless it was chosen from this one."""
        if setting is None or self.case.name in setting["cases"]:
            return
        row = next(row for row in rows() if row.label == setting["row"])
        asked = {"row": row.label, "at": setting["gain"], "of": definition(row)}
        known = self.results.get("setting", {})
        if asked.items() <= known.items():
            return
        try:
            found = self._reported(row, setting["gain"])
        except PlanError as error:
            found = {"refused": str(error)}
        self.results["setting"] = {**asked, **found}
        self._save()
        yield f"{self.case.name}: the setting for all cases"

    # --- evaluation and files ---

    def outcomes(self, point: Point, draw: Draw) -> Outcomes:
        """Answer a draw, or read the replies that are stored."""
        return self._answered(self.models.subject(point), draw)

    def _answered(self, subject: Subject, draw: Draw) -> Outcomes:
        task = self.tasks[draw]
        steps = iter_evaluation(
            [subject], [task], EvaluationSettings(), self.store, caches=self.caches
        )
        report = drained(steps)
        assert report is not None, "the study runs in one process"
        found: Outcomes = {"math": [], "perception": []}
        (facts,) = report.tasks
        for item, reply in zip(facts.items, report.replies[subject.name][task.name], strict=True):
            found[item["group"]].append(reply.is_right)
        return found

    def _task(self, draw: Draw) -> Task:
        """Return a draw of the case as a task."""

        def load(_: object) -> ItemSet:
            found = self.case.problems(self.counts[draw], draw)
            return ItemSet(tuple(item_of(p, f"{draw}-{i}") for i, p in enumerate(found)))

        return replace(demo_task(), name=f"demo@{draw}", load=load)

    def _stored(self) -> dict[str, Any]:
        """Read the results; those of other models or other draws are made again."""
        what = {
            "models": [source.fingerprint for source in self.analysis.sources.all()],
            "counts": dict(self.counts),
        }
        if self.path.is_file():
            found: dict[str, Any] = json.loads(self.path.read_text())
            if found["what"] == what:
                return {**found, "scale": scale(self.analysis)}
        made = {"case": self.case.name, "facts": self.case.facts, "what": what}
        return {**made, "scale": scale(self.analysis), "rows": {}, "controls": {}}

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.results))


def definition(row: Row) -> dict[str, Any]:
    """Return what a row's results follow from, in JSON values."""
    found = {**row._asdict(), "version": METHODS[row.method].version}
    values: dict[str, Any] = json.loads(json.dumps(found, default=dict))
    return values


def share(outcomes: Sequence[bool]) -> float:
    """Return the share of right answers."""
    return sum(outcomes) / len(outcomes)


def chosen_gain(tried: Sequence[Mapping[str, float]], unmerged: Outcomes) -> float | None:
    """Choose the gain with the best mathematics among those that keep perception.

    None, the unmerged model, if none keeps it or none is better at mathematics; the first in a tie.
    """
    lowest = share(unmerged["perception"]) - ALLOWED_LOSS
    keeping = [each for each in tried if each["perception"] >= lowest]
    best = max(keeping, key=lambda each: each["math"], default=None)
    return best["gain"] if best and best["math"] > share(unmerged["math"]) else None


def chosen_setting(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Choose one row and gain for all cases, from the validation draws of some cases.

    Math:   argmax over rows and gains of min_c m_c / b_c, m_c the mathematics of case c and b_c the
            best of task arithmetic there, among those that keep perception in every case; in a
            tie, the first row and gain.
    Raises: SystemExit if a case has not been evaluated.
    """
    found = [each for each in results if each["case"] in CHOSEN_FROM]
    missing = sorted(set(CHOSEN_FROM) - {each["case"] for each in found})
    if missing:
        raise SystemExit(f"The study has no results of {', '.join(missing)} yet. Run it first.")
    best: tuple[float, str, float] = (0.0, "", 0.0)
    for label, row in found[0]["rows"].items():
        for place, tried in enumerate(row.get("tried", ())):
            least = min(_relative(each, label, place) for each in found)
            best = max(best, (least, label, tried["gain"]), key=lambda one: one[0])
    return {"row": best[1], "gain": best[2], "least": best[0], "cases": list(CHOSEN_FROM)}


def _relative(result: Mapping[str, Any], label: str, place: int) -> float:
    """Return the mathematics of a setting relative to tuned task arithmetic; 0 if it costs more."""
    row, unmerged = result["rows"][label], result["unmerged"]["validation"]
    if "tried" not in row:
        return 0.0
    tried, lowest = row["tried"][place], share(unmerged["perception"]) - ALLOWED_LOSS
    tuned = [t["math"] for t in result["rows"][BASELINE]["tried"] if t["perception"] >= lowest]
    if tried["perception"] < lowest or not max(tuned, default=0.0):
        return 0.0
    return float(tried["math"] / max(tuned))


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=Path, default=OUT)
    parser.add_argument("--folder", type=Path, default=HERE.parent / "runs" / "study")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of cases")
    parser.add_argument("--rows", nargs="*", default=[], help="parts of labels of rows")
    parser.add_argument("--limit", type=int, default=100, help="test problems of a task")
    parser.add_argument("--validation", type=int, default=20, help="validation problems of a task")
    parser.add_argument("--choose", action="store_true", help="choose the setting for all cases")
    parser.add_argument("--write", action="store_true", help="write the page and the figure")
    options = parser.parse_args()
    there = available(options.cases)
    named = [c for c in there if not options.only or any(part in c.name for part in options.only)]
    if not named:
        raise SystemExit(f"There are no such cases in {options.cases}. Run `make cases` first.")
    every = rows()
    table = [r for r in every if not options.rows or any(p in r.label for p in options.rows)]
    setting = json.loads(SETTING.read_text()) if SETTING.is_file() else None
    counts: dict[Draw, int] = {"validation": options.validation, "test": options.limit}
    for case in named:
        study = CaseStudy(case, options.cases, options.folder, counts, table)
        with MergedModels(study.analysis.sources, kept=TRIES) as models:
            for line in study.run(models, setting):
                print(line, flush=True)
    results = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))]
    if options.choose:
        write_whole(SETTING, json.dumps(chosen_setting(results), indent=1) + "\n")
    print(page(results, write=options.write))


if __name__ == "__main__":
    main()
