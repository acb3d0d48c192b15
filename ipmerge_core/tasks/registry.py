"""Find evaluation tasks by name.

    demo, demo:math, demo:perception, demo:sides ...

In: names as users write them. Out: `Task`s; for a task that measures mathematics, its perception
guard as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from ipmerge_core.errors import RunError
from ipmerge_core.tasks.demo_items import demo_task
from ipmerge_core.tasks.items import Task

MAKERS: dict[str, Callable[[str], Task]] = {"demo": demo_task}


def find_task(name: str) -> Task:
    """Return the task of a name. Raises: RunError for an unknown one.

    >>> find_task("demo:math").guard
    'demo:perception'
    """
    first, _, part = name.strip().partition(":")
    if first not in MAKERS:
        close = difflib.get_close_matches(first, MAKERS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise RunError(f"Unknown task '{name[:80]}'.{hint} Available: {', '.join(MAKERS)}.")
    return MAKERS[first](part)


def find_tasks(names: Sequence[str], *, guards: bool = True) -> list[Task]:
    """Return tasks by name, each once; a math task is followed by its perception guard.

    Args:
        names: names of tasks, each of which may be a comma-separated list.
        guards: whether guards that are not among the names are added.

    Raises: RunError for an unknown name, or no name.
    """
    flat = [part for name in names for part in name.split(",") if part.strip()]
    if not flat:
        raise RunError(f"No task is given. Available: {', '.join(MAKERS)}.")
    found = {task.name: task for task in map(find_task, flat)}
    if guards:
        for task in [task for task in found.values() if task.group == "math"]:
            if task.guard and not _is_guarded(task, list(found)):
                found[task.guard] = find_task(task.guard)
    return list(found.values())


def missing_guards(tasks: Sequence[Task]) -> list[str]:
    """Return the names of the guards that the math tasks among these lack."""
    names = [task.name for task in tasks]
    math = [task for task in tasks if task.group == "math" and task.guard]
    return sorted({task.guard for task in math if not _is_guarded(task, names)})


def _is_guarded(task: Task, names: Sequence[str]) -> bool:
    """Whether names include the guard of a task, or the whole task that it is a part of."""
    return task.guard in names or task.guard.partition(":")[0] in names
