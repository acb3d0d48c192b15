"""Every error a user can cause or meet, as one small tree.

    IPMergeError                 anything below; the CLI exits with 2, the app shows it as a message
    ├── CheckpointError          a model folder or file cannot be used
    │   ├── MissingTensorError   a tensor or file that must be there is not
    │   └── CorruptShardError    a safetensors file is damaged or lies about itself
    ├── PairingError             the models do not belong together
    │   └── ShapeError           two tensors that must match have different shapes
    ├── PlanError                a plan or a parameter makes no sense
    │   └── UnknownMethodError   no merge method has that name
    ├── RunError                 a run could not go on
    │   ├── RunCancelled         the user stopped it; finished work is kept
    │   └── FolderInUseError     another run is writing to the same folder
    └── ModelLoadError           transformers could not load or run a model

A message is one or two sentences: what happened, with the values; what was expected; what to do.
Imports nobody.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class IPMergeError(Exception):
    """Base of every error that is the input's fault and not the program's."""


class CheckpointError(IPMergeError):
    """A model folder or one of its files cannot be used."""


class MissingTensorError(CheckpointError):
    """A tensor or file that must be there is not."""


class CorruptShardError(CheckpointError):
    """A safetensors file is damaged, truncated, or contradicts its own header."""


class PairingError(IPMergeError):
    """The given models cannot be merged with each other."""


class ShapeError(PairingError):
    """Two matrices that must have equal shapes do not."""


class PlanError(IPMergeError):
    """A plan, a parameter or its value makes no sense."""


class UnknownMethodError(PlanError):
    """No merge method has the given name.

    >>> str(UnknownMethodError("tis", ["linear", "ties"]))
    "Unknown merge method 'tis'. Did you mean 'ties'? Available: linear, ties."
    """

    def __init__(self, name: str, available: Iterable[str]) -> None:
        names, name = sorted(available), name[:80]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        super().__init__(f"Unknown merge method '{name}'.{hint} Available: {', '.join(names)}.")


class RunError(IPMergeError):
    """A run could not go on; what it finished is kept for a resume."""


class RunCancelled(RunError):  # noqa: N818 (a state the user asked for, not a fault)
    """The user stopped the run; what it finished is kept for a resume."""


class FolderInUseError(RunError):
    """Another run is writing to the same folder: `job` is its id.

    `same_work` says whether that run makes the very thing that was asked for.
    """

    def __init__(self, folder: str, job: str, *, same_work: bool) -> None:
        super().__init__(
            f"Another run is writing to '{folder}' right now. Wait for it, cancel it, or choose "
            f"another output folder."
        )
        self.job, self.same_work = job, same_work


class ModelLoadError(IPMergeError):
    """Transformers could not load or run a model."""


@contextmanager
def explained(explain: Callable[[Exception], IPMergeError]) -> Iterator[None]:
    """Turn whatever goes wrong inside into an error of this package; its own errors pass.

    For calls that let another library read a stranger's files, such as a tokenizer or a chat
    template: what these raise is no closed list, and none of it is a fault of this program.

    >>> with explained(lambda error: RunError(f"No answer ({error}).")):
    ...     raise ZeroDivisionError("by zero")
    Traceback (most recent call last):
    ipmerge_core.errors.RunError: No answer (by zero).
    """
    try:
        yield
    except IPMergeError:
        raise
    except Exception as error:
        raise explain(error) from error


def first_line(error: BaseException) -> str:
    r"""Return what another library's error says first, short enough for a sentence.

    >>> first_line(ValueError("no such token\nin line 3"))
    'ValueError: no such token'
    """
    said = str(error).strip()[:200].split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
