"""Every handler of the app with an input that holds no choice, or one that is not offered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import pytest
from event_loops import finished, in_loop
from gradio.blocks import BlockFunction
from gradio.state_holder import SessionState

from ipmerge_core.ui.app import build_app
from ipmerge_core.ui.backend import Backend

MAP_EVENTS = ("commit", "cellselect", "packselect")  # they have data of their own
CHOICES = (gr.Dropdown, gr.Radio, gr.CheckboxGroup, gr.File, gr.MultimodalTextbox)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gr.Blocks]:
    """The whole app with a home folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPMERGE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("SPACE_ID", raising=False)
        yield in_loop(lambda: build_app(Backend()))


def functions(app: gr.Blocks) -> list[tuple[BlockFunction, int]]:
    """Every handler with the position of each of its inputs that is chosen by hand."""
    return [
        (each, place)
        for each in app.fns.values()
        if each.fn is not None and not {event for _, event in each.targets} & set(MAP_EVENTS)
        for place, component in enumerate(each.inputs)
        if isinstance(component, CHOICES)
    ]


def default(component: Any) -> Any:
    if isinstance(component, gr.State):
        return None  # the session has its value
    if isinstance(component, gr.Textbox) and component.value is None:
        return ""
    return component.postprocess(component.value) if component.value is not None else None


def call(app: gr.Blocks, each: BlockFunction, place: int, value: object) -> BaseException | None:
    """Call a handler as a page does, the list of runs without a run; return its error."""
    inputs = [default(component) for component in each.inputs]
    inputs = [found.model_dump() if hasattr(found, "model_dump") else found for found in inputs]
    inputs[place] = value
    request = gr.Request(session_hash="walk", headers={})
    page: dict[str, Any] = {"request": request, "state": SessionState(app)}
    event = gr.EventData(None, {})
    try:
        finished(app.process_api(each, inputs, event_data=event, **page))
    except Exception as error:  # noqa: BLE001 (the test judges it)
        return error
    return None


def test_the_walk_meets_every_choice_of_the_app(app):
    walked = {each.inputs[place].elem_id for each, place in functions(app)}
    choices = {
        block.elem_id
        for block in app.blocks.values()
        if isinstance(block, CHOICES) and block.elem_id
    }
    assert choices <= walked
    assert {"pair", "analyse-known", "model-a", "model-d", "merge-method", "compare-pair",
            "prompt"} <= choices  # fmt: skip


@pytest.mark.parametrize("value", [None, "no such choice", 10**9])
def test_no_handler_fails_on_no_choice_or_an_unknown_one(app, value):
    failures = []
    for each, place in functions(app):
        if value is not None and isinstance(each.inputs[place], gr.File | gr.MultimodalTextbox):
            continue  # these hold no choice of a list
        error = call(app, each, place, value)
        if error is None or (isinstance(error, gr.Error) and (value is not None or each.queue)):
            continue
        failures.append(f"{each.name} of {each.inputs[place].elem_id}: {error!r:.300}")
    assert not failures, "\n".join(failures)
