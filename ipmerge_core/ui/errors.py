"""Show the errors of the package as messages in the app.

In: an event handler, plain or a generator. Out: the same handler, whose `IPMergeError`s are raised
as `gr.Error` with the same message. On a public Space the server's folders are removed from it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import gradio as gr

from ipmerge_core.errors import IPMergeError
from ipmerge_core.runtime.host import home_folder, is_hosted
from ipmerge_core.ui.pairs import ROOT
from ipmerge_core.ui.safe_text import as_html

if TYPE_CHECKING:
    from ipmerge_core.models.pairing import Finding

P = ParamSpec("P")
R = TypeVar("R")

# The folders of an absolute path, up to its last name; not those of a hub id or a web address.
_PATH = re.compile(r"(?<![\w:/.~-])/(?:[^\s/'\"`<>|:;,()]{1,255}/)+(?=[^\s'\"`])")

# Options of a listener without a progress spinner and without an API endpoint. With every message
# of the server the page updates each component that shows progress, hidden or not, so none does.
QUIET: dict[str, Any] = {
    "show_progress": "hidden",
    "show_progress_on": [],
    "api_visibility": "private",
}


def show_errors(handler: Callable[P, R], *, in_page: bool = True) -> Callable[P, R]:
    """Wrap a handler so that its errors are shown to the user; `in_page` escapes them for HTML."""
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
    """Return an error's message, without the server's folders on a Space."""
    return public_text(str(error))


def public_text(text: str) -> str:
    """Remove the server's folders from a text if this is a Space.

    Of every other absolute path, such as one in an error of another library, the last name stays.
    """
    if is_hosted():
        for folder in _private_folders():
            text = text.replace(f"{folder}{os.sep}", "").replace(str(folder), "")
        text = _PATH.sub("", text)
    return text


def public_finding(finding: Finding) -> Finding:
    """Remove the server's folders from a finding if this is a Space."""
    return finding._replace(
        message=public_text(finding.message), remedy=public_text(finding.remedy)
    )


def _as_message(error: IPMergeError, in_page: bool) -> gr.Error:
    sentence = sentence_of(error)
    message = as_html(sentence) if in_page else sentence
    return gr.Error(message, title="Error", print_exception=False)


def _private_folders() -> Iterator[Path]:
    yield from (home_folder(), ROOT)
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        yield from (home for home in [Path.home()] if home != Path("/"))
