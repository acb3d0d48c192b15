"""Show the most likely tokens of two columns where their answers begin to differ.

In: the last turn, and the columns that answered it. Out: a table of the most likely tokens of both
columns after the text that they share, as HTML.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.zero_gpu import call_seconds, is_zero_gpu, on_gpu
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import find_column
from ipmerge_core.ui.chat.asking import Typed, make_question
from ipmerge_core.ui.chat.inputs import MODELS, Inputs, inputs_of
from ipmerge_core.ui.chat.layout import Parts
from ipmerge_core.ui.chat.question import PackedQuestion, Question, pack_question
from ipmerge_core.ui.chat.settings import read_settings
from ipmerge_core.ui.chat.turns import Turn
from ipmerge_core.ui.errors import show_errors
from ipmerge_core.ui.lending import LentHost
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from ipmerge_core.adapters.first_difference import TokenChoice

TOP = 5  # tokens per column
LONGEST_SHARED = 60  # characters of the shared text that are shown
STALE = "Press Ask again to compare the models that are selected now."


class Difference(NamedTuple):
    """Where two columns of a turn begin to differ: their numbers, and the token."""

    first: int
    second: int
    token: int


def wire_difference(backend: Backend, parts: Parts) -> None:
    """Wire "Token probabilities"."""

    def show(*values: Any) -> str:  # noqa: ANN401
        now = Inputs.read(values)
        last = now.turns[-1] if now.turns else None
        if last is None or last.recorded or not last.is_over:
            raise RunError(
                "Token probabilities need two live answers. Ask a question, and wait until both "
                "columns have finished."
            )
        if last.is_hidden:
            raise RunError("The names of these answers are hidden. Vote first.")
        found = find_difference(last)
        return _table(backend, now, last, found)

    parts.compare.click(
        show_errors(show),
        inputs_of(parts),
        parts.difference,
        **{**MODELS, "show_progress": "minimal", "show_progress_on": None},
    )


def find_difference(turn: Turn) -> Difference:
    """Find the first column that differs from the first one. Raises: RunError if none does."""
    from ipmerge_core.adapters.first_difference import first_difference

    ids = [side.ids for side in turn.answers]
    for second in range(1, len(ids)):
        index = first_difference(ids[0], ids[second])
        if index is not None and ids[0] and ids[second]:
            return Difference(0, second, index)
    raise RunError("All answers consist of the same tokens, so that there is no first difference.")


class _Compared(NamedTuple):
    """What to compute: two columns with what answered then, and the tokens of the first one."""

    columns: tuple[int, int]
    answered: tuple[tuple[str, str, str], ...]  # name, source and plan of each
    ids: tuple[int, ...]
    token: int  # where the answers differ


_Found: TypeAlias = "tuple[str, list[list[TokenChoice]]]"  # the shared text, and tokens by column


def _table(backend: Backend, now: Inputs, last: Turn, where: Difference) -> str:
    asked = _question(now, last, where)
    sides = [last.answers[number] for number in (where.first, where.second)]
    answered = tuple((side.name, side.source, side.plan) for side in sides)
    compared = _Compared((where.first, where.second), answered, sides[0].ids, where.token)
    if is_zero_gpu():
        lent: Any = _lent_choices(LentHost.of(backend), pack_question(asked), compared)
        with closing(lent) as stream:
            shared, choices = next(stream)
    else:
        shared, choices = _choices(backend, asked, compared)
    return difference_html([name for name, _, _ in answered], shared, choices)


def _choices(backend: Backend, asked: Question, compared: _Compared) -> _Found:
    """Compute the likely tokens. Raises: RunError if a column asks another model now."""
    from ipmerge_core.adapters.columns import Row
    from ipmerge_core.adapters.first_difference import shared_text

    live = backend.live_model(asked.pack_id)
    messages, rows = asked.messages(), []
    for number, (name, *answered) in zip(compared.columns, compared.answered, strict=True):
        found = find_column(backend, live, asked, asked.columns[number], lambda _: None)
        if [found.label, found.plan] != answered:
            raise RunError(f"The model of {name} is another one now. {STALE}")
        rows.append(Row(found.column, messages[number], asked.settings))
    choices = live.next_tokens(rows, compared.ids[: compared.token], TOP)
    return shared_text(live.loaded, compared.ids, compared.token), choices


def _lent_seconds(host: LentHost, asked: PackedQuestion, compared: _Compared) -> int:
    """Return the GPU time of one pass of two columns, whose factors may have to be prepared."""
    del host, asked
    return call_seconds(1, len(compared.columns), prepares=True)


@on_gpu(_lent_seconds)
def _lent_choices(host: LentHost, asked: PackedQuestion, compared: _Compared) -> Iterator[_Found]:
    """Yield the likely tokens once, in a process that has a GPU."""
    host.backend().import_libraries()
    yield _choices(host.backend(), asked.unpack(), compared)


def _question(now: Inputs, last: Turn, where: Difference) -> Question:
    settings = read_settings(*now.settings)._replace(system=last.system)
    typed = Typed(last.question, last.images)
    asked = make_question(typed, now.held, settings, now.turns[:-1])
    if last.pack_id != asked.pack_id or where.second >= len(asked.columns):
        raise RunError(f"The pair or the columns are other ones now. {STALE}")
    return asked


def difference_html(
    names: Sequence[str], shared: str, choices: Sequence[Sequence[TokenChoice]]
) -> str:
    """Format the most likely tokens of columns after the text that their answers share."""
    tail = shared[-LONGEST_SHARED:]
    before = f"after “{'…' if len(shared) > len(tail) else ''}{tail}”" if tail else "at the start"
    tables = "".join(
        f"<table><caption>{as_html(name)}</caption><thead><tr><th>Token</th><th>Probability</th>"
        f"</tr></thead><tbody>{''.join(map(_row, tokens))}</tbody></table>"
        for name, tokens in zip(names, choices, strict=True)
    )
    return f'<p>First difference {as_html(before)}</p><div class="tables">{tables}</div>'


def _row(choice: TokenChoice) -> str:
    shown = as_html(repr(choice.text)[1:-1])  # with visible line ends
    return f"<tr><td><code>{shown}</code></td><td>{choice.probability:.2%}</td></tr>"
