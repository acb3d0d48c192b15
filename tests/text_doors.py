"""Every place where a pattern or a loop meets text of others, and texts that are hard on patterns.

`test_text_time.py` bounds the work that they make, `benchmarks/bench_text.py` measures it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

from ipmerge_core.errors import IPMergeError, first_line
from ipmerge_core.inference.prompts import ChatFormat, Message, render_chat
from ipmerge_core.methods import find_method
from ipmerge_core.models.checkpoint import split_address
from ipmerge_core.models.decoders import find_decoders
from ipmerge_core.models.files import as_hub_id
from ipmerge_core.planning.options import PlanOptions
from ipmerge_core.runtime.input_files import FileKind, Schema
from ipmerge_core.runtime.patterns import compile_pattern
from ipmerge_core.tasks.answers import stated_result
from ipmerge_core.ui.analyse.models_form import read_request
from ipmerge_core.ui.pairs import find_partial
from ipmerge_core.ui.safe_text import as_html, as_markdown, show_text

LONGEST = 100_000  # characters
TOKENS = [
    # formulas
    r"\(", r"\[", r"\)", "$", "$$", "$x ", "$x$", r"\(a\)", r"\(a", r"\boxed{", r"\boxed{a}",
    r"\begin{align}", r"\end{align}", r"\begin{align}a\end{align}", "{", "}", "\\", "\\\\",
    # code, fences, tables, emphasis
    "`", "` ", "`a`", "``` ", "```a\n", "~~~\n", "*", "*a", "**a ", "**a** ", "|", "|-",
    "|a|\n|-|\n", "a|\n", "-|-\n",
    # everything else that Markdown and HTML know
    "<", "&", "&lt;", "-", "_", "[", "](", "!", "#", "> ", "20. ", "%%%",
    # white space, controls, letters
    "\n", " ", "\t", "\n ", "\r", "\u202e", "\ud800", "a", "a ", "1", "é",
    # names
    "/", "a/", "@", ".", "=", "=1", "[1", "[1:1]", "layers.1.", "layers.", "layers.1.\n",
    "mlp.gate.", ".scales", "<s>", "<|a|>",
]  # fmt: skip


def _anyway(door: Callable[[str], object]) -> Callable[[str], object]:
    """A door that may refuse: a sentence is an answer too."""

    def knock(text: str) -> None:
        with contextlib.suppress(IPMergeError):
            door(text)

    return knock


def _decoders_of(name: str) -> object:
    spec = SimpleNamespace(name=name, shape=(2, 2), dtype="F32")
    return find_decoders("base", SimpleNamespace(id="m", tensors={name: spec}))  # type: ignore[arg-type]


class _Tokenizer:
    """Renders what it is given and has control tokens."""

    chat_template = "any"
    added_tokens_decoder = {  # noqa: RUF012 (read only)
        number: SimpleNamespace(content=token, special=True)
        for number, token in enumerate(["<s>", "</s>", "<|a|>", "<image>", "[INST]"])
    }

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return str(messages[0]["content"])


def _prompt(text: str) -> object:
    tokenizer = _Tokenizer()
    chat = ChatFormat("m", tokenizer, tokenizer, SimpleNamespace(), takes_images=False)
    return render_chat(chat, [Message("assistant", text)])


_ANYTHING = Schema[object](object)
_PATTERN = compile_pattern(r"((\w+)+\.)*(a|a?)+mlp$")
_FILE = FileKind("a file", "Make it again.", IPMergeError, largest=2 * LONGEST)
DOORS: dict[str, Callable[[str], object]] = {
    "message": lambda text: show_text(text + str(id(object()))),
    "message, growing": lambda text: show_text(text, finished=False),
    "name in HTML": as_html,
    "name in Markdown": as_markdown,
    "message of an error": lambda text: str(IPMergeError(text)),
    "name and a pattern": lambda text: _PATTERN.search(text.encode("utf-8", "replace").decode()),
    "pattern": _anyway(lambda text: PlanOptions(include=text)),
    "file of JSON": _anyway(lambda text: _FILE.validate(_ANYTHING, _FILE.parse(text, "a"), "a")),
    "error of a library": lambda text: first_line(ValueError(text)),
    "prompt": _prompt,
    "result of an answer": stated_result,
    "tensor name, decoder": _anyway(_decoders_of),
    "tensor name, rows": split_address,
    "hub id": _anyway(as_hub_id),
    "pack id": lambda text: find_partial(f"packs-{text}"),
    "method": _anyway(find_method),
    "list of models": _anyway(
        lambda text: read_request("org/a", text, "org/b", "", quick=True, rank=None)
    ),
}
