"""The page of the variants study: paired tests, tables and text from the results of its cases.

In: the results of cases, as `variants_study` stores them. Out: the measured part of
docs/variants-study.md, and with `write` the page, its figure, and the presets of the app.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report import machine, table
from study_figure import Mark, figure
from study_presets import TOY, presets, write_presets
from study_rows import BASELINE

from ipmerge_core.evaluation.comparisons import PairedTest, holm, paired_test
from ipmerge_core.evaluation.scores import Score

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURE = DOCS / "variants-study.md", DOCS / "variants-study.svg"
PRESETS = DOCS.with_name("ipmerge_core") / "models" / "study_presets.json"
MARK = "<!-- measured by `python benchmarks/variants_study.py --write` -->"
LEVEL = 0.05
NEEDED = 0.9  # of tuned task arithmetic, which the one setting should reach
FULL = 1.0  # the weight at which task arithmetic's cost is compared between cases
FEWEST = 8  # cases for a rank correlation
COMPARED = (BASELINE, "IP-Merging", "gamma max", "complement 0.8")
GROUPS = ("math", "perception")
Result = Mapping[str, Any]


class Line(NamedTuple):
    """One row in all seeds of a group of cases, against task arithmetic."""

    group: str
    label: str
    gains: tuple[float | None, ...]
    size: float
    scores: dict[str, list[Score]]  # by measure, one per seed
    tests: dict[str, PairedTest]

    def pooled(self, measure: str) -> Score:
        """Score over all seeds."""
        return sum(self.scores[measure], Score(0, 0))


def page(results: Sequence[Result], *, write: bool) -> str:
    """Return the measured part of the page; with `write`, write it and the figure."""
    complete = [result for result in results if BASELINE in result["rows"]]
    if not complete:
        return f"No case has results of {BASELINE} yet."
    lines = [line for _, cases in grouped(complete) for line in lines_of(cases)]
    adjusted = corrected(lines)
    parts = [
        _head(complete),
        f"![Image+math against perception, a panel per group of cases]({FIGURE.name})",
        *_overview(lines, adjusted),
        *_verdicts(lines, adjusted),
        *_setting(complete),
        *_controls(complete),
        *_overlaps(complete),
        *_scale(complete),
        *_tried(complete),
        *_tables(lines, adjusted, complete),
    ]
    text = "\n\n".join(part for part in parts if part)
    if write:
        before = PAGE.read_text(encoding="utf-8").split(MARK)[0]
        PAGE.write_text(f"{before}{MARK}\n\n{text}\n", encoding="utf-8")
        FIGURE.write_text(figure(_marks(lines)), encoding="utf-8")
        write_presets(presets(complete), PRESETS)
    return text


def grouped(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Group the cases that differ in their training seed only."""
    found: dict[str, list[Result]] = {}
    for result in results:
        facts = result["facts"]
        few = ", few picture tasks" if facts["kind"] == "few" else ""
        found.setdefault(f"{facts['trio']}, {' + '.join(facts['experts'])}{few}", []).append(result)
    return list(found.items())


def lines_of(cases: Sequence[Result]) -> Iterator[Line]:
    """Yield a line for every row that all cases of a group have, and did not refuse."""
    ((group, _),) = grouped(cases)
    for label in cases[0]["rows"]:
        own = [case["rows"].get(label, {}) for case in cases]
        if not all("test" in row for row in own):
            continue
        yield Line(
            group,
            label,
            tuple(row["gain"] for row in own),
            sum(row["size"] for row in own) / len(own),
            {m: [_score(row["test"][m]) for row in own] for m in GROUPS},
            {
                m: paired_test(
                    [x for case in cases for x in case["rows"][BASELINE]["test"][m]],
                    [x for row in own for x in row["test"][m]],
                )
                for m in GROUPS
            },
        )


def corrected(lines: Sequence[Line]) -> dict[tuple[str, str, str], float]:
    """Return the p values of all tests, corrected together; by group, row and measure.

    Task arithmetic is not tested against itself.
    """
    keys = [(x.group, x.label, m) for x in lines for m in GROUPS if x.label != BASELINE]
    tests = [x.tests[m].p_value for x in lines for m in GROUPS if x.label != BASELINE]
    return dict(zip(keys, holm(tests), strict=True))


def seed_interval(shares: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % t interval of a mean over seeds; None for one seed.

    >>> low, high = seed_interval([0.5, 0.6, 0.7])
    >>> round(low, 3), round(high, 3)
    (0.352, 0.848)
    """
    n = len(shares)
    if n < 2:
        return None
    from scipy.stats import t

    mean = sum(shares) / n
    deviation = math.sqrt(sum((x - mean) ** 2 for x in shares) / (n - 1))
    reach = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return mean - reach, mean + reach


# --- parts of the page ---


def _head(results: Sequence[Result]) -> str:
    sizes: dict[str, list[Result]] = {}
    for result in results:
        sizes.setdefault(_millions(result), []).append(result)
    cases = ", ".join(f"{len(own)} of {size} M parameters" for size, own in sizes.items())
    counts = [result["what"]["counts"] for result in results]
    fewest = min(c["test"] for c in counts), min(c["validation"] for c in counts)
    return (
        f"{machine()}. {len(results)} cases: {cases}. At least {fewest[0]} test and {fewest[1]} "
        f"validation problems per task. Intervals over items are Wilson's, over seeds Student's, "
        f"both at 95 % and the latter cut to 0 to 100 %. Paired tests are exact sign tests against "
        f"{BASELINE} with its own chosen weight, Holm-corrected over all rows, cases and both "
        f"measures together. They are over the items of these models; the intervals over seeds "
        f"describe how much other seeds differ."
    )


def _overview(lines: Sequence[Line], adjusted: Mapping[tuple[str, str, str], float]) -> list[str]:
    """Compare each row with task arithmetic over the groups of cases that it applies to."""
    rows, groups = [], {line.group for line in lines}
    for label in dict.fromkeys(line.label for line in lines if line.label != BASELINE):
        own, cells = [line for line in lines if line.label == label], list[str]()
        for measure in GROUPS:
            sure = [x for x in own if adjusted[x.group, label, measure] < LEVEL]
            better = sum(line.tests[measure].difference > 0 for line in sure)
            mean = sum(line.tests[measure].difference for line in own) / len(own)
            cells += [f"{100 * mean:+.1f}", str(better), str(len(sure) - better)]
        rows.append([label, str(len(own)), *cells])
    rows.sort(key=lambda row: -float(row[2]))
    words = (
        f"Each row against {BASELINE}, both with gains of their own: the mean difference in points "
        f"over the groups of cases that the row applies to, and in how many of them the difference "
        f"survives the correction. There are {len(groups)} groups; the seeds of one kind of case "
        f"are one group."
    )
    head = ["row", "groups", "image+math", "better in", "worse in", "perception", "better in",
            "worse in"]  # fmt: skip
    return ["### All rows", words, table(head, rows)]


def _verdicts(lines: Sequence[Line], adjusted: Mapping[tuple[str, str, str], float]) -> list[str]:
    """List what survives the correction as better, and count what survives as worse."""
    found = []
    for measure in GROUPS:
        sure = [x for x in lines if adjusted.get((x.group, x.label, measure), 1.0) < LEVEL]
        better = [line for line in sure if line.tests[measure].difference > 0]
        better.sort(key=lambda line: -line.tests[measure].difference)
        rows = []
        for line in better:
            test, p = line.tests[measure], adjusted[line.group, line.label, measure]
            difference = f"{100 * test.difference:+.1f} ({_range(test.low, test.high)})"
            seeds = _by_seed(line, lines, measure)
            rows.append([line.group, line.label, difference, seeds, f"{p:.2g}"])
        word = "Image+math" if measure == "math" else "Perception"
        total = len(adjusted) // len(GROUPS)
        words = (
            f"Of {total} rows in groups of cases, better than {BASELINE}: {len(better)}; worse: "
            f"{len(sure) - len(better)}. The others are undecided."
        )
        found += [f"### {word}: better than {BASELINE}, after the correction", words]
        if rows:
            head = ["cases", "row", "difference, points", "by seed", "p, corrected"]
            found.append(table(head, rows))
    return found


def _by_seed(line: Line, lines: Sequence[Line], measure: str) -> str:
    """Return the differences from task arithmetic, one per seed, in points."""
    own = line.scores[measure]
    (tuned,) = (x for x in lines if x.group == line.group and x.label == BASELINE)
    pairs = zip(own, tuned.scores[measure], strict=True)
    return ", ".join(f"{100 * (score.share - base.share):+.1f}" for score, base in pairs)


def _setting(results: Sequence[Result]) -> list[str]:
    """Report the setting for all cases beside methods at their own defaults or tuned weights."""
    found = [result for result in results if "test" in result.get("setting", {})]
    if not found:
        return ["### One setting for all cases", "None has been chosen yet (`--choose`)."]
    own = found[0]["setting"]
    rows, reached = [], 0
    for result in found:
        test, tuned = result["setting"]["test"], result["rows"][BASELINE]["test"]
        mllm = result["unmerged"]["test"]
        scores = {m: _score(test[m]) for m in GROUPS}
        own_math, needed = scores["math"].share, _score(tuned["math"]).share
        keeps = scores["perception"].share >= _score(mllm["perception"]).interval[0]
        is_reached = 0 < own_math >= NEEDED * needed and keeps
        reached += is_reached
        exact, ties = (_cell(result, label) for label in ("IP-Merging", "TIES"))
        rows.append([
            result["case"], str(scores["math"]), f"{own_math / needed:.2f}" if needed else "",
            str(scores["perception"]),
            str(_score(mllm["perception"])), _cell(result, BASELINE), exact, ties,
            "yes" if is_reached else "no",
        ])  # fmt: skip
    head = ["case", "image+math, %", "of tuned task arithmetic", "perception, %",
            "perception of the MLLM, %", f"{BASELINE}, tuned", "IP-Merging, tuned",
            "TIES, tuned", "reached"]  # fmt: skip
    words = (
        f"{own['row']} at {own['at']:g}, chosen from the validation draws of seed 0 and reported "
        f"on {len(found)} other cases. At least {NEEDED:g} of tuned task arithmetic, with "
        f"perception inside or above the MLLM's interval, is reached in {reached} of {len(found)}."
    )
    return ["### One setting for all cases, no tuning", words, table(head, rows)]


def _cell(result: Result, label: str) -> str:
    test = result["rows"].get(label, {}).get("test")
    if test is None:
        return "not applicable"
    return " / ".join(f"{100 * _score(test[m]).share:.1f}" for m in GROUPS)


def _controls(results: Sequence[Result]) -> list[str]:
    rows = []
    for result in results:
        for label, control in result["controls"].items():
            pooled = {
                m: sum((_score(draw[m]) for draw in control["draws"]), Score(0, 0)) for m in GROUPS
            }
            rows.append([
                result["case"], f"{label} ({len(control['draws'])} draws)", str(pooled["math"]),
                str(pooled["perception"]), control["of"], _cell(result, control["of"]),
            ])  # fmt: skip
    if not rows:
        return []
    head = ["case", "control, equal size", "image+math, %", "perception, %", "of", "its scores"]
    words = (
        "Controls of the gain that was chosen in a case; cases without one, and those with several "
        "experts, have none."
    )
    return ["### Controls of equal size", words, table(head, rows)]


def _overlaps(results: Sequence[Result]) -> list[str]:
    rows = [
        [
            result["case"],
            *(f"{result['overlaps'][n]:.2f}" for n in ("inputs", "chance", "inside", "on_inputs")),
        ]
        for result in results
    ]
    head = [
        "case",
        "MLLM's directions in those of its inputs",
        "chance",
        "math change inside the MLLM's directions",
        "math change on the MLLM's inputs",
    ]
    title = "### Directions, inputs and the math change"
    return [title, *_explanation(results), table(head, rows)]


def _explanation(results: Sequence[Result]) -> list[str]:
    """Test the explanation: the more of dM acts on what the MLLM sees, the more it should cost."""
    above = sum(r["overlaps"]["inputs"] > r["overlaps"]["chance"] for r in results)
    words = (
        f"The hypothesis behind the complement: the leading right directions of dV are directions "
        f"of the MLLM's inputs on pictures, and the part of dM inside them costs perception. The "
        f"overlap is above chance in {above} of {len(results)} cases."
    )
    found = [(r, cost) for r in results if (cost := _cost(r)) is not None]
    if len(found) < FEWEST:
        return [words]
    from scipy.stats import spearmanr

    costs = [cost for _, cost in found]
    tests = []
    for name, meaning in (("inside", "inside the directions"), ("on_inputs", "on the inputs")):
        rank = spearmanr([r["overlaps"][name] for r, _ in found], costs)
        tests.append(f"{meaning} {rank.statistic:+.2f} (p {rank.pvalue:.2g})")
    return [
        f"{words} Rank correlation, over {len(found)} cases, of the perception on the validation "
        f"draw that {BASELINE} loses at weight {FULL:g} with the share of dM "
        f"{' and '.join(tests)}. Cases with a common MLLM are not independent, so the p values are "
        f"too small."
    ]


def _cost(result: Result) -> float | None:
    """Return the perception that task arithmetic loses at full weight; None if not tried."""
    before = _score(result["unmerged"]["validation"]["perception"]).share
    tried = result["rows"][BASELINE].get("tried", ())
    return next((before - each["perception"] for each in tried if each["gain"] == FULL), None)


def _scale(results: Sequence[Result]) -> list[str]:
    """Compare the elicited skill at each size of the models."""
    found = [result for result in results if _compared_by_size(result)]
    if len({_millions(result) for result in found}) < 2:
        return []
    rows = []
    for result in sorted(found, key=lambda one: one["scale"]["parameters"]):
        own = result["scale"]
        chosen = [result["rows"].get(label, {}).get("gain") for label in COMPARED]
        rows.append([
            result["case"], f"{_millions(result)} M", f"{own['layers']:.0f} x {own['width']:.0f}",
            f"{100 * own['change']:.2f} %", f"{own['rank']:.2f}", f"{100 * own['first']:.0f} %",
            f"{own['similarity']:.2f} ({own['chance']:.2f})", f"{100 * own['selected']:.0f} %",
            f"{own['principal']:.2f}",
            *("none" if gain is None else f"{gain:g}" for gain in chosen),
        ])  # fmt: skip
    head = ["case", "parameters", "layers x width", "math change / base",
            "effective rank / directions", "energy of the first direction",
            "similarity of the first directions (chance)", "matrices at 0.4 or above",
            "mean cosine of 16 directions",
            *(f"gain of {label}" for label in COMPARED)]  # fmt: skip
    words = (
        "The elicited skill at each size; means over the matrices. The models differ in more than "
        "size: those of 135 M are a pretrained language model, fine-tuned by other schedules."
    )
    return ["### Does it change with size?", words, table(head, rows)]


def _tried(results: Sequence[Result]) -> Iterator[str]:
    """Show what every gain gave, for the models that are no toys."""
    for result in results:
        if result["scale"]["parameters"] < TOY:
            continue
        rows = []
        for label, row in result["rows"].items():
            tried = row.get("tried", ())
            cells = (f"{100 * each['math']:.0f} / {100 * each['perception']:.0f}" for each in tried)
            gains = (f"{each['gain']:g}" for each in tried)
            rows.append([label, ", ".join(gains), ", ".join(cells)])
        yield f"### Gains tried on {result['case']}"
        yield table(["row", "gains", "image+math / perception, validation draw, %"], rows)


def _compared_by_size(result: Result) -> bool:
    facts = result["facts"]
    plain = facts["experts"] == ["math"] and facts["kind"] == "many"
    return plain and facts["trio"] != "taught"


def _millions(result: Result) -> str:
    """Return the parameters of the language model in millions, with two digits or more."""
    millions = result["scale"]["parameters"] / 1e6
    return f"{millions:.0f}" if millions >= 10 else f"{millions:.1f}"


def _tables(
    lines: Sequence[Line],
    adjusted: Mapping[tuple[str, str, str], float],
    results: Sequence[Result],
) -> Iterator[str]:
    """Yield a table for every group of cases."""
    head = ["row", "gains", "size / dM", "image+math, %", "over seeds", "perception, %",
            "over seeds", "p, math", "p, perception"]  # fmt: skip
    for group, cases in grouped(results):
        unmerged = {m: [_score(case["unmerged"]["test"][m]) for case in cases] for m in GROUPS}
        rows = [["MLLM", "", "0", *_cells(unmerged), "", ""]]
        for line in lines:
            if line.group != group:
                continue
            gains = ", ".join("none" if g is None else f"{g:g}" for g in line.gains)
            p = [adjusted.get((group, line.label, m)) for m in GROUPS]
            shown = ["" if each is None else f"{each:.2g}" for each in p]
            rows.append([line.label, gains, f"{line.size:.2f}", *_cells(line.scores), *shown])
        refused = {
            label for case in cases for label, row in case["rows"].items() if "refused" in row
        }
        yield f"### {group} ({len(cases)} {'seed' if len(cases) == 1 else 'seeds'})"
        yield table(head, rows)
        yield f"Not applicable: {', '.join(sorted(refused))}." if refused else ""


def _cells(scores: Mapping[str, Sequence[Score]]) -> Iterator[str]:
    for measure in GROUPS:
        yield str(sum(scores[measure], Score(0, 0)))
        interval = seed_interval([score.share for score in scores[measure]])
        inside = None if interval is None else (max(0.0, interval[0]), min(1.0, interval[1]))
        yield "" if inside is None else f"({_range(*inside)})"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _score(outcomes: Sequence[bool]) -> Score:
    return Score(sum(outcomes), len(outcomes))


def _marks(lines: Sequence[Line]) -> list[Mark]:
    return [
        Mark(x.group, x.label, x.pooled("perception").share, x.pooled("math").share, x.size)
        for x in lines
    ]
