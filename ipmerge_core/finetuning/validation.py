"""Check the values of settings by type and range, whichever way they came: code, form or JSON.

In: a name and a value of any type. Out: nothing, or a `PlanError` with the value and what was
expected. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ipmerge_core.errors import PlanError


def check_choice(what: str, value: object, available: Sequence[str]) -> None:
    """Check a name. Raises: PlanError for one that is not available."""
    if value not in available:
        raise PlanError(f"Unknown {what} '{value!s:.80}'. Available: {', '.join(available)}.")


def check_number(what: str, value: object, least: float, most: float) -> None:
    """Check a number and its range. Raises: PlanError, also for NaN and infinity."""
    _check_range(what, value, "a number", is_one=isinstance(value, int | float), ends=(least, most))


def check_integer(what: str, value: object, least: int, most: int) -> None:
    """Check an integer and its range. Raises: PlanError."""
    _check_range(what, value, "an integer", is_one=isinstance(value, int), ends=(least, most))


def check_flag(what: str, value: object) -> None:
    """Check a truth value. Raises: PlanError for anything else, such as a text."""
    if not isinstance(value, bool):
        raise PlanError(f"The setting '{what}' is {value!r:.80}; expected True or False.")


def check_texts(what: str, value: object) -> None:
    """Check a tuple of texts. Raises: PlanError, also for a single text."""
    if not (isinstance(value, tuple) and all(isinstance(each, str) for each in value)):
        raise PlanError(f"The {what} are {value!r:.80}; expected a tuple of texts.")


def _check_range(
    what: str, value: object, kind: str, *, is_one: bool, ends: tuple[float, float]
) -> None:
    least, most = ends
    is_valid = is_one and not isinstance(value, bool) and least <= value <= most  # type: ignore[operator]
    if not is_valid:
        raise PlanError(
            f"The {what} is {value!s:.80}; expected {kind} from {_shown(least)} to {_shown(most)}."
        )


def _shown(end: float) -> str:
    return str(end) if isinstance(end, int) else f"{end:g}"
