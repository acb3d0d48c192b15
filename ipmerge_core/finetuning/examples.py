"""Encode conversations for training: chat template, image tokens, loss on the answers only.

In: a `Conversation` and the processor of the MLLM. Out: an `Example`: the model's inputs as they
are at inference, followed by the answer, with labels only on the answers and their ends. Examples
are not packed. `collate` pads a batch; `show_masked` prints what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import category

from ipmerge_core.errors import ModelLoadError, RunError, explained, first_line
from ipmerge_core.finetuning.conversations import Conversation, Turn
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.prompts import Message, render_chat

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label that losses of transformers ignore
OPEN, CLOSE = "\N{LEFT WHITE SQUARE BRACKET}", "\N{RIGHT WHITE SQUARE BRACKET}"  # what is learned
_MOST_EQUAL = 3  # equal tokens in a row that are shown one by one
_PROBE = "answer"  # a word whose place shows what the template puts around an answer


class Unusable(RunError):  # noqa: N818 (a row, not a fault of the run)
    """A conversation that cannot be encoded; it is skipped and counted by its reason."""


class Ending(NamedTuple):
    """What a chat template puts before and after an answer; `ids` end it."""

    before: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """The inputs of one conversation (a batch of one), and its labels, (1, n) each."""

    inputs: Mapping[str, Any]
    labels: Any

    @property
    def length(self) -> int:
        """Number of tokens, image tokens included."""
        return int(self.labels.shape[1])

    @property
    def n_answer(self) -> int:
        """Number of tokens with a loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        tensors = [self.labels, *(v for v in self.inputs.values() if hasattr(v, "nbytes"))]
        return sum(tensor.nbytes for tensor in tensors)


class Encoder:
    """Encodes conversations for one model.

    Args:
        processor: the model's tokenizer and image processor.
        longest: maximum number of tokens of an example.
        most_pixels: larger images are scaled down to it.
        kept: tokens such as `<think>` that an answer may contain as tokens; all other control
            tokens in a text are encoded as the characters that they consist of.
    """

    def __init__(
        self,
        processor: ModelProcessor,
        longest: int = 32_768,
        most_pixels: int = 262_144,
        kept: Sequence[str] = (),
    ) -> None:
        self.processor, self.longest, self.most_pixels = processor, longest, most_pixels
        self.kept = tuple(kept)

    def encode(self, conversation: Conversation) -> Example:
        """Encode a conversation.

        Raises: Unusable if it is too long, its image is unreadable, or the template changes earlier
            answers; ModelLoadError if the template or the processor fails.
        """
        import torch

        try:
            image = scaled_down(conversation.image, self.most_pixels)
        except RunError as error:
            raise Unusable("the image cannot be read") from error
        ids, labels = list[int](), list[int]()
        inputs: dict[str, Any] = {}
        for number, turn in enumerate(conversation.turns):
            if turn.role != "assistant":
                continue
            before = self._messages(conversation.turns[:number], image)
            inputs = self.processor.encode(before)
            prompt = inputs["input_ids"][0].tolist()
            if prompt[: len(ids)] != ids:
                raise Unusable("the template changes earlier answers")
            answer = self._answer_ids(before, turn.text)
            labels += [IGNORED] * (len(prompt) - len(ids)) + answer
            ids = prompt + answer
            if len(ids) > self.longest:
                raise Unusable(f"longer than {self.longest} tokens")
        extended = _extended(inputs, torch.tensor([ids]))
        return Example(extended, torch.tensor([labels]))

    def _messages(self, turns: Sequence[Turn], image: Any) -> list[Message]:  # noqa: ANN401
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        return [
            Message(turn.role, turn.text, (image,) if image is not None and number == first else ())
            for number, turn in enumerate(turns)
        ]

    def _answer_ids(self, before: Sequence[Message], text: str) -> list[int]:
        """Encode an answer and its end; the kept tokens are tokens, everything else is text."""
        ending = self._ending(before)
        ids: list[int] = []
        for piece in _split(ending.before + text, self.kept):
            if piece in self.kept:
                ids.append(self.processor.tokenizer.convert_tokens_to_ids(piece))
            elif piece:
                ids += self.processor.encode_text(piece)
        return [*ids, *ending.ids]

    def _ending(self, before: Sequence[Message]) -> Ending:
        """Find what the template puts around an answer, up to the token that ends it."""
        chat = self.processor.chat_format
        prompt = render_chat(chat, before).text
        probe = [*before, Message("assistant", _PROBE)]
        whole = render_chat(chat, probe, generation_prompt=False).text
        if not whole.startswith(prompt) or _PROBE not in whole[len(prompt) :]:
            raise ModelLoadError(
                f"The chat template of '{chat.name}' does not continue the prompt with the answer, "
                f"so that the tokens of the answer are unknown. Use another template."
            )
        start, _, after = whole[len(prompt) :].partition(_PROBE)
        tokenizer = self.processor.tokenizer
        with explained(lambda error: ModelLoadError(f"The tokenizer failed ({first_line(error)})")):
            ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        special = set(tokenizer.all_special_ids)
        stop = next((n for n, number in enumerate(ids) if number in special), None)
        if stop is not None:
            return Ending(start, tuple(ids[: stop + 1]))
        end = tokenizer.eos_token_id
        return Ending(start, () if end is None else (end,))


def scaled_down(image: Any, most_pixels: int) -> Any:  # noqa: ANN401 (PIL images)
    """Return an image with at most `most_pixels` pixels and its ratio of sides."""
    width, height = image.size
    if width * height <= most_pixels:
        return image
    factor = (most_pixels / (width * height)) ** 0.5
    return image.resize((max(1, int(width * factor)), max(1, int(height * factor))))


def _split(text: str, tokens: Sequence[str]) -> list[str]:
    """Split a text at tokens, which are kept as pieces of their own.

    >>> _split("<think>6*4</think>24", ("<think>", "</think>"))
    ['', '<think>', '6*4', '</think>', '24']
    """
    pieces = [text]
    for token in tokens:
        pieces = [
            part
            for piece in pieces
            for part in ([piece] if piece in tokens else _around(piece, token))
        ]
    return pieces


def _around(text: str, token: str) -> list[str]:
    parts = text.split(token)
    return [each for part in parts for each in (part, token)][:-1]


def _extended(inputs: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """Extend all inputs with one value per token by the tokens of the answer."""
    import torch

    old: Tensor = inputs["input_ids"]
    more = ids.shape[1] - old.shape[1]
    found = dict[str, Any]()
    for name, value in inputs.items():
        by_token = isinstance(value, torch.Tensor) and value.shape == old.shape
        fill = 1 if name == "attention_mask" else 0
        found[name] = (
            torch.cat([value, value.new_full((1, more), fill)], dim=1) if by_token else value
        )
    found["input_ids"] = ids.to(old.dtype)
    return found


def collate(examples: Sequence[Example], pad: int) -> dict[str, Any]:
    """Join examples to a batch, padded on the right; labels of padding are ignored.

    Inputs with one value per token are padded to the longest example. Others, such as pixels, are
    joined along their first dimension; where their other dimensions differ, as for different
    numbers of tiles, they are padded with zeros.
    """
    width = max(example.length for example in examples)
    batch = {"labels": _joined([_padded(each.labels, width, IGNORED) for each in examples])}
    for name in examples[0].inputs:
        values = [example.inputs[name] for example in examples]
        if all(v.shape == e.labels.shape for v, e in zip(values, examples, strict=True)):
            fill = pad if name == "input_ids" else 0
            values = [_padded(value, width, fill) for value in values]
        batch[name] = _joined(values)
    return batch


def _padded(values: Tensor, width: int, fill: int) -> Tensor:
    import torch

    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Join tensors along their first dimension, their other dimensions padded with zeros."""
    import torch

    sizes = [max(value.shape[d] for value in values) for d in range(1, values[0].ndim)]
    padded = []
    for value in values:
        missing = [size - have for size, have in zip(sizes, value.shape[1:], strict=True)]
        ends = [end for size in reversed(missing) for end in (0, size)]
        padded.append(torch.nn.functional.pad(value, ends) if any(missing) else value)
    return torch.cat(padded)


def show_masked(example: Example, processor: ModelProcessor) -> str:
    """Return the text of an example with the learned parts in brackets.

    More than three equal tokens in a row are shown as their number: `<image> x 16`. Brackets of the
    text itself are shown as square ones, control characters as in a Python string.
    """
    ids, labels = example.inputs["input_ids"][0].tolist(), example.labels[0].tolist()
    learned = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    parts = ((is_learned, [number for number, _ in pairs]) for is_learned, pairs in learned)
    texts = ((is_learned, _decoded(part, processor)) for is_learned, part in parts)
    shown = ((is_learned, _printable(text)) for is_learned, text in texts)
    return "".join(f"{OPEN}{text}{CLOSE}" if is_learned else text for is_learned, text in shown)


def _printable(text: str) -> str:
    r"""Return a text of the data without what a terminal obeys, or what marks learned parts.

    >>> print(_printable("\x1b[31m6 * 4"))
    \x1b[31m6 * 4
    """
    text = text.replace(OPEN, "[").replace(CLOSE, "]")
    unseen = (c for c in set(text) - {"\n", "\t"} if category(c) in ("Cc", "Cf", "Cs"))
    return text.translate({ord(c): repr(c)[1:-1] for c in unseen})


def _decoded(ids: Sequence[int], processor: ModelProcessor) -> str:
    """Decode tokens, and count repetitions of one token."""
    pieces, pending = list[str](), list[int]()
    for token, group in groupby(ids):
        count = len(list(group))
        if count <= _MOST_EQUAL:
            pending += [token] * count
            continue
        pieces.append(processor.decode(pending, skip_special_tokens=False))
        pieces.append(f"{processor.decode([token], skip_special_tokens=False)} x {count}")
        pending = []
    return "".join([*pieces, processor.decode(pending, skip_special_tokens=False)])
