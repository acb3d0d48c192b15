"""The presets that the app shows of the variants study, each with what was measured.

In: the results of the cases. Out: entries of the app's catalogue: the one setting for all cases,
and rows of the study at the gain that was chosen most often, with how often none was.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_rows import BASELINE, Row, rows

from ipmerge_core.evaluation.scores import Score
from ipmerge_core.runtime.atomic import write_whole

SHOWN = (
    "IP-Merging", "gamma max", "complement 0.8", "protect", "budget of IP-Merging", BASELINE,
    f"{BASELINE}, upper half", "TIES",
)  # fmt: skip
TOY = 1e8  # fewer parameters than this
Preset, Result = dict[str, Any], Mapping[str, Any]


def presets(results: Sequence[Result]) -> list[Preset]:
    """Return the setting for all cases, if there is one, and the rows that are shown."""
    toys = [result for result in results if result["scale"]["parameters"] < TOY]
    return [*_of_setting(toys), *_of_rows(toys)]


def write_presets(found: Sequence[Preset], path: Path) -> None:
    """Write presets, one per line."""
    body = ",\n".join(" " + json.dumps(preset, ensure_ascii=False) for preset in found)
    write_whole(path, f"[\n{body}\n]\n" if found else "[]\n")


def _of_rows(results: Sequence[Result]) -> Iterator[Preset]:
    known = {row.label: row for row in rows()}
    for label in SHOWN:
        own = [result for result in results if "test" in result["rows"].get(label, {})]
        tested = [result["rows"][label] for result in own]
        gains = Counter(row["gain"] for row in tested if row["gain"] is not None)
        if not gains:
            continue
        gain, none = min(gains, key=lambda each: (-gains[each], each)), len(own) - gains.total()
        words = (
            f"In {none} of {len(own)} cases no gain kept perception and improved image+math; "
            f"{gain:g} was chosen in {gains[gain]}. With the gain of each case, or none, "
            f"{_scores(tested, own)}."
        )
        yield _preset(known[label], label, gain, f"{_study(results)} {words}")


def _of_setting(results: Sequence[Result]) -> Iterator[Preset]:
    own = [result for result in results if "test" in result.get("setting", {})]
    if not own:
        return
    tested = [result["setting"] for result in own]
    label, gain = tested[0]["row"], tested[0]["at"]
    row = next(row for row in rows() if row.label == label)
    words = f"One setting for all cases, on {len(own)} that it was not chosen from: "
    source = f"{_study(results)} {words}{_scores(tested, own)}."
    yield _preset(row, "one setting for all", gain, source)


def _preset(row: Row, name: str, gain: float, source: str) -> Preset:
    arguments = row.at(gain)
    method = arguments.pop("method")
    return {
        "name": f"Study: {name}",
        "method": method,
        "arguments": arguments,
        "origin": "study",
        "source": source,
    }


def _study(results: Sequence[Result]) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"Ours, study of the variants of {today} on {len(results)} cases of toy models."


def _scores(tested: Sequence[Mapping[str, Any]], own: Sequence[Result]) -> str:
    def pooled(tests: Sequence[Mapping[str, Sequence[bool]]], measure: str) -> Score:
        return Score(
            sum(map(sum, (t[measure] for t in tests))), sum(len(t[measure]) for t in tests)
        )

    tests = [row["test"] for row in tested]
    before = [result["unmerged"]["test"] for result in own]
    math, perception = (pooled(tests, measure) for measure in ("math", "perception"))
    mllm = " and ".join(f"{100 * pooled(before, m).share:.0f} %" for m in ("math", "perception"))
    return (
        f"image+math is {100 * math.share:.0f} % and perception {100 * perception.share:.0f} %, of "
        f"{math.n} and {perception.n} answers (the MLLM: {mllm})"
    )
