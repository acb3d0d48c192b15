"""Query the host environment: operating system, home folder, and whether it is a Space."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_data_path

from ipmerge_core.errors import RunError
from ipmerge_core.runtime.paths import expand_path, output_folder, resolve_path


def check_platform() -> None:
    """Check that the operating system is supported.

    Raises: RunError on Windows, which has neither `fcntl` nor `pwrite`.
    """
    if sys.platform == "win32":
        raise RunError(
            "IPMerge requires Linux or macOS: it uses file locks and positioned writes that are "
            "not available on Windows. On Windows, use WSL (Windows Subsystem for Linux)."
        )


def space_id() -> str:
    """Return the id of the Space, `owner/name`; empty elsewhere."""
    return os.environ.get("SPACE_ID", "")


def space_host() -> str:
    """Return the host name of the Space's page; empty elsewhere."""
    return os.environ.get("SPACE_HOST", "")


def is_hosted() -> bool:
    """Return whether the app runs on a public Space, for visitors who are not its owner."""
    return bool(space_id())


def home_folder() -> Path:
    """Where runs and models made in the app go: IPMERGE_HOME, else the user's data folder.

    It used to be a folder in the user's cache, which some systems empty. Where that folder exists,
    it stays in use, so that its runs and models are still found.

    Raises: RunError if this user has no home folder, as in some containers.
    """
    if chosen := os.environ.get("IPMERGE_HOME"):
        return resolve_path(chosen)
    try:
        cache = expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").absolute()
        earlier = cache / "ipmerge"
        data = user_data_path("ipmerge", appauthor=False)
        return earlier if earlier.is_dir() else expand_path(data)
    except RunError as error:
        raise _without_home(error) from error


def check_home(folder: Path | None = None) -> Path:
    """Return a folder in the home folder, by default itself, that can be created and written to.

    Raises: RunError that names IPMERGE_HOME.
    """
    wanted = folder or home_folder()
    try:
        return output_folder(wanted)
    except RunError as error:
        raise _without_home(error) from error


def _without_home(error: RunError) -> RunError:
    return RunError(
        f"There is no folder for runs and models. {error} Set the environment variable "
        f"IPMERGE_HOME to a folder that this user can write to."
    )


def warms_up() -> bool:
    """Return whether the app gets ready for the first run and question in the background.

    IPMERGE_WARM_UP=off saves that memory; the first run and question then take seconds longer.

    Raises: RunError for a value other than on and off.
    """
    value = os.environ.get("IPMERGE_WARM_UP", "").strip().lower() or "on"
    if value not in ("on", "off"):
        raise RunError(f"IPMERGE_WARM_UP is '{value[:40]}'; expected on or off.")
    return value == "on"


class Limits(NamedTuple):
    """Limits of the runs of an app and of what it keeps; None is no limit."""

    runs: float | None = 2  # at the same time
    runs_per_visitor: float | None = None
    run_minutes: float | None = None  # of one run, from each start or resume
    keep_hours: float | None = None  # for what visitors have made
    disk_gb: float | None = None  # for the same


ON_A_SPACE = Limits(runs_per_visitor=1, run_minutes=60, keep_hours=24, disk_gb=20)


def limits() -> Limits:
    """Return the limits of this host: those of a Space or none, changed by the environment.

    IPMERGE_RUNS, IPMERGE_RUNS_PER_VISITOR, IPMERGE_RUN_MINUTES, IPMERGE_KEEP_HOURS and
    IPMERGE_DISK_GB are positive numbers, or "none" for no limit.

    Raises: RunError for another value.
    """
    default = ON_A_SPACE if is_hosted() else Limits()
    return Limits(*(_setting(f"IPMERGE_{k.upper()}", v) for k, v in default._asdict().items()))


def _setting(name: str, default: float | None) -> float | None:
    text = os.environ.get(name, "").strip().lower()
    if not text or text == "none":
        return None if text else default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise RunError(f"{name} is '{text[:40]}'; expected a positive number, or none.")
    return value
