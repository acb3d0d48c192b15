"""Let a user choose the device of a run, where the machine has more than one.

In: the app's default device. Out: a dropdown, hidden until it is filled: finding devices takes
torch, which is not loaded when the page is built.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ipmerge_core.ui.backend import Backend

AUTO = "auto"


def device_field(elem_id: str, info: str) -> gr.Dropdown:
    """Lay out the dropdown; `list_devices` fills it."""
    return gr.Dropdown(
        [AUTO], value=AUTO, label="Device", info=info, visible=False, elem_id=elem_id
    )


def list_devices(backend: Backend) -> dict[str, Any]:
    """Return the update of the dropdown, which is shown if there is more than one device."""
    from ipmerge_core.runtime.devices import available_devices, describe_device

    here = available_devices()
    best = describe_device(backend.device_for())
    choices = [(f"auto: {best}", AUTO), *((describe_device(name), name) for name in here)]
    update: dict[str, Any] = gr.update(choices=choices, visible=len(here) > 1)
    return update
