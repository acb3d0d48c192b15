"""Build the Evaluate tab: the form, the run in progress, and the result in view.

In: the session's `ChosenMerge`. Out: a run whose result is shown as plots and tables. A click on a
point chooses its plan; an item opens in the chat with both answers. Runs outlive the page, and the
results of finished runs are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from gradio.processing_utils import save_pil_to_cache

from ipmerge_core.errors import IPMergeError, PlanError, RunError
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.chat.answers import Side
from ipmerge_core.ui.chat.layout import Parts
from ipmerge_core.ui.chat.recorded import Reference
from ipmerge_core.ui.chat.turns import Turn
from ipmerge_core.ui.chosen_merge import ChosenMerge, chosen_line
from ipmerge_core.ui.device_choice import list_devices
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.evaluate.component import EvaluationView, report
from ipmerge_core.ui.evaluate.content import Json, recipe_of_point
from ipmerge_core.ui.evaluate.form import (
    Form,
    asked_of,
    lay_out_form,
    listed_parameters,
    listed_tasks,
    proposed_values,
    shown_groups,
)
from ipmerge_core.ui.evaluate.results import (
    find_item,
    listed_items,
    read_result,
    result_json,
    result_path,
)
from ipmerge_core.ui.evaluate.search_figures import SearchFigures
from ipmerge_core.ui.evaluate.search_form import wire_search
from ipmerge_core.ui.evaluate.start import result_of, start_evaluation
from ipmerge_core.ui.explore.tab import after_commits
from ipmerge_core.ui.finetuned_models import finetuned_of_pair
from ipmerge_core.ui.finished_merges import merges_of_pair
from ipmerge_core.ui.pairs import pair_name
from ipmerge_core.ui.run_list.rows import Keys, keys_held, visible_runs
from ipmerge_core.ui.runs import (
    EVALUATION,
    Remembered,
    RunPoll,
    RunState,
    RunView,
    Updates,
    disable_on_click,
)

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.search.coefficients import SearchResult

NO_RUN = '<p class="waiting">No evaluation yet.</p>'
_SEPARATOR = "|"  # between the id of a result and that of its pair


class EvaluateTab(NamedTuple):
    """What the app uses of this tab.

    `chose` are the events after which another merge is chosen; the form selects models to evaluate.
    """

    form: Form
    chose: list[Dependency]


class _Parts(NamedTuple):
    """The components of the tab."""

    form: Form
    run: RunView
    made: gr.Textbox  # the result of a run that has just finished, and its pair
    history: gr.Dropdown
    view: EvaluationView
    figures: SearchFigures
    before: gr.State  # the merge that was chosen before a point was taken


def evaluate_tab(
    backend: Backend,
    pair: gr.Dropdown,
    chosen: gr.State,
    chat: Parts,
    tabs: gr.Tabs,
    *,
    poll: RunPoll,
    memory: gr.BrowserState,
    tab: gr.Tab,
) -> EvaluateTab:
    """Lay out the tab inside the open `tab` and wire it.

    Args:
        backend: the app's runs and models.
        pair: the pair dropdown.
        chosen: holds the chosen merge.
        chat: the components of the chat, which an item is opened in.
        tabs: selects the chat, or the tab in which a plan is set.
        poll: updates the view of the run.
        memory: the run that the browser remembers.
        tab: the tab itself.
    """
    line = gr.HTML("", elem_id="evaluate-chosen", elem_classes="chosen-line")
    parts = _lay_out(hosted=backend.hosted)
    _wire_form(backend, parts, pair, chosen, poll, tab, line)
    _wire_run(backend, parts, chosen, poll, memory)
    _wire_history(parts)
    _wire_items(parts, chat, tabs)
    parts.figures.wire(parts.view, tabs)
    return EvaluateTab(parts.form, [_wire_taking(parts, pair, chosen, line)])


def _lay_out(*, hosted: bool) -> _Parts:
    form = lay_out_form(hosted=hosted)
    run = RunView("evaluation", empty=NO_RUN)
    made = gr.Textbox("", visible="hidden", elem_id="evaluation-made")
    history = gr.Dropdown([], label="Result", elem_id="evaluation-history", visible=False)
    view = EvaluationView(None, server_functions=[result_file, result_items])
    return _Parts(form, run, made, history, view, SearchFigures(), gr.State(None))


def _wire_form(
    backend: Backend,
    parts: _Parts,
    pair: gr.Dropdown,
    chosen: gr.State,
    poll: RunPoll,
    tab: gr.Tab,
    line: gr.HTML,
) -> None:
    """Fill the form when the tab is opened, and show the fields of the chosen kind."""
    form = parts.form

    def fill(now: ChosenMerge, visitor: str, first: str, second: str, merges: list[str]) -> Updates:
        listed = listed_models(backend, now.pack_id, keys_held(backend, visitor, {}))
        kept = [value for value in merges or [] if value in {known for _, known in listed}]
        return {
            form.merges: gr.update(choices=listed, value=kept),
            **listed_parameters(form, now, first, second),
            **listed_tasks(form, now, hosted=backend.hosted),
            parts.history: listed_results(backend, visitor),
        }

    asked = [chosen, poll.visitor, form.parameter, form.parameter2, form.merges]
    filled = [
        form.merges, form.parameter, form.parameter2, form.values, form.tasks, parts.history,
    ]  # fmt: skip
    opened = after_commits(tab.select, pair).then(show_errors(fill), asked, filled, **QUIET)
    opened.then(chosen_line, chosen, line, **QUIET)
    opened.then(lambda: list_devices(backend), None, form.device, **QUIET)
    groups = list(form.groups.values())
    form.kind.change(lambda kind: shown_groups(form, kind), form.kind, groups, **QUIET)
    wire_search(form.search, opened, chosen)
    for parameter, values in (
        (form.parameter, form.values),
        (form.parameter2, form.values2),
    ):
        parameter.input(proposed_values, parameter, values, queue=False, **QUIET)


def listed_models(backend: Backend, pack_id: str, keys: Keys) -> list[tuple[str, str]]:
    """List the finished merges and the fine-tuned models of a pair, as choices of a dropdown."""
    merges = [(merge.label, merge.run) for merge in merges_of_pair(backend, pack_id, keys)]
    tuned = finetuned_of_pair(backend, pack_id, keys)
    return merges + [(model.label, model.value) for model in tuned]


def _wire_run(
    backend: Backend, parts: _Parts, chosen: gr.State, poll: RunPoll, memory: gr.BrowserState
) -> None:
    """Start runs, follow them, and show the result of one that has finished."""
    form = parts.form

    def begin(visitor: str, now: ChosenMerge, *values: Any) -> Remembered:  # noqa: ANN401
        keys = keys_held(backend, visitor, {})
        started = start_evaluation(backend, now, asked_of(values), owner=visitor, keys=keys)
        return {**started._asdict(), "pack": now.pack_id}

    def extras(run: RunState, _: str) -> Updates:
        idle = not (run.owned and run.running)
        return {parts.made: made_by(backend, run), form.start: gr.update(interactive=idle)}

    parts.run.wire(backend, memory, poll, extras=extras, outputs=[parts.made, form.start])
    disable_on_click(form.start)
    asked = [poll.visitor, chosen, *form.fields]
    pressed = form.start.click(show_errors(begin), asked, memory, **QUIET)
    for ends in (pressed.success, pressed.failure):  # Gradio lets no `then` follow an error
        parts.run.follow(ends)

    def arrive(made: str, visitor: str) -> Updates:
        if not made:
            return {parts.history: gr.skip(), parts.view: gr.skip()}
        listed = listed_results(backend, visitor, made)
        return {parts.history: listed, parts.view: shown_result(made)}

    parts.made.change(
        show_errors(arrive), [parts.made, poll.visitor], [parts.history, parts.view], **QUIET
    )


def made_by(backend: Backend, run: RunState) -> str:
    """Return the result of a finished run with its pair; empty until it is finished."""
    if not run.finished or run.status is None:
        return ""
    from ipmerge_core.runtime.job_lists import describe_job

    about = describe_job(backend.store, run.status.id).about
    result = result_of(run.out)
    try:
        result_path(result)
    except RunError:
        return ""
    return f"{result}{_SEPARATOR}{about.get('pack', '')}"


def listed_results(backend: Backend, visitor: str, chosen: str | None = None) -> dict[str, Any]:
    """Return the update that lists the results a visitor may see, the newest first."""
    choices = []
    for run in visible_runs(backend, keys_held(backend, visitor, {})):
        if run.kind == EVALUATION and (made := made_by(backend, RunState(run.status, run.key))):
            about = run.request.about
            words = f"{about.get('method', 'evaluation')} · {about.get('pair', '')}"
            choices.append((f"{words} · {run.status.title}", made))
    update: dict[str, Any] = {"choices": choices, "visible": bool(choices)}
    if chosen:
        update["value"] = chosen
    return gr.update(**update)


def shown_result(made: str | None) -> Json | None:
    """Return the content of a result, by its id and pair; None without one.

    Raises: RunError, PlanError.
    """
    if not made:
        return None
    result, _, pack_id = made.partition(_SEPARATOR)
    return read_result(result, pack_id).content


def _wire_history(parts: _Parts) -> None:
    """Show another result."""
    parts.history.input(
        show_errors(shown_result), parts.history, parts.view, show_progress="minimal",
        api_visibility="private",
    )  # fmt: skip


def _wire_taking(parts: _Parts, pair: gr.Dropdown, chosen: gr.State, line: gr.HTML) -> Dependency:
    """Choose the merge of a point that cannot be set in Explore, or the one before; name it."""

    def take(
        event: gr.EventData, now: ChosenMerge, before: ChosenMerge | None
    ) -> tuple[ChosenMerge, ChosenMerge | None]:
        data = _data_of(event)
        if data.get("point") == -1:
            return before or now, None
        return taken(now, data), now

    inputs, outputs = [chosen, parts.before], [chosen, parts.before]
    found: Dependency = parts.view.take(show_errors(take), inputs, outputs, **QUIET)
    for ends in (found.success, after_commits(parts.view.taken, pair).then):
        ends(chosen_line, chosen, line, **QUIET)
    return found


def taken(now: ChosenMerge, data: Mapping[str, Any]) -> ChosenMerge:
    """Return the merge of a point as the chosen one. Raises: RunError, PlanError."""
    pack_id, point = str(data.get("pack")), data.get("point")
    found = read_result(str(data.get("id")), pack_id)
    points = found.points
    if not isinstance(point, int):
        raise RunError("Select a point of the result to choose its plan.")
    if now.pack_id != pack_id:
        raise PlanError(
            f"The result is about the pair '{pair_name(pack_id)}'. Select that pair first."
        )
    recipe = recipe_of_point(points[point]) if 0 <= point < len(points) else None
    if recipe is None:
        raise PlanError("This model cannot be chosen: it is a control, or a finished folder.")
    if recipe.method.name:
        return ChosenMerge(pack_id, now.plan, recipe.method, "merge")
    return ChosenMerge(pack_id, recipe.plan, recipe.method, "explore")


def _wire_items(parts: _Parts, chat: Parts, tabs: gr.Tabs) -> None:
    """Open an item in the chat with both answers."""

    def show(event: gr.EventData, turns: list[Turn]) -> Updates:
        turn = turn_of_item(_data_of(event), chat.prompt.GRADIO_CACHE)
        kept = turns[:-1] if turns and turns[-1].recorded else turns
        return {
            tabs: gr.Tabs(selected="try"),
            chat.prompt: {"text": turn.question, "files": list(turn.images)},
            chat.given: turn.reference,
            **chat.updates([*kept, turn], 2),
        }

    outputs = [tabs, chat.prompt, chat.given, *chat.outputs]
    parts.view.opened(show_errors(show), [chat.turns], outputs, **QUIET)


def turn_of_item(data: Mapping[str, Any], cache: str) -> Turn:
    """Return an item with the answers of both models as a recorded turn of the chat.

    Raises: RunError for an item that is not in the result, or whose data are not available.
    """
    pack_id, point = str(data.get("pack")), data.get("point")
    found = read_result(str(data.get("id")), pack_id)
    row, picture = find_item(found, point if isinstance(point, int) else -1, str(data.get("flip")))
    names = list(found.report.subjects)
    images: tuple[str, ...] = ()
    if picture is not None:
        images = (save_pil_to_cache(picture.convert("RGB"), cache, format="png"),)
    question = str(row.item["question"])
    reference = Reference(
        question=question,
        image=Path(images[0]).name if images else "",
        answer=str(row.item["references"][0]),
        is_math=row.item.get("group") == "math",
    )
    assert isinstance(point, int), "find_item has checked it"
    return Turn(
        question=question,
        images=images,
        pair=pair_name(pack_id),
        pack_id=pack_id,
        answers=(
            Side("Base", names[0], "finished", row.first.text),
            Side("Merged", names[point], "finished", row.second.text),
        ),
        reference=reference,
        recorded=found.report.created[:10],
    )


# --- functions that the page calls -----------------------------------------------------------


def result_file(asked: object) -> str:
    """Return the JSON, HTML or (of a search) CSV file for `[id, pack, kind]`. Raises: RunError."""
    result, pack_id, kind = _several(asked, 3)
    found = read_result(str(result), str(pack_id))
    if kind == "json":
        return result_json(found)
    if found.search is not None:
        return _search_file(found.search, str(kind))
    content = found.content
    if content["kind"] != "knockout" and len(content["points"]) > 1:
        content = {**content, **listed_items(found, _best(content))}
    return report(content)


def _search_file(found: SearchResult, kind: str) -> str:
    """Return the CSV file of all evaluations, or the HTML report."""
    from ipmerge_core.plots.search_report import evaluations_csv, report_page

    return evaluations_csv(found) if kind == "csv" else report_page(found)


def _best(content: Json) -> int:
    """Return the merged point with the best first task, whose items a report lists."""
    name = content["tasks"][0]["name"]
    points = range(1, len(content["points"]))
    return max(points, key=lambda i: content["points"][i]["scores"][name]["right"])


def result_items(asked: object) -> Json:
    """Return the items that a point changes for `[id, pack, point]`; with a reason if none."""
    result, pack_id, point = _several(asked, 3)
    try:
        found = read_result(str(result), str(pack_id))
        return listed_items(found, point if isinstance(point, int) else -1)
    except IPMergeError as error:
        return {"flips": [], "flipped": 0, "reason": str(error)}


def _several(asked: object, count: int) -> list[Any]:
    if not isinstance(asked, list) or len(asked) != count:
        raise RunError("The page sent an unexpected request. Reload it and try again.")
    return asked


def _data_of(event: gr.EventData) -> Mapping[str, Any]:
    data = event._data
    return data if isinstance(data, Mapping) else {}
