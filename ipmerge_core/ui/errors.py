"""The one place where an error of the package becomes a message in the app.

In: a handler, plain or a generator. Out: the same handler, whose `IPMergeError`s arrive as
`gr.Error` with their own sentence. On a public Space the sentence loses the server's folders.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import gradio as gr

from ipmerge_core.errors import IPMergeError
from ipmerge_core.runtime.host import is_hosted
from ipmerge_core.runtime.jobs import home_folder
from ipmerge_core.ui.pairs import ROOT
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from ipmerge_core.models.pairing import Finding

P = ParamSpec("P")
R = TypeVar("R")

# Of a listener that shows no spinner and is no endpoint for programs.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def told(handler: Callable[P, R], *, in_page: bool = True) -> Callable[P, R]:
    """Let a handler's errors reach the visitor in words; the page reads messages as HTML."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stepping(*args: P.args, **kwargs: P.kwargs) -> Any:  # noqa: ANN401
            try:
                yield from handler(*args, **kwargs)
            except IPMergeError as error:
                raise _as_message(error, in_page) from error

        return stepping

    @functools.wraps(handler)
    def at_once(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except IPMergeError as error:
            raise _as_message(error, in_page) from error

    return at_once


def sentence_of(error: BaseException) -> str:
    """Return an error's sentence, fit for whoever reads it here."""
    return public_text(str(error))


def public_text(text: str) -> str:
    """Leave the server's folders out of a text, where strangers read it."""
    if is_hosted():
        for folder in _private_folders():
            text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), "")
    return text


def public_finding(finding: Finding) -> Finding:
    """Leave the server's folders out of a finding, where strangers read it."""
    return finding._replace(
        message=public_text(finding.message), remedy=public_text(finding.remedy)
    )


def _as_message(error: IPMergeError, in_page: bool) -> gr.Error:
    sentence = sentence_of(error)
    message = as_html(sentence) if in_page else sentence
    return gr.Error(message, title="That did not work", print_exception=False)


def _private_folders() -> Iterator[Path]:
    yield from (home_folder(), ROOT, Path.home())
