"""The presets that the app shows of the variants study, each with what was measured.

In: the lines of the page and the results of the cases. Out: entries of the app's catalogue: a row
of the study at the gain that was chosen most often, and the one setting for all cases.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_rows import BASELINE, Row, rows

from ipmerge_core.evaluation.scores import Score
from ipmerge_core.runtime.atomic import write_whole

if TYPE_CHECKING:
    from study_page import Line

SHOWN = (
    "IP-Merging", "gamma max", "complement 0.8", "protect", "budget of IP-Merging", BASELINE,
    f"{BASELINE}, upper half", "TIES",
)  # fmt: skip
TOY = 1e8  # fewer parameters than this
Preset = dict[str, Any]


def presets(lines: Sequence[Line], results: Sequence[Mapping[str, Any]]) -> list[Preset]:
    """Return the setting for all cases, if there is one, and the rows that are shown."""
    toys = [result for result in results if result["scale"]["parameters"] < TOY]
    return [*_of_setting(toys), *_of_rows(toys)]


def write_presets(found: Sequence[Preset], path: Path) -> None:
    """Write presets, one per line."""
    body = ",\n".join(" " + json.dumps(preset, ensure_ascii=False) for preset in found)
    write_whole(path, f"[\n{body}\n]\n" if found else "[]\n")


def _of_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[Preset]:
    known = {row.label: row for row in rows()}
    for label in SHOWN:
        own = [
            result["rows"][label] for result in results if "test" in result["rows"].get(label, {})
        ]
        gains = Counter(row["gain"] for row in own if row["gain"] is not None)
        if not gains:
            continue
        gain = min(gains, key=lambda each: (-gains[each], each))
        words = (
            f"{gain:g} was chosen in {gains[gain]} of {len(own)} cases; with the gain chosen in "
            f"each, {_scores(own, results)}."
        )
        yield _preset(known[label], label, gain, f"{_study(results)} {words}")


def _of_setting(results: Sequence[Mapping[str, Any]]) -> Iterator[Preset]:
    own = [r["setting"] for r in results if "test" in r.get("setting", {})]
    if not own:
        return
    label, gain = own[0]["row"], own[0]["at"]
    row = next(row for row in rows() if row.label == label)
    words = f"One setting for all cases, on {len(own)} that it was not chosen from: "
    yield _preset(
        row, "one setting for all", gain, f"{_study(results)} {words}{_scores(own, results)}."
    )


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


def _study(results: Sequence[Mapping[str, Any]]) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"Ours, study of the variants of {today} on {len(results)} cases of toy models."


def _scores(own: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> str:
    def pooled(tests: Sequence[Mapping[str, Sequence[bool]]], measure: str) -> Score:
        return Score(
            sum(map(sum, (t[measure] for t in tests))), sum(len(t[measure]) for t in tests)
        )

    tests = [row["test"] for row in own]
    before = [result["unmerged"]["test"] for result in results]
    math, perception = (pooled(tests, measure) for measure in ("math", "perception"))
    mllm = " and ".join(f"{100 * pooled(before, m).share:.0f} %" for m in ("math", "perception"))
    return (
        f"image+math is {100 * math.share:.0f} % and perception {100 * perception.share:.0f} % of "
        f"{math.n + perception.n} answers (the MLLM: {mllm})"
    )
