"""Render chat prompts with a model's chat template.

In: the processor or tokenizer of a model and the messages of a conversation. Out: the prompt text,
with the model's image placeholders and `verbatim` marks in place of texts that contain control
tokens. Templates are untrusted: any error in one is raised as a `ModelLoadError`. Does not
tokenize; called in the process that `processor_server.py` runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from ipmerge_core.errors import ModelLoadError, RunError, explained, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_QUESTION = 16_000  # characters; most models have a shorter context, see `encode_messages`
LONGEST_MESSAGE = LONGEST_QUESTION  # of an earlier message or a system prompt
REMEDY = (
    "Fix chat_template.jinja, or chat_template in tokenizer_config.json, in the model folder; "
    "without a template the prompt is 'USER: ... ASSISTANT:'."
)
_MARK = "\uf8f0{}\uf8f1"  # private use characters, which templates pass through unchanged
_NEXT_ANSWER = " ASSISTANT:"  # of a model without a template
# Attributes of processors and tokenizers that contain a placeholder for an image or other input.
_PLACEHOLDERS = ("image_token", "boi_token", "eoi_token", "video_token", "audio_token")
_BRACKETS = (
    ("vision_start_token_id", "vision_end_token_id"),
    ("image_start_token_id", "image_end_token_id"),
)


class Message(NamedTuple):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Image, ...] = ()


class Prompt(NamedTuple):
    """A rendered conversation; `verbatim` maps marks in the text to the text that they replace.

    That text contains control tokens, which must be encoded as the characters that they consist of.
    """

    text: str
    verbatim: dict[str, str]


class ChatFormat(NamedTuple):
    """The properties of a model that determine its prompt format."""

    name: str  # for error messages
    processor: Any  # the processor of an MLLM, the tokenizer of a text model
    tokenizer: Any
    config: Any
    takes_images: bool

    @property
    def image_token(self) -> str | None:
        """The placeholder that the processor replaces by an image, if the model defines one."""
        for owner in (self.processor, self.tokenizer):
            if token := getattr(owner, "image_token", None):
                return str(token)
        for name in ("image_token_id", "image_token_index"):
            if token := self._token_of(name):
                return token
        return None

    @property
    def image_text(self) -> str:
        """The placeholder of an image in a message that is a string, with its delimiters."""
        token = self.image_token or "<image>"
        for names in _BRACKETS:
            start, end = (self._token_of(name) for name in names)
            if start and end:
                return f"{start}{token}{end}"
        return f"{token}\n"

    def _token_of(self, name: str) -> str | None:
        number = getattr(self.config, name, None)
        if not isinstance(number, int):
            return None
        token = self.tokenizer.convert_ids_to_tokens(number)
        return None if token is None else str(token)


class _Layout(NamedTuple):
    """A message format: which contents are lists of parts, and how images are included."""

    lists: Literal["all", "user", "none"]
    image_parts: bool  # images are list parts; otherwise placeholders in the text


# The layout of conversations, by the template and the role and number of images of each message.
Layouts: TypeAlias = dict[tuple[str, tuple[tuple[str, int], ...]], _Layout]

_PARTS_FIRST = [_Layout("all", True), _Layout("user", True), _Layout("none", False)]
_TEXT_FIRST = [_Layout("none", False), _Layout("user", False), _Layout("all", False)]


def check_question(question: str) -> str:
    """Return a question without surrounding whitespace after checking its length.

    Raises: RunError if it is empty or too long.
    """
    if len(question) > LONGEST_QUESTION:
        raise RunError(
            f"The question has {len(question)} characters; the maximum is {LONGEST_QUESTION}, and "
            f"less if the context of the model is shorter. Shorten it."
        )
    question = question.strip()
    if not question:
        raise RunError("The question is empty. Enter one; an image alone is not sufficient.")
    return question


def check_conversation(messages: Sequence[Message]) -> None:
    """Check that a conversation ends with a question, and the length of its messages.

    Raises: RunError.
    """
    if not messages or messages[-1].role != "user":
        raise RunError("The conversation does not end with a question. Ask one.")
    check_question(messages[-1].text)
    longest = max((len(message.text) for message in messages), default=0)
    if longest > LONGEST_MESSAGE:
        raise RunError(
            f"A message of the conversation has {longest} characters; the maximum is "
            f"{LONGEST_MESSAGE}. Start a new conversation, or shorten the system prompt."
        )


def render_chat(
    chat: ChatFormat,
    messages: Sequence[Message],
    layouts: Layouts | None = None,
    *,
    generation_prompt: bool = True,
) -> Prompt:
    """Render a conversation up to the start of the model's answer.

    Without `generation_prompt` it ends with its last message, as in training. `layouts` keeps the
    layouts of conversations of one model, which are found by rendering probes and depend only on
    the template, the roles and the numbers of images.

    A message is marked from the first control token in its text on (see `Prompt`), so that neither
    the template nor the processor finds one. A system message that the template rejects or drops
    is prepended to the first user message.

    Raises: ModelLoadError if the template cannot be used.
    """
    template = chat_template(chat)
    messages, verbatim = _marked(messages, control_tokens(chat, template or ""))
    if template is None:
        text = _plain_prompt(chat, messages)
        return Prompt(text if generation_prompt else text.removesuffix(_NEXT_ANSWER), verbatim)
    attempt = _Attempt(chat, template, generation_prompt=generation_prompt)
    known = {} if layouts is None else layouts
    shape = template, tuple((message.role, len(message.images)) for message in messages)
    layout = known[shape] if shape in known else attempt.find_layout(messages)
    if layout is not None:
        known[shape] = layout
    if layout is None and len(messages) > 1 and messages[0].role == "system":
        messages = _fold_system(messages)
        layout = attempt.find_layout(messages)
    if layout is None:
        raise attempt.failure
    prompt = attempt.render(messages, layout)
    if not all(mark in prompt for mark in verbatim):
        raise attempt.failure
    return Prompt(prompt, verbatim)


def chat_template(chat: ChatFormat) -> str | None:
    """Return the default chat template of a processor, else of its tokenizer, else None.

    Raises: ModelLoadError if there are only named templates, or the template is not a string.
    """
    names: list[str] = []
    for owner in (chat.processor, chat.tokenizer):
        found = getattr(owner, "chat_template", None)
        if isinstance(found, dict):
            names += [str(name) for name in found if name != "default"]
            found = found.get("default")
        if found and not isinstance(found, str):
            raise ModelLoadError(
                f"The chat template of '{chat.name}' is a {type(found).__name__}; expected a Jinja "
                f"template string. {REMEDY}"
            )
        if found:
            return str(found)
    if names:
        listed = ", ".join(f"'{name}'" for name in sorted(set(names)))
        raise ModelLoadError(
            f"'{chat.name}' has chat templates named {listed} but none named 'default'. Rename one "
            f"to 'default' in tokenizer_config.json, or save it as chat_template.jinja."
        )
    return None


class _Attempt:
    """Renders conversations with one template and stores its first error."""

    def __init__(self, chat: ChatFormat, template: str, *, generation_prompt: bool) -> None:
        self.chat = chat
        self.template, self.generation_prompt = template, generation_prompt
        self.failure = self._error("omits the text or the image of a message from the prompt")
        self._has_failed = False

    def find_layout(self, messages: Sequence[Message]) -> _Layout | None:
        """Return the first layout with which every text and image appears in the prompt."""
        layouts = self._layouts(messages)
        return next((layout for layout in layouts if self._works(messages, layout)), None)

    def render(self, messages: Sequence[Message], layout: _Layout) -> str:
        """Render the messages. Raises: ModelLoadError if the template fails."""
        written = [_as_dict(message, layout, self.chat.image_text) for message in messages]
        with explained(lambda error: self._error(f"cannot be rendered ({first_line(error)})")):
            prompt: str = self.chat.tokenizer.apply_chat_template(
                written,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=self.generation_prompt,
            )
        return prompt

    def _error(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"The chat template of '{self.chat.name}' {what}. {REMEDY}")

    def _layouts(self, messages: Sequence[Message]) -> Iterator[_Layout]:
        if not self.chat.takes_images:
            yield from _TEXT_FIRST
            return
        yield from _PARTS_FIRST
        if any(message.images for message in messages):
            yield from (_Layout("all", False), _Layout("user", False))

    def _works(self, messages: Sequence[Message], layout: _Layout) -> bool:
        probes = [
            message._replace(text=_marker(number, as_list=_is_list(message, layout)))
            for number, message in enumerate(messages)
        ]
        try:
            prompt = self.render(probes, layout)
        except ModelLoadError as error:
            if not self._has_failed:
                self.failure, self._has_failed = error, True
            return False
        if not _contains_in_order(prompt, [probe.text for probe in probes]):
            return False
        images = sum(len(message.images) for message in messages)
        token = self.chat.image_token
        if not images or not layout.image_parts:
            return True
        if token is not None:
            return prompt.count(token) == images
        return prompt != self.render([probe._replace(images=()) for probe in probes], layout)


def _marker(number: int, *, as_list: bool) -> str:
    r"""Return a unique marker to search for in a prompt.

    In a list it has quotes and a backslash, which a repr or JSON of that list would escape, so that
    it appears unchanged only if the template extracts the text from its part.
    """
    return f'probe {number} it\'s "\\q" end' if as_list else f"probe {number} end"


def _contains_in_order(text: str, wanted: Sequence[str]) -> bool:
    position = 0
    for each in wanted:
        found = text.find(each, position)
        if found < 0:
            return False
        position = found + len(each)
    return True


def _is_list(message: Message, layout: _Layout) -> bool:
    return layout.lists == "all" or (layout.lists == "user" and message.role == "user")


def _as_dict(message: Message, layout: _Layout, image_text: str) -> dict[str, Any]:
    text, parts = message.text, []
    if layout.image_parts and _is_list(message, layout):
        parts = [{"type": "image"} for _ in message.images]
    else:
        text = image_text * len(message.images) + text
    if not _is_list(message, layout):
        return {"role": message.role, "content": text}
    return {"role": message.role, "content": [*parts, {"type": "text", "text": text}]}


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    system, first, *rest = messages
    return [first._replace(text=f"{system.text}\n\n{first.text}"), *rest]


def _plain_prompt(chat: ChatFormat, messages: Sequence[Message]) -> str:
    """Render a conversation for a model without a template, in the format of the first LLaVA."""
    pieces = []
    for message in messages:
        if message.role == "system":
            pieces.append(message.text)
            continue
        images = chat.image_text * len(message.images)
        pieces.append(f"{message.role.upper()}: {images}{message.text}")
    return " ".join(pieces) + _NEXT_ANSWER


def control_tokens(chat: ChatFormat, template: str = "") -> list[str]:
    """List the tokens that a text must not contain: special tokens, markers and placeholders.

    Added tokens that are neither special nor markers such as `<think>` are vocabulary.
    """
    added = getattr(chat.tokenizer, "added_tokens_decoder", {}).values()
    tokens = {
        token.content
        for token in added
        if token.special or token.content in template or _is_marker(token.content)
    }
    for owner in (chat.processor, chat.tokenizer):
        tokens |= {str(getattr(owner, name, None) or "") for name in _PLACEHOLDERS}
    tokens.add(chat.image_token or "")
    return sorted(token for token in tokens if token.strip())


def _is_marker(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in {("<", ">"), ("[", "]")}


def split_verbatim(text: str, control: Sequence[str]) -> tuple[str, str]:
    """Split a text before the first control token; the second part is empty if there is none.

    >>> split_verbatim("What is <image>?", ["<image>"])
    ('What is ', '<image>?')
    """
    places = [place for token in control if (place := text.find(token)) >= 0]
    first = min(places, default=len(text))
    return text[:first], text[first:]


def _marked(
    messages: Sequence[Message], control: Sequence[str]
) -> tuple[list[Message], dict[str, str]]:
    """Replace the text of each message by a mark from its first control token on."""
    marked, verbatim = [], {}
    for number, message in enumerate(messages):
        mark = _MARK.format(number)
        start, rest = split_verbatim(message.text, [*control, _MARK[0]])
        if rest:
            verbatim[mark] = rest
        marked.append(message._replace(text=start + mark) if rest else message)
    return marked, verbatim


def added_begin(tokenizer: Any) -> str:  # noqa: ANN401
    """Return the BOS token if encoding adds it to a text, otherwise an empty text."""
    begin, ids = tokenizer.bos_token, tokenizer("a")["input_ids"]
    return str(begin) if begin and ids and ids[0] == tokenizer.bos_token_id else ""
