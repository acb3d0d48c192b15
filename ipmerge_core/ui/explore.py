"""The Explore tab: the layer map of the chosen pair, and the spectra of one matrix.

In: the frame's pair dropdown and the session's `PlanChoice`. Out: that choice, updated once
whenever a drag in the map ends. Dragging itself never reaches this file: the map previews in the
browser.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gradio as gr
from gradio.events import Dependency

from ipmerge_core.errors import PlanError
from ipmerge_core.plots import spectra_figure, spectra_info
from ipmerge_core.ui.growing import (
    IsRunning,
    explored_pack,
    growth,
    nobody_runs,
    pair_choices,
)
from ipmerge_core.ui.layer_map import (
    LayerMap,
    PlanChoice,
    read_cells,
    read_commit,
    report,
)
from ipmerge_core.ui.messages import QUIET, told
from ipmerge_core.ui.packs import load_pack

PRESETS: list[dict[str, Any]] = [
    {
        "label": "IP-Merging",
        "source": "The paper's rule and update (arXiv 2510.14387). Its thresholds are not public; "
        "0.4 is the default of the authors' public code.",
        "plan": {"s": 0.4},
    },
    {
        "label": "IP-Merging, public code",
        "source": "As the authors' public code selects: the best corresponding angle reaches 0.4.",
        "plan": {"s": 0.4, "similarity": "max"},
    },
    {
        "label": "IP-Merging, γ max",
        "source": "Ours: γ divided by its maximum, so that the best-aligned direction passes in "
        "full; every matrix, λ 4.",
        "plan": {"s": 0, "variant": "max", "lambda": 4},
    },
    {
        "label": "Everything, rescaled",
        "source": "Ours, an ablation: no selection and no projection, only the rescaling ρ.",
        "plan": {"s": 0, "variant": "rescale_only"},
    },
    {
        "label": "Task arithmetic",
        "source": "Every matrix takes λ times the math task vector (arXiv 2212.04089).",
        "plan": {"s": 0, "variant": "select_only"},
    },
    {
        "label": "Nothing",
        "source": "λ = 0: the merged model equals the multimodal model.",
        "plan": {"s": 1, "lambda": 0},
    },
]

# In the page: a commit was answered; and until all are (and a pair is shown), 5 seconds at most.
_MAP = "document.querySelector('#layer-map .lm')?.parentNode.ipmerge"
_ANSWERED = f"() => {{ {_MAP}?.answered(); }}"
_UNTIL_SETTLED = f"""async (pair) => {{
  const isSettled = (map) => map.isSettled() && (!pair || map.packId === pair);
  for (let i = 0; i < 250 && {_MAP} && !isSettled({_MAP}); i++)
    await new Promise((wake) => setTimeout(wake, 20));
}}"""


class ExploreTab(NamedTuple):
    """What the frame needs of this tab.

    `committed` and `opened` are the events after which `choice` holds a new plan: chain on them
    with `.then(...)`, because `choice.change` does not fire after events that bypass the queue.
    """

    layer_map: LayerMap
    spectra: gr.Plot
    committed: Dependency
    opened: Dependency


def explore_tab(
    pair: gr.Dropdown, choice: gr.State, is_running: IsRunning = nobody_runs
) -> ExploreTab:
    """Lay out the tab inside the open `gr.Tab` and wire it to the pair and the session's choice.

    `is_running` says of a pair that is not finished whether its analysis is going on.
    """

    def grown(asked: object) -> dict[str, Any]:
        return grown_since(asked, is_running)

    # layout
    layer_map = LayerMap(
        map_content(pair.value) if pair.value else None, server_functions=[report_file, grown]
    )
    spectra = gr.Plot(
        label="Spectra of the chosen matrix", show_label=False, visible=False, elem_id="spectra"
    )

    # handlers
    def open_pair(pack_id: str) -> tuple[Any, ...]:
        return opened_pair(pack_id, is_running)

    def follow_link(event: gr.EventData) -> tuple[Any, ...]:
        pack_id = str(event._data.get("pack"))
        opened = open_pair(pack_id)
        return gr.update(choices=pair_choices(is_running, pack_id), value=pack_id), *opened

    def keep_plan(pack_id: str, event: gr.EventData) -> PlanChoice:
        return read_commit(event._data, explored_pack(pack_id))

    def draw_spectra(pack_id: str, event: gr.EventData) -> dict[str, Any]:
        records = read_cells(event._data, explored_pack(pack_id))
        infos = [spectra_info(record) for record in records]
        dark, narrow = (event._data.get(key) is True for key in ("dark", "narrow"))
        return gr.update(value=spectra_figure(*infos, dark=dark, narrow=narrow), visible=True)

    # wiring
    opened = pair.input(
        told(open_pair),
        pair,
        [layer_map, choice, spectra],
        show_progress_on=[pair],
        api_visibility="private",
    )
    layer_map.packselect(
        told(follow_link),
        None,
        [pair, layer_map, choice, spectra],
        show_progress="hidden",
        api_visibility="private",
    )
    committed = layer_map.commit(
        told(keep_plan),
        pair,
        choice,
        queue=False,
        show_progress="hidden",
        trigger_mode="multiple",  # "once" drops events, "always_last" repeats an old one's data
        api_visibility="private",
    )
    committed.then(None, None, None, js=_ANSWERED, queue=False, **QUIET)
    layer_map.cellselect(
        told(draw_spectra),
        pair,
        spectra,
        queue=False,
        show_progress="hidden",
        trigger_mode="multiple",
        api_visibility="private",
    )
    return ExploreTab(layer_map, spectra, committed, opened)


def after_commits(
    listener: Callable[..., Dependency], pair: gr.Dropdown | None = None
) -> Dependency:
    """Let an event wait, in the page, until the session's choice is the plan on show in Explore.

    Two requests that leave at nearly the same time may arrive in any order. With `pair`, wait also
    until the map shows the pair that is chosen: the choice comes with it.
    """
    return listener(None, pair, None, js=_UNTIL_SETTLED, queue=False, **QUIET)


def opened_pair(pack_id: str, is_running: IsRunning) -> tuple[Any, ...]:
    """Return what shows a pair, finished or growing: the map, its plan, and no large figure."""
    pack = explored_pack(pack_id, is_running)
    return content_of(pack_id, pack), start_choice(pack), gr.update(visible=False)


def grown_since(asked: object, is_running: IsRunning) -> dict[str, Any]:
    """Answer the map of a growing pair, which asks with `[pack id, matrices it knows]`."""
    pack_id, known = asked if isinstance(asked, list) and len(asked) == 2 else ("", 0)
    try:
        found = growth(str(pack_id), known if isinstance(known, int) else 0, is_running)
    except PlanError:
        return {"gone": "This pair is no longer here: its analysis was discarded."}
    if found["growing"] is None:
        found["presets"] = map_content(pack_id)["presets"]
    return found


def start_choice(pack: Mapping[str, Any]) -> PlanChoice:
    """The plan a pair opens with: the usual one, or one that selects where that selects nothing."""
    values = sorted(record["similarity"]["first"] for record in pack["records"])
    if values[-1] >= PlanChoice().similarity_threshold:
        return PlanChoice()
    return PlanChoice(similarity_threshold=math.floor(1000 * values[2 * len(values) // 3]) / 1000)


def map_content(pack_id: str, choice: PlanChoice | None = None) -> dict[str, Any]:
    """What the layer map draws of a finished pair. Raises: PlanError."""
    return content_of(pack_id, load_pack(pack_id), choice)


def content_of(
    pack_id: str, pack: Mapping[str, Any], choice: PlanChoice | None = None
) -> dict[str, Any]:
    """What the layer map draws: a pack, the plan to start from and the presets."""
    start = start_choice(pack)
    presets = PRESETS if start == PlanChoice() else [_third(start), *PRESETS]
    return {
        "id": pack_id,
        "home": space_page(),
        "pack": pack,
        "plan": (choice or start).to_browser(),
        "presets": presets,
    }


def report_file(asked: object) -> str:
    """The HTML report of `[pack id, plan]`, as the browser asks for it. Raises: PlanError."""
    if not isinstance(asked, list) or len(asked) != 2:
        raise PlanError("A report is made of a pair and a plan; the page sent something else.")
    pack_id = str(asked[0])
    choice = read_commit(asked[1], load_pack(pack_id))
    return report({**map_content(pack_id, choice), "home": ""})


def space_page() -> str:
    """The page of the Space that serves this app: the frame around us does not show our address."""
    space = os.environ.get("SPACE_ID", "")
    return f"https://huggingface.co/spaces/{space}" if space else ""


def _third(choice: PlanChoice) -> dict[str, Any]:
    return {
        "label": "Most alike third",
        "source": "Ours: the third of the matrices with the highest first angle, because none of "
        "this pair reaches the usual threshold 0.4.",
        "plan": choice.to_browser(),
    }
