"""State what the selected columns need before they can answer, and require consent if it is large.

In: the selected columns. Out: a line with memory and time of every column that has tensors of its
own: other methods, ablations and finished merges. Columns of IP-Merging share the model's weights
and need no line.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipmerge_core.errors import IPMergeError, RunError
from ipmerge_core.runtime.host import home_folder
from ipmerge_core.runtime.zero_gpu import is_zero_gpu
from ipmerge_core.ui.backend import SMALL_MODEL, Backend
from ipmerge_core.ui.chat.answers import Answers, gpu_seconds
from ipmerge_core.ui.chat.column_choice import Held
from ipmerge_core.ui.chat.columns import BASE, LETTERS, merge_of
from ipmerge_core.ui.chat.inputs import Inputs, inputs_of
from ipmerge_core.ui.chat.layout import Parts
from ipmerge_core.ui.chat.question import Question
from ipmerge_core.ui.chat.settings import read_settings
from ipmerge_core.ui.chosen_merge import ChosenMerge, name_of
from ipmerge_core.ui.errors import QUIET
from ipmerge_core.ui.finetuned_models import PREFIX as FINETUNED
from ipmerge_core.ui.finetuned_models import find_finetuned
from ipmerge_core.ui.finished_merges import find_merge
from ipmerge_core.ui.format import format_estimate, format_size
from ipmerge_core.ui.plan_choice import analysis_of
from ipmerge_core.ui.runs import Listener, Updates
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from gradio.events import Dependency

    from ipmerge_core.inference.sampling import GenerationSettings
    from ipmerge_core.planning.plan import MergePlan


class ColumnCost(NamedTuple):
    """What a column needs before its first answer."""

    column: str  # its character
    label: str
    nbytes: int  # of its own tensors in memory
    seconds: float  # 0 if the merge is finished
    device: str

    def __str__(self) -> str:
        """Return the cost as one sentence."""
        time = f", {format_estimate(self.seconds, self.device)}" if self.seconds else ""
        return (
            f"Column {self.column} ({self.label}) needs {format_size(self.nbytes)} of memory of "
            f"its own{time}."
        )


def gpu_line(held: Held, generation: GenerationSettings) -> str:
    """Return how much GPU time a question may take on a ZeroGPU Space; elsewhere ""."""
    if not is_zero_gpu():
        return ""
    asked = Question(held.chosen, "", (), generation, held.columns)
    seconds = gpu_seconds(Answers, asked, range(len(held.columns)))
    return f"A question holds the GPU for at most {seconds} seconds of your daily quota."


def column_costs(backend: Backend, held: Held) -> list[ColumnCost]:
    """Return the costs of the columns that have tensors of their own.

    A column whose plan cannot be made has none; asking it states why.
    """
    found: dict[str, ColumnCost] = {}
    for letter, who in zip(LETTERS, held.columns, strict=False):
        with contextlib.suppress(IPMergeError, OSError):
            if who.startswith(FINETUNED):
                found.setdefault(who, _finetuned_cost(backend, held, letter, who))
                continue
            chosen = _merge(backend, held, who)
            cost = _cost(backend, letter, chosen) if chosen else None
            if cost is not None:
                found.setdefault(who, cost)
    return list(found.values())


def _merge(backend: Backend, held: Held, who: str) -> ChosenMerge | None:
    if who == BASE:
        return None
    chosen = merge_of(held.chosen, who)
    if chosen is not None:
        return chosen
    return held.chosen.with_merge(find_merge(backend, held.chosen.pack_id, who, held.keys))


def _cost(backend: Backend, letter: str, chosen: ChosenMerge) -> ColumnCost | None:
    from ipmerge_core.adapters.columns import why_not_factors
    from ipmerge_core.merging.in_memory import in_memory_cost

    plan = chosen.make_plan()
    if chosen.merge is None and not why_not_factors(plan):
        return None
    device = backend.device_for()
    seconds = 0.0 if chosen.merge else _seconds(plan, device)
    return ColumnCost(letter, name_of(chosen), in_memory_cost(plan).nbytes, seconds, device)


def _finetuned_cost(backend: Backend, held: Held, letter: str, who: str) -> ColumnCost:
    """Return the cost of a fine-tuned model: all tensors of its language model."""
    model = find_finetuned(backend, held.chosen.pack_id, who, held.keys)
    totals = analysis_of(held.chosen.pack_id).totals
    nbytes = totals.llm_parameters * totals.decoder_itemsize
    return ColumnCost(letter, model.label, nbytes, 0.0, backend.device_for())


def _seconds(plan: MergePlan, device: str) -> float:
    from ipmerge_core.merging.estimates import estimate_pair
    from ipmerge_core.planning.plan import reopen

    return estimate_pair(plan, reopen(plan), home_folder(), device).seconds


def is_large(costs: list[ColumnCost]) -> bool:
    """Return whether columns need so much memory that a visitor must agree."""
    return sum(cost.nbytes for cost in costs) > SMALL_MODEL


def check_consent(costs: list[ColumnCost], *, agreed: bool) -> None:
    """Check that a visitor has agreed to a large cost. Raises: RunError."""
    if is_large(costs) and not agreed:
        raise RunError(
            f"{' '.join(map(str, costs))} Select 'Load these columns' to agree, or select other "
            f"models."
        )


def costs_html(costs: list[ColumnCost], gpu: str = "") -> str:
    """Format the costs as one line; empty if there are none."""
    words = " ".join([*map(str, costs), *([gpu] if gpu else [])])
    return f"<p>{as_html(words)}</p>" if words else ""


def wire_costs(backend: Backend, parts: Parts, changed: list[Dependency]) -> None:
    """Show the costs whenever the columns may have changed; consent holds for what it shows."""

    def show(shown: str, *values: Any) -> Updates:  # noqa: ANN401
        now = Inputs.read(values)
        costs = column_costs(backend, now.held)
        generation = read_settings(*now.settings).generation
        line, large = costs_html(costs, gpu_line(now.held, generation)), is_large(costs)
        same = line == shown
        agree = gr.update(visible=large) if same else gr.update(visible=large, value=False)
        return {parts.cost: line, parts.agree: agree}

    fields = parts.settings
    asked = [parts.cost, *inputs_of(parts)]
    listeners: list[Listener] = [event.then for event in changed]
    listeners += [fields.longest.change, fields.thinking.change]
    for listen in listeners:
        listen(show, asked, [parts.cost, parts.agree], queue=False, **QUIET)
