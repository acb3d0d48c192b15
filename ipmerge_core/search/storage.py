"""Open the storage of a study: a SQLite file in its folder, or any database that Optuna supports.

In: a folder or a URL, and the definition of the study (models, method, space, data, seed). Out: an
Optuna study that holds this definition. One that holds another is refused, so that results of
different searches never mix. Passwords in a URL are never shown or stored.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import RunError, first_line

if TYPE_CHECKING:
    from filelock import BaseFileLock
    from optuna import Study
    from optuna.pruners import BasePruner

STUDY = "ipmerge"
FILE = "study.db"
MOST_WORKERS = 64
_DEFINITION = "definition"
_LOCK_SECONDS = 30.0  # to wait for another process that writes to a SQLite file


def open_study(
    folder: Path, definition: Mapping[str, Any], url: str = "", pruner: BasePruner | None = None
) -> Study:
    """Open or create the study of a search.

    Args:
        folder: an existing folder, which gets `study.db` unless there is a `url`.
        definition: JSON values that identify the search.
        url: a database for several machines, such as `postgresql://user@host/name`.
        pruner: decides which points are given up early; None keeps all.

    Raises: RunError if the storage cannot be used, or holds another search.
    """
    where = _without_password(url) if url else str(folder / FILE)
    from filelock import FileLock

    # Optuna fails where two workers create the tables at the same time.
    with quiet(), _explained(where), FileLock(folder / ".storage.lock"):
        study = _create(folder, url, pruner)
        stored = study.user_attrs.get(_DEFINITION)
        if stored is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(_DEFINITION, json.dumps(definition, sort_keys=True))
            stored = study.user_attrs.get(_DEFINITION)
    _refuse_other(where, stored, definition)
    return study


def _create(folder: Path, url: str, pruner: BasePruner | None) -> Study:
    import optuna

    storage = optuna.storages.RDBStorage(
        url or f"sqlite:///{folder / FILE}",
        engine_kwargs={} if url else {"connect_args": {"timeout": _LOCK_SECONDS}},
    )
    return optuna.create_study(
        storage=storage,
        study_name=STUDY,
        direction="maximize",
        load_if_exists=True,
        pruner=pruner or optuna.pruners.NopPruner(),
    )


def memory_study() -> Study:
    """Return a study that is kept in memory, for surrogates."""
    import optuna

    with quiet():
        return optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's notes about experimental classes and about every trial."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Convert errors of the database to a RunError."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
        reason = first_line(error.__cause__ or error)
        locked = "Another process holds it locked: wait for it, or end it. " if (
            "locked" in str(error)) else ""  # fmt: skip
        raise RunError(
            f"The storage '{where}' of the search cannot be used ({reason[:200]}). {locked}Give "
            f"another folder or URL."
        ) from error


def _refuse_other(where: str, stored: object, definition: Mapping[str, Any]) -> None:
    """Raise RunError if a stored definition is of another search."""
    wanted = json.loads(json.dumps(definition, sort_keys=True))
    try:
        found = json.loads(stored) if isinstance(stored, str) else None
    except ValueError:
        found = None
    if found == wanted:
        return
    if not isinstance(found, dict):
        what = "it was not made by this command"
    else:
        changed = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        what = f"its {', '.join(changed)} differ"
    raise RunError(
        f"The storage '{where}' holds another search: {what}. Give another output folder, or the "
        f"options of that search."
    )


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)[:200]
    except ArgumentError:
        return "the given URL"


def claim_worker(folder: Path, wanted: int | None = None) -> tuple[int, BaseFileLock]:
    """Reserve a worker number in a folder until the lock is released.

    A search that is run again gets the number that it had, if no other worker took it.

    Raises: RunError if the number is in use, or all are.
    """
    from filelock import FileLock, Timeout

    numbers = range(MOST_WORKERS) if wanted is None else [wanted]
    for number in numbers:
        lock = FileLock(folder / f".worker-{number}.lock")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return number, lock
    which = f"Worker {wanted} of" if wanted is not None else f"All {MOST_WORKERS} workers of"
    raise RunError(f"{which} the search in '{folder}' is running. Choose another --worker number.")
