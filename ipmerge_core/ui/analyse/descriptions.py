"""Describe known pairs, the cost of an analysis, and an analysed pair, as labels and HTML.

In: entries of the catalogue, a check, a pack. Out: labels and small pieces of HTML in which every
name is escaped. Pure functions that do not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipmerge_core.models.catalogue import KnownPair, find_model
from ipmerge_core.ui.analyse.models_form import Checked
from ipmerge_core.ui.errors import public_text
from ipmerge_core.ui.format import format_estimate, format_size
from ipmerge_core.ui.pairs import describe_depth, packs_folder
from ipmerge_core.ui.safe_text import as_html

DATE = 10  # characters of an ISO timestamp that are the date


def known_label(pair: KnownPair) -> str:
    """Return a label for a pair of the catalogue that no other pair has."""
    experts = " + ".join(_short(expert) for expert in pair.math)
    base = _short(pair.base) + (f", own base {_short(pair.base_mllm)}" if pair.base_mllm else "")
    return f"{_short(pair.mllm)} + {experts} · base {base}"


def known_html(pair: KnownPair) -> str:
    """Describe a pair of the catalogue: skill, source, notes, and the licence of every model."""
    rows = {"Skill": as_html(pair.skill), "Source": as_html(pair.source)}
    if pair.note:
        rows["Note"] = as_html(pair.note)
    own = [pair.base_mllm] if pair.base_mllm else []
    licences = [_licence(name) for name in (pair.mllm, *pair.math, pair.base, *own)]
    return _facts({**rows, "Licences": "<br>".join(licences)})


def _licence(name: str) -> str:
    model = find_model(name)
    if model is None or model.licence is None:
        words = "licence unknown; see the model page"
    else:
        words = f"{model.licence} ({model.sources['licence']})"
    note = f"; {model.note}" if model is not None and model.note else ""
    return f"<code>{as_html(name)}</code> {as_html(words + note)}"


def needs_html(checked: Checked, *, hosted: bool) -> str:
    """Describe what an analysis reads, how much memory and time it takes, and what it saves."""
    need, request = checked.need, checked.asked
    if need is None or request is None:
        return ""
    reads = f"{format_size(need.nbytes_read)} of weights (decoder matrices only)"
    if need.nbytes_fetched:
        reads += (
            f"; {format_size(need.nbytes_fetched)} of it over the network with range requests, "
            f"not cached on disk"
        )
    depth = describe_depth(request.options).strip(" ()") or "exact"
    experts = f" for each of {len(request.math)} math models" if len(request.math) > 1 else ""
    where = "" if hosted else f" in <code>{as_html(str(packs_folder()))}</code>"
    return _facts(
        {
            "Compares": f"{need.n_matrices} matrices{experts}, {depth}",
            "Reads": reads,
            "Memory": f"about {format_size(need.nbytes_memory)} for the largest matrix "
            f"({format_size(need.nbytes_memory_free)} free)",
            "Time": f"{format_estimate(need.seconds, need.device)}, estimated from the sizes",
            "Saves": f"a pack of about {format_size(need.nbytes_written)}{where}: statistics, no "
            f"weights. All users of this app can see the pair.",
        }
    )


def pair_html(pack: Mapping[str, Any]) -> str:
    """Describe when and how a pair was analysed, with its models and parameters in a fold-out."""
    sources, growing = pack["sources"], pack.get("growing")
    day, engine = as_html(str(pack["created"])[:DATE]), as_html(str(pack["engine"]))
    verb = "Analysis started" if growing else "Analysed"
    matrices = len({record["name"] for record in pack["records"]})
    own = sources.get("base_mllm")
    rows = {
        "Vision-language model": _source(sources["mllm"]),
        "Math models": "<br>".join(_source(expert) for expert in sources["math"]),
        "Base": _source(sources["base"]),
        **({"Base of the vision-language model": _source(own)} if own else {}),
        "Matrices": f"{matrices} of {growing['total']} so far" if growing else str(matrices),
        "Depth": as_html(describe_depth(pack["parameters"]).strip(" ()") or "exact"),
    }
    return (
        f'<details class="pair-details"><summary>{verb} {day} with IPMerge {engine}</summary>'
        f"{_facts(rows)}</details>"
    )


def _source(source: Mapping[str, Any]) -> str:
    name = as_html(public_text(str(source["id"])))
    if source.get("revision"):
        return f"<code>{name}</code> at commit <code>{as_html(str(source['revision']))}</code>"
    return f"<code>{name}</code>, weights <code>{as_html(str(source['fingerprint'])[:16])}</code>"


def _facts(rows: Mapping[str, str]) -> str:
    cells = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows.items())
    return f'<dl class="facts">{cells}</dl>'


def _short(name: str) -> str:
    return Path(name).name
