"""Find evaluation tasks by name.

    demo, demo:math, demo:perception, demo:sides     problems of this project
    mathvista, mathvista:math, mathvista:general     MathVista testmini
    mathverse, mathverse:vision_only                 MathVerse testmini
    mmmu                                             MMMU validation
    jsonl:FILE, datasets:NAME:CONFIG:SPLIT           own data
    mathvista:math@FOLDER                            a copy of the data

In: names as users write them. Out: `Task`s; for a task that measures mathematics, its perception
guard as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from ipmerge_core.errors import RunError
from ipmerge_core.tasks.demo_items import demo_task
from ipmerge_core.tasks.items import Task
from ipmerge_core.tasks.mathverse import mathverse_task
from ipmerge_core.tasks.mathvista import mathvista_task
from ipmerge_core.tasks.mmmu import mmmu_task
from ipmerge_core.tasks.own_data import DATASETS, JSONL, dataset_task, jsonl_task

# By name: tasks with parts whose data can be elsewhere, and tasks whose name has the data.
BENCHMARKS: dict[str, Callable[[str, str], Task]] = {
    "mathvista": mathvista_task,
    "mathverse": mathverse_task,
    "mmmu": mmmu_task,
}
OWN_DATA: dict[str, Callable[[str], Task]] = {JSONL: jsonl_task, DATASETS: dataset_task}
# Benchmarks that other harnesses evaluate, by the start of their names, with lmms-eval's names.
ELSEWHERE = {
    "cmmmu": "cmmmu_val", "jmmmu": "jmmmu", "mia": "mia_bench", "wildvision": "wildvision",
    "mathvision": "mathvision_testmini", "mmstar": "mmstar",
}  # fmt: skip
NAMES = ("demo", *BENCHMARKS, *(f"{name}:..." for name in OWN_DATA))


def find_task(name: str) -> Task:
    """Return the task of a name. Raises: RunError for an unknown one.

    >>> find_task("demo:math").guard, find_task("mathvista:math").group
    ('demo:perception', 'math')
    """
    name = name.strip()
    first, _, rest = name.partition(":")
    if first in OWN_DATA:
        if not rest:
            raise RunError(f"The task '{first}' names no data. Expected {first}:... ")
        return OWN_DATA[first](rest)
    whole, _, source = name.partition("@")
    first, _, part = whole.partition(":")
    if first == "demo" and not source:
        return demo_task(part)
    if first in BENCHMARKS:
        return BENCHMARKS[first](part, source)
    plain = first.lower().replace("-", "").replace("_", "")
    if other := next((task for start, task in ELSEWHERE.items() if plain.startswith(start)), None):
        raise RunError(
            f"'{name[:80]}' is evaluated by another harness, not by the rules of this package: "
            f"--harness lmms-eval --harness-python OTHER/bin/python --tasks {other}."
        )
    close = difflib.get_close_matches(first, NAMES, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise RunError(f"Unknown task '{name[:80]}'.{hint} Available: {', '.join(NAMES)}.")


def find_tasks(names: Sequence[str], *, guards: bool = True) -> list[Task]:
    """Return tasks by name, each once; a math task is followed by its perception guard.

    Args:
        names: names of tasks, each of which may be a comma-separated list; own data is one name.
        guards: whether guards that are not among the names are added.

    Raises: RunError for an unknown name, or no name.
    """
    flat = [
        part
        for name in names
        for part in ([name] if name.partition(":")[0] in OWN_DATA else name.split(","))
        if part.strip()
    ]
    if not flat:
        raise RunError(f"No task is given. Available: {', '.join(NAMES)}.")
    found = {task.name: task for task in map(find_task, flat)}
    if guards:
        for guard in missing_guards(list(found.values())):
            found[guard] = find_task(guard)
    return list(found.values())


def missing_guards(tasks: Sequence[Task]) -> list[str]:
    """Return the names of the guards that the math tasks among these lack."""
    names = [task.name for task in tasks]
    math = [task for task in tasks if task.group == "math" and task.guard]
    return sorted({task.guard for task in math if not _is_guarded(task, names)})


def _is_guarded(task: Task, names: Sequence[str]) -> bool:
    """Whether names include the guard of a task, or the whole task that it is a part of."""
    part, at, source = task.guard.partition("@")
    whole = part.partition(":")[0] + at + source
    return task.guard in names or whole in names
