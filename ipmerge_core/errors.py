"""Exceptions raised by the package, in one hierarchy.

    IPMergeError                 base class; the CLI exits with 2, the app shows it as a message
    ├── CheckpointError          a model folder or file cannot be used
    │   ├── MissingTensorError   a required tensor or file is missing
    │   └── CorruptShardError    a safetensors file is damaged or inconsistent with its header
    ├── PairingError             the models cannot be merged with each other
    │   └── ShapeError           two tensors that must have equal shapes do not
    ├── PlanError                a plan or a parameter is invalid
    │   └── UnknownMethodError   no merge method has that name
    ├── RunError                 a run could not continue
    │   ├── RunCancelled         the user cancelled it; finished work is kept
    │   └── FolderInUseError     another run is writing to the same folder
    └── ModelLoadError           transformers could not load or run a model

A message is one or two sentences: what happened, with the values; what was expected; what to do.
This module imports no other module of the package.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

_LONGEST_MESSAGE = 1600  # characters
# Controls, line ends, surrogates, and characters that reorder a line.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]"
)


class IPMergeError(Exception):
    r"""Base class of all errors caused by the input rather than by a bug.

    Its message is one line of bounded length, whatever names and values it contains.

    >>> str(IPMergeError("No model 'a\nb\u202e'."))
    "No model 'a\\nb\\u202e'."
    """

    def __str__(self) -> str:
        """Return the message; control characters are escaped, a long middle is left out."""
        text = super().__str__()
        if len(text) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            text = f"{text[:half]} ... {text[-half:]}"
        return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class CheckpointError(IPMergeError):
    """A model folder or one of its files cannot be used."""


class MissingTensorError(CheckpointError):
    """A required tensor or file is missing."""


class CorruptShardError(CheckpointError):
    """A safetensors file is damaged, truncated, or inconsistent with its header."""


class PairingError(IPMergeError):
    """The given models cannot be merged with each other."""


class ShapeError(PairingError):
    """Two matrices that must have equal shapes do not."""


class PlanError(IPMergeError):
    """A plan, a parameter or its value is invalid."""


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
    """A run could not continue; finished work is kept for a resume."""


class RunCancelled(RunError):  # noqa: N818 (a state the user asked for, not a fault)
    """The user cancelled the run; finished work is kept for a resume."""


class FolderInUseError(RunError):
    """Another run is writing to the same folder: `job` is its id.

    `same_work` is True if that run produces the requested result.
    """

    def __init__(self, folder: str, job: str, *, same_work: bool) -> None:
        super().__init__(
            f"Another run is writing to '{folder}'. Wait for it, cancel it, or choose "
            f"another output folder."
        )
        self.job, self.same_work = job, same_work


class ModelLoadError(IPMergeError):
    """Transformers could not load or run a model."""


@contextmanager
def explained(explain: Callable[[Exception], IPMergeError]) -> Iterator[None]:
    """Convert exceptions raised inside to errors of this package; its own errors pass unchanged.

    For calls in which another library reads untrusted files, such as a tokenizer or a template:
    these can raise any exception, and none of them indicates a bug in this package.

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
    r"""Return the type and the first line of an error of another library, shortened.

    >>> first_line(ValueError("no such token\nin line 3"))
    'ValueError: no such token'
    """
    text = str(error).strip()[:200].split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
