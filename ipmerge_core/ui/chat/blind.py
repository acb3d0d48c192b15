"""Shuffle the answers of a turn in blind mode, count votes, and export them as CSV.

In: a seed, the number of columns, votes. Out: the order of the columns, a tally by model, and rows
with the revealed names. Pure functions.
"""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from dataclasses import replace

from ipmerge_core.errors import RunError
from ipmerge_core.ui.chat.columns import LETTERS
from ipmerge_core.ui.chat.turns import Turn, Turns, Vote
from ipmerge_core.ui.safe_text import as_html

TIE, BOTH_BAD = "tie", "both bad"
LONGEST_REASON = 500  # characters
_FIELDS = (
    "asked", "pair", "question", "images", "blind seed", "shown", "model", "plan", "answer",
    "vote", "preferred", "reason",
)  # fmt: skip


def shuffled(n_columns: int, seed: int, turn: int) -> tuple[int, ...]:
    """Return the column shown at each position in a turn of a blind comparison.

    >>> shuffled(3, seed=1, turn=0) == shuffled(3, seed=1, turn=0), sorted(shuffled(3, 1, 0))
    (True, [0, 1, 2])
    """
    order = list(range(n_columns))
    random.Random(f"{seed} {turn}").shuffle(order)  # noqa: S311 (a shuffle, not a secret)
    return tuple(order)


def voted(turns: Turns, choice: str, reason: str) -> list[Turn]:
    """Return the turns with a vote on the last one, which reveals its names.

    Raises: RunError if there is nothing to vote on.
    """
    last = turns[-1] if turns else None
    if last is None or not last.is_hidden or not last.is_over:
        raise RunError("There is no blind answer to vote on. Ask a question in blind mode first.")
    known = {*LETTERS[: len(last.answers)], TIE, BOTH_BAD}
    if choice not in known:
        raise RunError(f"Unknown vote '{choice[:20]}'; expected one of {', '.join(sorted(known))}.")
    if len(reason) > LONGEST_REASON:
        raise RunError(f"The reason has {len(reason)} characters; the maximum is {LONGEST_REASON}.")
    return [*turns[:-1], replace(last, vote=Vote(choice, reason.strip()))]


def preferred(turn: Turn) -> str:
    """Return the model that was preferred, or the vote if it was none."""
    if turn.vote is None:
        return ""
    if turn.vote.choice not in LETTERS:
        return turn.vote.choice
    side = turn.at(LETTERS.index(turn.vote.choice))
    return (side.source or side.name) if side else turn.vote.choice


def tally_html(turns: Turns) -> str:
    """Format how often each model was preferred; empty without votes."""
    votes = Counter(preferred(turn) for turn in turns if turn.vote)
    if not votes:
        return ""
    total = sum(votes.values())
    rows = "".join(
        f"<tr><td>{as_html(name)}</td><td>{count}</td></tr>" for name, count in votes.most_common()
    )
    head = "<tr><th>Preferred</th><th>Votes</th></tr>"
    caption = f"<caption>{total} blind vote{'s' if total != 1 else ''}</caption>"
    return f'<table class="tally">{caption}<thead>{head}</thead><tbody>{rows}</tbody></table>'


def votes_csv(turns: Turns) -> str:
    """Return the votes as CSV, one row per answer. Raises: RunError without votes."""
    voted_on = [turn for turn in turns if turn.vote]
    if not voted_on:
        raise RunError("There are no votes yet. Turn on blind mode, ask a question and vote.")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\r\n")
    table.writerow(_FIELDS)
    for turn in voted_on:
        table.writerows(_rows(turn))
    return text.getvalue()


def _rows(turn: Turn) -> list[list[str]]:
    vote = turn.vote or Vote("")
    rows = []
    for position in range(len(turn.answers)):
        side = turn.at(position)
        if side is not None:
            values = [turn.asked, turn.pair, turn.question, len(turn.images), turn.blind_seed]
            values += [LETTERS[position], side.source or side.name, side.plan, side.text]
            values += [vote.choice, preferred(turn), vote.reason]
            rows.append([_cell(value) for value in values])
    return rows


def _cell(value: object) -> str:
    """Return a value that no spreadsheet takes for a formula."""
    text = "" if value is None else str(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
