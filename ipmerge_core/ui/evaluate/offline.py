"""Write the result of an evaluation as one HTML file, without the app.

In: a comparison of models and the file of its pack. Out: the page that the Evaluate tab downloads,
with the items that the merge fixes or breaks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ipmerge_core.ui.evaluate.component import report
from ipmerge_core.ui.evaluate.content import sweep_content
from ipmerge_core.ui.evaluate.results import Found, listed_items
from ipmerge_core.ui.pairs import read_pack_file

if TYPE_CHECKING:
    from ipmerge_core.evaluation.sweeps import Sweep


def page_of(found: Sweep, pack: Path) -> str:
    """Return the page of a comparison; the items of its second model are listed.

    Raises: PlanError if the pack cannot be read.
    """
    content = sweep_content("", found.name, found, read_pack_file(pack))
    items = listed_items(Found("", found.name, found, None), 1)
    return report({**content, **items})
