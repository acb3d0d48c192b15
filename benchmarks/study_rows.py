"""The rows of the variants study: every method and variant, each with the same number of gains.

In: nothing. Out: `Row`s, which name a method, its arguments, and the gains that are tried. A row
that a case cannot take, such as two experts in a method for one, is refused by `make_plan` and
reported as not applicable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ipmerge_core.methods import METHODS

BASELINE = "task arithmetic"
TRIES = 5
ADDED = (0.3, 0.5, 0.7, 1.0, 1.5)
FILTERED = (0.5, 0.7, 1.0, 1.5, 2.0)  # updates that are smaller than the expert's change
LAMBDAS = (1.0, 2.0, 4.0, 8.0, 16.0)
BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the way to the expert
KEPT = tuple(round(1 - share, 1) for share in SHARES)  # weights that stay on the MLLM
_EVERY = {"similarity_threshold": 0.0}
_OWN_ROWS = ("ip_merging", "task_arithmetic")
_CHOICES: Mapping[str, Mapping[str, Any]] = {
    "wudi": {"closed_form": True},
    "layer_swap": {"last_kept_layer": 1},
}


class Row(NamedTuple):
    """One line of the study: `gain` is the parameter or option that takes each of `gains`."""

    label: str
    method: str
    arguments: Mapping[str, Any]
    gain: str
    gains: tuple[float, ...]

    def at(self, gain: float) -> dict[str, Any]:
        """Return the arguments of `make_plan` at a gain.

        >>> rows()[0].at(0.5)
        {'method': 'task_arithmetic', 'math_weight': 0.5}
        """
        value: Any = (gain,) if self.gain == "layer_gains" else gain
        return {"method": self.method, **self.arguments, self.gain: value}


def rows() -> list[Row]:
    """Return every row."""
    found = [*_additions(), *_projections(), *_others()]
    assert all(len(row.gains) == TRIES for row in found), "every row gets the same number of tries"
    return found


def _additions() -> Iterator[Row]:
    def added(label: str, **arguments: Any) -> Row:  # noqa: ANN401
        return Row(label, "task_arithmetic", arguments, "math_weight", ADDED)

    yield added(BASELINE)
    for profile in ("upper_half", "middle_half", "lower_half"):
        yield added(f"{BASELINE}, {profile.replace('_', ' ')}", layer_profile=profile)
    yield added(f"{BASELINE}, AIM 0.2", input_share=0.2)
    yield added(f"{BASELINE}, norms too", norms="merge")


def _projections() -> Iterator[Row]:
    def projected(
        label: str,
        gains: tuple[float, ...] = FILTERED,
        gain: str = "lambda_",
        **arguments: Any,  # noqa: ANN401
    ) -> Row:
        return Row(label, "ip_merging", {**_EVERY, **arguments}, gain, gains)

    yield projected("IP-Merging", LAMBDAS)
    yield projected("IP-Merging, selected at 0.1", LAMBDAS, similarity_threshold=0.1)
    yield projected("gamma max", LAMBDAS, gamma_norm="max")
    yield projected("top 16 directions", projector="top_k", top_k=16)
    yield projected("rescale only", ablation="rescale_only")
    for energy in (0.5, 0.8, 0.95):
        yield projected(f"complement {energy:g}", projector="complement", energy=energy)
    yield projected("protect", projector="protect")
    yield projected("off inputs", projector="off_inputs")
    yield projected("input filter", projector="input_filter")
    for kept in (0.5, 0.9):
        label = f"truncated {kept:g}"
        yield projected(label, ADDED, ablation="select_only", math_energy=kept)
    yield projected(
        "complement 0.8, truncated 0.9", projector="complement", energy=0.8, math_energy=0.9
    )
    yield projected("budget of IP-Merging", BUDGETS, "budget")
    yield projected("budget of task arithmetic", BUDGETS, "budget", ablation="select_only")
    yield projected("budget of protect", BUDGETS, "budget", projector="protect")


def _others() -> Iterator[Row]:
    for name, method in METHODS.items():
        if name not in _OWN_ROWS:
            yield _row(method.label, name, _CHOICES.get(name, {}))
    yield _row("RAM+", "ram", {"boost": 0.1})
    for name in ("swudi", "aswudi"):
        yield _row(name.upper(), "wudi", {"closed_form": True, "spectral_filter": name})
    yield _row("TIES, MLLM whole", "ties", {"density": 0.1, "mllm_density": 1.0})
    yield _row("STAR, sum", "star", {"combine": "sum"})


def _row(label: str, name: str, choice: Mapping[str, Any]) -> Row:
    """Vary the expert's weight, the MLLM's, the way between them, or else the whole change."""
    weights = {p.name: p.default for p in METHODS[name].parameters}
    if weights.get("math_weight") is not None:
        return Row(label, name, choice, "math_weight", ADDED)
    if weights.get("alpha") is not None:
        return Row(label, name, choice, "alpha", KEPT)
    if "t" in weights:
        return Row(label, name, choice, "t", SHARES)
    return Row(label, name, choice, "layer_gains", FILTERED)
