"""Build the Explore tab: the layer map of the chosen pair and the spectra of one matrix.

In: the pair dropdown and the session's `ChosenMerge`. Out: that merge, chosen once at the end of
every drag on the map. Dragging itself sends no request: the map computes previews in the browser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gradio as gr
from gradio.events import Dependency

from ipmerge_core.errors import PlanError
from ipmerge_core.models.catalogue import load_catalogue
from ipmerge_core.plots.spectra import spectra_figure, spectra_info
from ipmerge_core.runtime.host import space_id
from ipmerge_core.ui.chosen_merge import ChosenMerge
from ipmerge_core.ui.errors import QUIET, show_errors
from ipmerge_core.ui.explore.layer_map import LayerMap, report
from ipmerge_core.ui.explore.partial_packs import (
    IsRunning,
    explored_pack,
    nobody_runs,
    pair_choices,
    records_since,
)
from ipmerge_core.ui.knockout_files import read_knockout
from ipmerge_core.ui.method_choice import EXPLORED_METHOD
from ipmerge_core.ui.pairs import load_pack
from ipmerge_core.ui.plan_choice import PlanChoice, read_cells, read_commit
from ipmerge_core.ui.runs import Updates
from ipmerge_core.ui.safe_text import as_html

LONGEST_LINK = 4000  # characters of a permalink's query

# In the page: count an answered commit; wait until all are answered (and the pair is shown), for
# at most 5 seconds.
_MAP = "document.querySelector('#layer-map .lm')?.parentNode.ipmerge"
_ANSWERED = f"() => {{ {_MAP}?.answered(); }}"
_UNTIL_SETTLED = f"""async (pair) => {{
  const isSettled = (map) => map.isSettled() && (!pair || map.packId === pair);
  for (let i = 0; i < 250 && {_MAP} && !isSettled({_MAP}); i++)
    await new Promise((wake) => setTimeout(wake, 20));
}}"""


class OpenedPair(NamedTuple):
    """A pair as it is shown: the content of the map and the plan that it starts with."""

    content: dict[str, Any]
    choice: PlanChoice


class PairView(NamedTuple):
    """The components that show a pair."""

    layer_map: LayerMap
    chosen: gr.State
    spectra: gr.Plot

    def updates(self, opened: OpenedPair, now: ChosenMerge | None = None) -> Updates:
        """Return the updates that show a pair; the figure of another pair's matrix is hidden.

        The method and the options of the merge that is chosen `now` stay chosen.
        """
        return {
            self.layer_map: opened.content,
            self.chosen: (now or ChosenMerge()).opened(opened.content["id"], opened.choice),
            self.spectra: gr.update(visible=False),
        }


class ExploreTab(NamedTuple):
    """What the app uses of this tab.

    `committed` and `opened` are the events after which `chosen` holds a new plan: chain on them
    with `.then(...)`, because `chosen.change` does not fire after events that bypass the queue.
    """

    view: PairView
    committed: Dependency
    opened: Dependency


def explore_tab(
    pair: gr.Dropdown, chosen: gr.State, is_running: IsRunning = nobody_runs
) -> ExploreTab:
    """Lay out the tab inside the open `gr.Tab` and wire it to the pair and the chosen merge.

    `is_running` returns whether the analysis of an unfinished pair is in progress.
    """

    def grown(asked: object) -> dict[str, Any]:
        return grown_since(asked, is_running)

    # layout
    layer_map = LayerMap(
        map_content(pair.value) if pair.value else None, server_functions=[report_file, grown]
    )
    spectra = gr.Plot(
        label="Spectra of the selected matrix", show_label=False, visible=False, elem_id="spectra"
    )

    view = PairView(layer_map, chosen, spectra)

    # handlers
    def show_pair(pack_id: str | None, now: ChosenMerge) -> Updates:
        return view.updates(open_pair(pack_id, is_running), now)

    def follow_link(now: ChosenMerge, event: gr.EventData) -> Updates:
        pack_id = str(event._data.get("pack"))
        shown = show_pair(pack_id, now)
        return {pair: gr.update(choices=pair_choices(is_running, pack_id), value=pack_id), **shown}

    def keep_plan(pack_id: str, now: ChosenMerge, event: gr.EventData) -> ChosenMerge:
        plan = read_commit(event._data, explored_pack(pack_id))
        of_link = event._data.get("opened") is True
        return now.with_link(plan) if of_link else now.with_plan(plan)

    def draw_spectra(pack_id: str, event: gr.EventData) -> dict[str, Any]:
        records = read_cells(event._data, explored_pack(pack_id))
        infos = [spectra_info(record) for record in records]
        infos = [info._replace(title=as_html(info.title)) for info in infos]  # as plotly reads it
        dark, narrow = (event._data.get(key) is True for key in ("dark", "narrow"))
        return gr.update(value=spectra_figure(*infos, dark=dark, narrow=narrow), visible=True)

    # wiring
    opened = pair.input(
        show_errors(show_pair),
        [pair, chosen],
        [*view],
        show_progress_on=[pair],
        api_visibility="private",
    )
    layer_map.packselect(
        show_errors(follow_link),
        chosen,
        [pair, *view],
        show_progress="hidden",
        api_visibility="private",
    )
    committed = layer_map.commit(
        show_errors(keep_plan),
        [pair, chosen],
        chosen,
        queue=False,
        show_progress="hidden",
        trigger_mode="multiple",  # "once" drops events, "always_last" repeats an old one's data
        api_visibility="private",
    )
    committed.then(None, None, None, js=_ANSWERED, queue=False, **QUIET)
    layer_map.cellselect(
        show_errors(draw_spectra),
        pair,
        spectra,
        queue=False,
        show_progress="hidden",
        trigger_mode="multiple",
        api_visibility="private",
    )
    return ExploreTab(view, committed, opened)


def after_commits(
    listener: Callable[..., Dependency], pair: gr.Dropdown | None = None
) -> Dependency:
    """Delay an event, in the page, until the session's choice is the plan shown in Explore.

    Two requests sent at nearly the same time can arrive in any order. With `pair`, also wait until
    the map shows the chosen pair, since the choice is set together with it.
    """
    return listener(None, pair, None, js=_UNTIL_SETTLED, queue=False, **QUIET)


def open_pair(pack_id: str | None, is_running: IsRunning) -> OpenedPair:
    """Open a pair, whether its analysis has finished or not. Raises: PlanError."""
    if not pack_id:
        raise PlanError("No pair is chosen. Select one under Pair.")
    pack = explored_pack(pack_id, is_running)
    return OpenedPair(content_of(pack_id, pack), start_choice(pack))


def grown_since(asked: object, is_running: IsRunning) -> dict[str, Any]:
    """Answer the map of an unfinished pair, which sends `[pack id, number of known matrices]`."""
    pack_id, known = asked if isinstance(asked, list) and len(asked) == 2 else ("", 0)
    try:
        found = records_since(str(pack_id), known if isinstance(known, int) else 0, is_running)
    except PlanError:
        return {"gone": "This pair no longer exists: its analysis was discarded."}
    if found["growing"] is None:
        found["presets"] = map_content(pack_id)["presets"]
    return found


def start_choice(pack: Mapping[str, Any]) -> PlanChoice:
    """Return the initial plan: the default, or one that selects a third if that selects none."""
    values = sorted(record["similarity"]["first"] for record in pack["records"])
    if values[-1] >= PlanChoice().similarity_threshold:
        return PlanChoice()
    return PlanChoice(similarity_threshold=math.floor(1000 * values[2 * len(values) // 3]) / 1000)


def map_content(pack_id: str, choice: PlanChoice | None = None) -> dict[str, Any]:
    """Return what the layer map draws of a finished pair. Raises: PlanError."""
    return content_of(pack_id, load_pack(pack_id), choice)


def content_of(
    pack_id: str, pack: Mapping[str, Any], choice: PlanChoice | None = None
) -> dict[str, Any]:
    """Return what the layer map draws: a pack, the initial plan and the presets."""
    start = start_choice(pack)
    presets = map_presets() if start == PlanChoice() else [_third(start), *map_presets()]
    return {
        "id": pack_id,
        "home": space_page(),
        "pack": pack,
        "plan": (choice or start).to_browser(),
        "presets": presets,
        "knockout": read_knockout(pack_id),
    }


def map_presets() -> list[dict[str, Any]]:
    """Return the presets of the catalogue that the map can draw, in the browser's format."""
    known = [preset for preset in load_catalogue().presets if preset.method == EXPLORED_METHOD]
    return [
        {"label": preset.name, "source": preset.source, "plan": choice.to_browser()}
        for preset in known
        if (choice := PlanChoice.from_arguments(preset.arguments))
    ]


def report_file(asked: object) -> str:
    """Return the HTML report for `[pack id, plan, link]`, as sent by the browser.

    The link is the query of the permalink; the report opens in the state that it describes.
    Raises: PlanError.
    """
    if not isinstance(asked, list) or len(asked) != 3 or not isinstance(asked[2], str):
        raise PlanError("A report needs a pair, a plan and a link; reload the page and try again.")
    pack_id = str(asked[0])
    choice = read_commit(asked[1], load_pack(pack_id))
    return report({**map_content(pack_id, choice), "home": "", "link": asked[2][:LONGEST_LINK]})


def space_page() -> str:
    """Return the page of the Space that serves this app; a frame on the hub hides our address."""
    space = space_id()
    return f"https://huggingface.co/spaces/{space}" if space else ""


def _third(choice: PlanChoice) -> dict[str, Any]:
    return {
        "label": "Most similar third",
        "source": "Ours: the third of the matrices with the highest similarity, because none of "
        "this pair reaches the default threshold 0.4.",
        "plan": choice.to_browser(),
    }
