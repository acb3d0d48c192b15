"""The rules that judge replies, against a table of replies that was written before them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ipmerge_core.tasks.items import Item, letter_of
from ipmerge_core.tasks.judging import judge

TABLE = Path(__file__).with_name("answer_cases.txt")
LEAST, LEAST_AGREEMENT = 300, 0.99


class Case(NamedTuple):
    """A line of the table."""

    item: Item
    reply: str
    verdict: str


def cases() -> list[Case]:
    found, kind, precision, choices = [], "", None, ()
    for line in TABLE.read_text(encoding="utf-8").split("\n"):
        if line.startswith("== "):
            name, _, rest = line.removeprefix("== ").partition("; choices: ")
            kind, _, digits = name.partition(".")
            precision = int(digits) if digits else None
            choices = tuple(rest.split(" | ")) if rest else ()
        elif " => " in line and not line.startswith("#"):
            reference, verdict, reply = line.split(" => ", 2)
            assert verdict in ("right", "wrong", "unjudged"), line
            assert kind != "choice" or reference in map(letter_of, range(len(choices))), line
            item = Item("1", "?", (reference,), kind, choices=choices, precision=precision)
            found.append(Case(item, reply.replace("\\n", "\n"), verdict))
    return found


def test_the_rules_agree_with_the_table():
    table = cases()
    assert len(table) >= LEAST
    wrong = [
        f"{case.item.kind} {case.item.answer!r}: {case.reply!r} is {case.verdict}, judged "
        f"{judge(case.item, case.reply)}"
        for case in table
        if judge(case.item, case.reply).outcome != case.verdict
    ]
    assert len(wrong) <= (1 - LEAST_AGREEMENT) * len(table), "\n".join(wrong)
