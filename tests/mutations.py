"""Seeded damages to every kind of file from outside, and the commands that read it.

    python tests/mutations.py --all [--count 1000] [--only pack plan ...]

runs the damages of each kind through `ipmerge_core.cli.main()` (or the function of the app that
reads the file) in one process, and prints a table: how many were accepted, how many refused in a
sentence, and how many escaped: a traceback, a message that is none, or a new file that is left
behind by a command that did not finish. `test_mutations.py` runs a sample.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from mutated_files import CASES, Case  # noqa: E402

from ipmerge_core.cli import main  # noqa: E402
from ipmerge_core.errors import IPMergeError  # noqa: E402

# --- damages ---------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**39, 0.5, -0.5, 1e-320, 1e99, 1e308, -1e308, "",
    "x", "a\nb", "\x00", "../../etc/passwd", "/etc/passwd", "nan", "é\u202e", "a" * 5000, [], [[]],
    [1], [None], {}, {"a": 1}, [0] * 3000,
]  # fmt: skip
TOKENS = [
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 100_000, b'"\\ud800"', b'"\\u0000"',
    b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"\x00", b"\n", b'"', b"}", b"]", b",",
]  # fmt: skip


def some_node(content: Any, chance: random.Random) -> tuple[Any, ...]:
    """The path to a value, the root included: at each level on with a probability of 0.8."""
    path: tuple[Any, ...] = ()
    while isinstance(content, dict | list) and content and chance.random() < 0.8:
        key = chance.choice(list(content) if isinstance(content, dict) else range(len(content)))
        path, content = (*path, key), content[key]
    return path


def damage_tree(content: Any, chance: random.Random) -> Any:
    """Replace, remove, add, rename or repeat a value somewhere."""
    path = some_node(content, chance)
    if not path:
        return chance.choice(HOSTILE)
    above = content
    for key in path[:-1]:
        above = above[key]
    key = path[-1]
    way = chance.choice(["replace", "replace", "replace", "remove", "add", "rename", "other"])
    if way == "replace":
        above[key] = chance.choice(HOSTILE)
    elif way == "remove":
        del above[key]
    elif way == "other":  # another value of this file
        value = content
        for step in some_node(content, chance):
            value = value[step]
        above[key] = json.loads(json.dumps(value))
    elif isinstance(above, list):
        above.insert(key, above[key] if way == "rename" else chance.choice(HOSTILE))
    elif way == "add":
        above[chance.choice(["x", "", "a\nb", "k" * 2000])] = chance.choice(HOSTILE)
    else:
        above[str(key) + chance.choice(["x", "\x00", "."])] = above.pop(key)
    return content


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Change, cut, repeat or insert bytes."""
    start, stop = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    ways: list[Callable[[], bytes]] = [
        lambda: data[:start],
        lambda: data[:start] + data[stop:],
        lambda: data[:stop] + data[start:],
        lambda: data[:start] + chance.choice(TOKENS) + data[start:],
        lambda: data[:start] + chance.choice(TOKENS) + data[start + 3 :],
        lambda: data[:start] + bytes([chance.randrange(256)]) + data[start + 1 :],
        lambda: b"",
        lambda: chance.randbytes(chance.randrange(1, 200)),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: gzip.compress(bytes(200_000_000), 1, mtime=0),
        lambda: gzip.compress(data, mtime=0)[:-5],
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
    ]
    weights = [3, 3, 3, 6, 6, 6, 1, 1, 1, 0.2, 1, 1]
    return chance.choices(ways, weights)[0]()


def damage_number(data: bytes, chance: random.Random) -> bytes:
    """Put a hostile token in the place of a number or word."""
    words = [n for n, sign in enumerate(data) if chr(sign).isalnum()]
    if not words:
        return damage_bytes(data, chance)
    start = stop = chance.choice(words)
    while start and chr(data[start - 1]).isalnum():
        start -= 1
    while stop < len(data) and (chr(data[stop]).isalnum() or data[stop : stop + 1] == b"."):
        stop += 1
    return data[:start] + chance.choice(TOKENS) + data[stop:]


def repeat_key(data: bytes, chance: random.Random) -> bytes:
    """Repeat the first field of an object."""
    starts = [n for n, sign in enumerate(data) if sign == ord("{")]
    if not starts:
        return damage_bytes(data, chance)
    start = chance.choice(starts) + 1
    comma = data.find(b",", start)
    return data[:start] + data[start : comma + 1 or None] + data[start:]


def damage(data: bytes, layout: str, chance: random.Random) -> bytes:
    """Damage the content of a file of this layout."""
    way = chance.choices(["tree", "bytes", "number", "key"], [5, 2, 2, 1])[0]
    if layout == "jsonl":
        lines = data.split(b"\n")
        number = chance.randrange(max(1, len(lines) - 1))
        if way == "bytes" and chance.random() < 0.5:
            return damage_bytes(data, chance)
        lines[number] = damage(lines[number], "json", chance)
        return b"\n".join(lines)
    if layout == "safetensors":
        length = struct.unpack("<Q", data[:8])[0]
        header, rest = data[8 : 8 + length], data[8 + length :]
        if way == "bytes" and chance.random() < 0.3:
            return damage_bytes(data, chance)
        header = damage(header, "json", chance)
        return struct.pack("<Q", len(header)) + header + rest
    if layout == "gzip":
        plain = damage(gzip.decompress(data), "json", chance)
        return (
            damage_bytes(data, chance)
            if chance.random() < 0.1
            else gzip.compress(plain, 1, mtime=0)
        )
    if way == "tree":
        content = yaml.safe_load(data) if layout == "yaml" else json.loads(data)
        content = damage_tree(content, chance)
        text = yaml.safe_dump(content) if layout == "yaml" else json.dumps(content)
        return text.encode("utf-8", "surrogatepass")
    return {"bytes": damage_bytes, "number": damage_number, "key": repeat_key}[way](data, chance)


# --- running ---------------------------------------------------------------------------------


class Result(NamedTuple):
    """What came of one damaged file."""

    outcome: str  # "accepted", "refused", or "escaped"
    message: str
    seconds: float


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run_case(case: Case, sound: Path, place: Path, seed: int) -> Result:
    """Damage a copy of the sound files in `place` and run the command that reads them."""
    chance = random.Random(f"{case.name} {seed}")
    shutil.copytree(sound, place, symlinks=True)
    target = chance.choice(case.files(place))
    target.write_bytes(damage(target.read_bytes(), case.layout_of(target), chance))
    before = files_below(place)
    started = time.perf_counter()
    outcome, message = attempt(case, place, chance)
    seconds = time.perf_counter() - started
    new = sorted(files_below(place) - before - {"home"})
    if outcome == "refused":
        if new:
            outcome, message = "escaped", f"left {new[:3]} after: {message}"
        elif not is_sentence(message):
            outcome = "escaped"
    return Result(outcome, message, seconds)


def attempt(case: Case, place: Path, chance: random.Random) -> tuple[str, str]:
    """Run a case and tell what came of it."""
    out, err = io.StringIO(), io.StringIO()
    try:
        if case.function is not None:
            case.function(place)
            return "accepted", ""
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = 0
            for arguments in case.commands(place, chance):
                code = main([*arguments, "--json", "--quiet"])
                if code:
                    break
    except IPMergeError as error:
        return "refused", f"ipmerge: {error}"
    except BaseException:  # noqa: BLE001 (this is what is looked for)
        return "escaped", traceback.format_exc(limit=-3)
    if code == 2 and arguments[0] == "check":  # its findings are its result
        findings = json.loads(out.getvalue()) if out.getvalue() else []
        refused = [found for found in findings if found["level"] == "refusal"]
        words = [f"{found['subject']}: {found['message']} {found['remedy']}" for found in refused]
        return "refused", f"ipmerge: {words[0]}" if words else err.getvalue().strip()
    if code == 2:
        return "refused", err.getvalue().strip()
    return ("accepted", "") if code == 0 else ("escaped", f"exit code {code}")


def is_sentence(message: str) -> bool:
    """Whether a message is one line that a person can act on."""
    return (
        message.startswith("ipmerge: ")
        and message.endswith((".", ")", "?"))
        and "\n" not in message
        and message.isprintable()
        and 40 < len(message) < 2000
        and "Traceback" not in message
    )


def run_kind(case: Case, count: int, first: int = 0) -> list[Result]:
    """Run so many damages of a kind."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        place, sound = Path(name) / "case", Path(name) / "sound"
        case.prepare(place)  # where it is read, so that stored paths hold
        place.rename(sound)
        for seed in range(first, first + count):
            results.append(run_case(case, sound, place, seed))
            shutil.rmtree(place)
    return results


def main_table() -> None:
    """Print a row per kind; leave with 1 if anything escaped."""
    from report import machine, table

    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="the thousand per kind")
    parser.add_argument("--count", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[case.name for case in CASES])
    wanted = parser.parse_args()
    count = wanted.count or (1000 if wanted.all else 30)
    print(machine(), "\n")
    rows, escaped = [], 0
    for case in CASES:
        if case.name not in wanted.only:
            continue
        results = run_kind(case, count, wanted.first)
        by = {o: [r for r in results if r.outcome == o] for o in ("accepted", "refused", "escaped")}
        slowest = max(result.seconds for result in results)
        rows.append([case.name, *(str(len(found)) for found in by.values()), f"{slowest:.1f} s"])
        escaped += len(by["escaped"])
        print(f"{case.name}: {len(by['escaped'])} escaped", file=sys.stderr, flush=True)
        for number, result in enumerate(results):
            if result.outcome == "escaped":
                print(f"seed {wanted.first + number}: {result.message}\n", file=sys.stderr)
    print(table(["kind of file", "accepted", "refused", "escaped", "slowest"], rows))
    sys.exit(escaped > 0)


if __name__ == "__main__":
    main_table()
