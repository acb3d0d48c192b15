"""Wire the tools of the Try it tab: examples, Undo, exports, votes and recorded plans.

In: the components of the tab. Out: handlers that change turns without asking a model.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from ipmerge_core.errors import RunError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.blind import voted, votes_csv
from ipmerge_core.ui.chat.column_choice import Held
from ipmerge_core.ui.chat.columns import MOST_COLUMNS
from ipmerge_core.ui.chat.examples import content_of, picked
from ipmerge_core.ui.chat.export import KINDS, export
from ipmerge_core.ui.chat.layout import EMPTY_PROMPT, Parts, prompt_value
from ipmerge_core.ui.chat.recorded import Reference, examples_for
from ipmerge_core.ui.chat.settings import usual_rule
from ipmerge_core.ui.chat.turns import (
    Past,
    Turn,
    is_untouched,
    opening_turns,
    pushed,
    turn_of_example,
    without_records,
)
from ipmerge_core.ui.chosen_merge import chosen_line
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.explore.tab import PairView, after_commits, map_content
from ipmerge_core.ui.runs import Updates

if TYPE_CHECKING:
    from gradio.events import Dependency

# In the page, see chat.js: the outbox holds a text, or the name and the text of a file as JSON.
COPY = "(text) => { document.dispatchEvent(new CustomEvent('ipmerge-copy', { detail: text })); }"
SAVE = "(file) => { document.dispatchEvent(new CustomEvent('ipmerge-save', { detail: file })); }"


class FillPrompt(NamedTuple):
    """Puts a question into the prompt, with its reference answer."""

    parts: Parts

    @property
    def outputs(self) -> list[Any]:
        """The outputs of a handler that returns `updates`."""
        return [self.parts.prompt, self.parts.given]

    def updates(self, text: str, image: Path, reference: Reference) -> Updates:
        """Return the updates for a question, the file of its image and the reference."""
        given = reference._replace(image=image.name)
        return {self.parts.prompt: prompt_value(text, [str(image)]), self.parts.given: given}


def wire_columns_view(parts: Parts, resized: list[Dependency]) -> None:
    """Show the answers of a column that was added, and hide those of one that was removed."""

    def show(turns: list[Turn], *held: Any) -> Updates:  # noqa: ANN401
        return parts.updates(turns, len(Held(*held).columns))

    asked = [parts.turns, *parts.choice.asked]
    for event in resized:
        event.then(show, asked, parts.outputs, queue=False, **QUIET)


def wire_examples(parts: Parts) -> None:
    """Wire the examples; under another pair than theirs they are questions without answers."""

    def show(
        event: gr.EventData,
        typed: dict[str, Any],
        past: list[Past],
        before: list[Turn],
        *values: Any,  # noqa: ANN401
    ) -> Updates:
        held = Held(*values)
        example = picked(event, examples_for(held.chosen.pack_id))
        if example is None:
            return {parts.prompt: typed}
        turn = turn_of_example(example)
        kept = before[:-1] if before and before[-1].recorded else before
        turns = [*kept, turn] if turn.pack_id == held.chosen.pack_id else kept
        filled = prompt_value(turn.question, turn.images)
        return {
            parts.prompt: filled,
            parts.past: pushed(past, typed, before, filled),
            **parts.updates(turns, len(held.columns)),
        }

    asked = [parts.prompt, parts.past, parts.turns, *parts.choice.asked]
    filled = [parts.prompt, parts.past, *parts.outputs]
    parts.examples.pick(show, asked, filled, queue=False, trigger_mode="multiple", **QUIET)


def wire_random(parts: Parts) -> None:
    """Wire "Random example": a problem of the demo task with its reference answer."""
    fill = FillPrompt(parts)

    def draw(typed: dict[str, Any], past: list[Past], turns: list[Turn]) -> Updates:
        found = random_example(fill)
        return {**found, parts.past: pushed(past, typed, turns, found[parts.prompt])}

    asked, filled = [parts.prompt, parts.past, parts.turns], [*fill.outputs, parts.past]
    parts.tools.random.click(show_errors(draw), asked, filled, **QUIET)


def random_example(fill: FillPrompt) -> Updates:
    """Draw a problem of the demo task and fill it in."""
    from ipmerge_core.tasks.demo import TASKS, make_problem

    task = secrets.choice(TASKS)
    problem = make_problem(task, secrets.randbelow(2**31), "test", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{task}-{secrets.token_hex(4)}.png"
        problem.image.save(path)
        cached = Path(save_file_to_cache(path, fill.parts.prompt.GRADIO_CACHE))
    reference = Reference(problem.question, cached.name, problem.answer, problem.is_math)
    return fill.updates(problem.question, cached, reference)


def wire_history(parts: Parts) -> None:
    """Wire Clear and Undo, which restores the turns before the last change, and the prompt.

    What was typed since the change is kept.
    """

    def clear(
        typed: dict[str, Any],
        past: list[Past],
        before: list[Turn],
        *held: Any,  # noqa: ANN401
    ) -> Updates:
        return {
            parts.past: pushed(past, typed, before, EMPTY_PROMPT),
            parts.prompt: EMPTY_PROMPT,
            parts.strip: None,
            **parts.updates([], len(Held(*held).columns)),
        }

    def undo(typed: dict[str, Any], past: list[Past], *held: Any) -> Updates:  # noqa: ANN401
        if not past:
            raise RunError("There is nothing to undo.")
        last = past[-1]
        shown = parts.updates(last.turns, len(Held(*held).columns))
        restored = {parts.prompt: last.typed} if is_untouched(typed, last.left) else {}
        return {parts.past: past[:-1], **restored, **shown}

    filled = [parts.past, parts.prompt, *parts.outputs]
    asked = [parts.prompt, parts.past, parts.turns, *parts.choice.asked]
    parts.tools.clear.click(clear, asked, [parts.strip, *filled], queue=False, **QUIET)
    # Queued, because the page shows errors of queued events only.
    undone = [parts.prompt, parts.past, *parts.choice.asked]
    parts.tools.undo.click(show_errors(undo), undone, filled, **QUIET)


def wire_exports(parts: Parts) -> None:
    """Wire the exports of the conversation and of the votes, and the copy buttons."""

    def save(turns: list[Turn], *, kind: Any) -> str:  # noqa: ANN401
        return _file(*export(turns, kind))

    def save_votes(turns: list[Turn]) -> str:
        return _file("ipmerge-votes.csv", votes_csv(turns))

    def raw(turns: list[Turn], *, position: int) -> str:
        side = turns[-1].at(position) if turns else None
        if side is None or not side.text:
            raise RunError("There is no answer to copy in this column.")
        return side.text

    handlers: list[tuple[gr.Button, Callable[[list[Turn]], str], str]] = [
        (button, partial(save, kind=kind), SAVE)
        for kind, button in zip(KINDS, parts.tools.exports, strict=True)
    ]
    handlers.append((parts.vote.csv, save_votes, SAVE))
    handlers += [
        (parts.choice.columns[n].copy, partial(raw, position=n), COPY) for n in range(MOST_COLUMNS)
    ]
    for button, make, js in handlers:
        made = button.click(show_errors(make), parts.turns, parts.outbox, **QUIET)
        handed = made.success(None, parts.outbox, None, js=js, queue=False, **QUIET)
        handed.then(lambda: "", None, parts.outbox, queue=False, **QUIET)


def _file(name: str, text: str) -> str:
    return json.dumps([name, text])


def wire_vote(parts: Parts) -> None:
    """Wire the votes of blind mode; a vote reveals the names."""

    def vote(
        typed: dict[str, Any],
        past: list[Past],
        turns: list[Turn],
        reason: str,
        *held: Any,  # noqa: ANN401
        choice: str,
    ) -> Updates:
        after = voted(turns, choice, reason or "")
        shown = parts.updates(after, len(Held(*held).columns))
        return {parts.past: pushed(past, typed, turns), parts.vote.reason: "", **shown}

    asked = [parts.prompt, parts.past, parts.turns, parts.vote.reason, *parts.choice.asked]
    filled = [parts.past, parts.vote.reason, *parts.outputs]
    for button, choice in parts.vote.buttons:
        button.click(show_errors(partial(vote, choice=choice)), asked, filled, **QUIET)


def wire_records(backend: Backend, parts: Parts, pair: gr.Dropdown, shown: PairView) -> Dependency:
    """Wire the button that chooses a record's plan; remove the records of another pair.

    Returns the event after which the plan is chosen.
    """

    def take(turns: list[Turn], *values: Any) -> Updates:  # noqa: ANN401
        held = Held(*values)
        now, choice = held.chosen, turns[-1].choice if turns else None
        if choice is None or turns[-1].pack_id != now.pack_id:
            raise RunError("There is no recorded answer of this pair on show. Select an example.")
        taken = held._replace(chosen=now.with_record(choice))
        return {
            shown.chosen: taken.chosen,
            shown.layer_map: map_content(now.pack_id, choice),
            **parts.choice.updates(backend, taken),
        }

    def drop(typed: dict[str, Any], turns: list[Turn], *values: Any) -> Updates:  # noqa: ANN401
        """Replace the recorded answers of another pair, and their question if it is untouched."""
        held = Held(*values)
        pack_id = held.chosen.pack_id
        kept = without_records(turns, pack_id)
        filled: Updates = {}
        if turns and not kept:
            kept = opening_turns(pack_id)
            if kept and typed["text"] == turns[-1].question:
                filled = {parts.prompt: prompt_value(kept[0].question, kept[0].images)}
        return {
            **filled,
            parts.examples: content_of(examples_for(pack_id)),
            parts.settings.earlier: usual_rule(pack_id),
            **parts.updates(kept, len(held.columns)),
        }

    choice = parts.choice
    filled = [shown.chosen, shown.layer_map, *choice.shown]
    taken = parts.take.click(show_errors(take), [parts.turns, *choice.asked], filled, **QUIET)
    taken.success(chosen_line, choice.chosen, choice.line, **QUIET)
    after_commits(pair.change, pair).then(
        drop,
        [parts.prompt, parts.turns, *choice.asked],
        [parts.prompt, parts.examples, parts.settings.earlier, *parts.outputs],
        queue=False,
        **QUIET,
    )
    return taken
