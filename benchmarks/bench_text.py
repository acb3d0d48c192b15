r"""How the time to handle a text grows with its length, where patterns meet text of others.

    python benchmarks/bench_text.py [--length 100000] [--repeats 3] [--only "hub id" ...]

Each door (messages of the chat, names, prompts, tensor names, ids) is given texts of one token
repeated, such as `\(` or `|a|`, at half the length and at the whole. Linear time makes a ratio of
2. Processor seconds are compared, so that other work on the machine counts little; what takes less
than a few milliseconds at the whole length is not judged.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from math import inf
from pathlib import Path
from time import process_time

from report import machine, table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from text_doors import DOORS, LONGEST, TOKENS  # noqa: E402

BAR = 2.5
TOO_SHORT = 5e-3  # seconds


def processor_seconds(door: Callable[[str], object], text: str) -> float:
    """Processor seconds of one call."""
    started = process_time()
    door(text)
    return process_time() - started


def growth(door: Callable[[str], object], token: str, length: int, repeats: int) -> list[float]:
    """Processor seconds at half the length and at the whole, the least of some repeats.

    Other work only ever adds, so what looks steep is measured some more times.
    """
    whole = (token * (length // len(token) + 1))[:length]
    least = [inf, inf]
    for number in range(4 * repeats):
        taken = [processor_seconds(door, text) for text in (whole[: length // 2], whole)]
        least = [min(pair) for pair in zip(least, taken, strict=True)]
        is_steep = least[1] > max(BAR * least[0], TOO_SHORT)
        if number + 1 >= repeats and not is_steep:
            break
    return least


def main() -> None:
    """Print a row per door; leave with 1 if the time of one more than doubles."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=LONGEST)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=DOORS, default=list(DOORS), metavar="DOOR")
    wanted = parser.parse_args()
    print(machine(), "\n")
    gc.disable()  # as timeit does: its passes cost by what else is in memory
    rows, worst = [], 0.0
    for name in wanted.only:
        gc.collect()
        door = DOORS[name]
        taken = {token: growth(door, token, wanted.length, wanted.repeats) for token in TOKENS}
        slowest = max(taken, key=lambda token: taken[token][1])
        ratios = {t: two / one for t, (one, two) in taken.items() if two > TOO_SHORT and one}
        steepest = max(ratios, key=lambda token: ratios[token], default=None)
        ratio = f"{ratios[steepest]:.2f} (`{steepest!r}`)" if steepest else "too short to tell"
        rows.append([name, f"{1000 * taken[slowest][1]:.0f} ms (`{slowest!r}`)", ratio])
        worst = max(worst, ratios[steepest] if steepest else 0.0)
    head = [
        "text of others",
        f"slowest of {wanted.length:,} characters",
        "largest time(2n)/time(n)",
    ]
    print(table(head, rows))
    print(f"\nlargest ratio {worst:.2f}, bar {BAR}")
    sys.exit(worst > BAR)


if __name__ == "__main__":
    main()
