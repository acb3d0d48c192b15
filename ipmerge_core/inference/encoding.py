"""Load the tokenizer or processor of a model, and encode conversations and decode tokens with it.

In: a model folder, and messages. Out: input tensors, and text. These files are untrusted: the app
uses this module only in the processes of `processor_server.py`. Any error becomes a
`ModelLoadError`. A text is encoded as the characters that it consists of, even where it spells a
control token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.errors import ModelLoadError, explained, first_line
from ipmerge_core.inference.processor_loading import load_processor, name_image_processor
from ipmerge_core.inference.prompts import (
    ChatFormat,
    Layouts,
    Message,
    added_begin,
    chat_template,
    control_tokens,
    render_chat,
    split_verbatim,
)
from ipmerge_core.inference.thinking import MARKERS
from ipmerge_core.runtime.imports import find_torchvision

if TYPE_CHECKING:
    from torch import Tensor

    from ipmerge_core.inference.batch_encoding import Sizes

_LEAST_SHARE = 10  # the tokenizer has at least this fraction of the model's vocabulary
_WORD_START = "▁"  # SentencePiece's prefix of the first word of a text


class SpecialIds(NamedTuple):
    """The ids of a tokenizer's special tokens; None where it has none."""

    bos: int | None
    eos: int | None
    pad: int | None


class ModelProcessor:
    """The tokenizer of a text model, or the processor of a vision-language model.

    Raises: ModelLoadError if transformers cannot load the files of `folder`.
    """

    def __init__(self, folder: str | Path, *, takes_images: bool) -> None:
        find_torchvision()
        from transformers import AutoConfig, AutoTokenizer

        self.name, self.takes_images = Path(folder).name, takes_images
        self.layouts: Layouts = {}
        # By the sizes of pictures, whether one call encodes several conversations as single calls.
        self.exact_batches: dict[Sizes, bool] = {}
        options = {"local_files_only": True, "trust_remote_code": False}
        what = "processor" if takes_images else "tokenizer"
        with explained(partial(explain_loading, str(folder), what)):
            if takes_images:
                self.processor = load_processor(folder)
            else:
                self.processor = AutoTokenizer.from_pretrained(str(folder), **options)
            self.config = AutoConfig.from_pretrained(str(folder), **options)
            self._refuse_empty()

    def _refuse_empty(self) -> None:
        """Refuse a tokenizer without its files, which transformers may load without an error."""
        known, expected = len(self.tokenizer), self.config.get_text_config().vocab_size
        if known * _LEAST_SHARE < expected:
            raise ModelLoadError(
                f"The tokenizer of '{self.name}' has {known} tokens, and the model has {expected}. "
                f"Are tokenizer.json or the vocabulary files missing from the folder?"
            )

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 (transformers shares no type that mypy can see)
        """The tokenizer, inside the processor or by itself."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def chat_format(self) -> ChatFormat:
        """The properties that determine the prompt format."""
        return ChatFormat(self.name, self.processor, self.tokenizer, self.config, self.takes_images)

    @property
    def special_ids(self) -> SpecialIds:
        """The ids of the special tokens that generation needs."""
        tokenizer = self.tokenizer
        return SpecialIds(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)

    @property
    def thinking_ids(self) -> dict[str, int]:
        """The ids of the markers of a thinking part that are tokens, by their text."""
        known = {text for marker in MARKERS for text in marker}
        ids = {text: self.tokenizer.convert_tokens_to_ids(text) for text in sorted(known)}
        return {
            text: number
            for text, number in ids.items()
            if number is not None and self.tokenizer.convert_ids_to_tokens(number) == text
        }

    @property
    def image_processor(self) -> str | None:
        """The class of the image processor and its library; None for a tokenizer."""
        return name_image_processor(self.processor)

    @property
    def begins_twice(self) -> bool:
        """Whether the template writes the BOS token that encoding its text adds again.

        Raises: ModelLoadError if the template cannot be used.
        """
        prompt = render_chat(self.chat_format, [Message("user", "?")], self.layouts)
        return bool(self._added_begin) and prompt.text.startswith(self._added_begin)

    def encode(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Render a conversation with the chat template and encode it: a batch of one.

        Raises: ModelLoadError if the template or the processor cannot be used.
        """
        prompt = render_chat(self.chat_format, messages, self.layouts)
        images = [image for message in messages for image in message.images]
        with explained(partial(self._refused_images, len(images))):
            for mark in prompt.verbatim:
                self._add_mark(mark)
            inputs = self.call([prompt.text], images)
            plain = {
                self.tokenizer.convert_tokens_to_ids(mark): self._plain_ids(text)
                for mark, text in prompt.verbatim.items()
            }
            return _spliced(inputs, plain) if plain else inputs

    def encode_text(self, text: str) -> list[int]:
        """Encode a text without special tokens, also where it spells one.

        Raises: ModelLoadError if the tokenizer fails.
        """
        with explained(self._refused):
            start, rest = split_verbatim(text, control_tokens(self.chat_format))
            ids: list[int] = self.tokenizer(start, add_special_tokens=False)["input_ids"]
            return [*ids, *(self._plain_ids(rest) if rest else [])]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode tokens to text. Raises: ModelLoadError if the tokenizer fails."""

        def failed(error: Exception) -> ModelLoadError:
            return ModelLoadError(
                f"The tokenizer of '{self.name}' cannot decode the answer ({first_line(error)}). "
                f"Is tokenizer.json that of this model?"
            )

        with explained(failed):
            found = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
            return str(found)

    def _refused(self, error: Exception) -> ModelLoadError:
        return ModelLoadError(
            f"The processor of '{self.name}' cannot encode the question ({first_line(error)}). "
            f"Are its processor and tokenizer files those of this model?"
        )

    def _refused_images(self, count: int, error: Exception) -> ModelLoadError:
        """Describe an error of the processor by the number of images that it was given."""
        if count == 1 or not self.takes_images:
            return self._refused(error)
        what, remedy = f"{count} images", "Ask with one image: not every model takes several."
        if not count:
            what, remedy = "out an image", "Attach an image."
        space = " " if count else ""
        return ModelLoadError(
            f"The processor of '{self.name}' cannot encode a question with{space}{what} "
            f"({first_line(error)}). {remedy}"
        )

    def call(self, texts: Sequence[str], images: Sequence[Any], **padding: Any) -> dict[str, Any]:  # noqa: ANN401
        """Encode rendered prompts, with the images of all of them in order.

        Raises: Exception (any error of the processor).
        """
        if self.takes_images:
            more = {"images": list(images)} if images else {}
            texts = [text.removeprefix(self._added_begin) for text in texts]
            return dict(self.processor(text=texts, return_tensors="pt", **more, **padding))
        # A chat template contains the special tokens; without one the tokenizer adds them.
        special = chat_template(self.chat_format) is None
        tokens = self.tokenizer(
            list(texts), return_tensors="pt", add_special_tokens=special, **padding
        )
        return {name: value for name, value in tokens.items() if name != "token_type_ids"}

    @cached_property
    def _added_begin(self) -> str:
        """The BOS token that a rendered template must not contain, since encoding adds it."""
        return added_begin(self.tokenizer)

    def _add_mark(self, mark: str) -> None:
        """Make a mark one token; adding it again has no effect."""
        from transformers import AddedToken

        self.tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False)])

    def _plain_ids(self, text: str) -> list[int]:
        """Encode a text by the tokenizer's model alone, which knows no added tokens.

        A word that is a control token in the vocabulary of the model itself is encoded by its
        characters.
        """
        control = control_tokens(self.chat_format, chat_template(self.chat_format) or "")
        refused = set(self.tokenizer.all_special_ids)
        refused |= {self.tokenizer.convert_tokens_to_ids(token) for token in control}
        refused.discard(self.tokenizer.unk_token_id)
        ids: list[int] = []
        for word in self._words(text):
            found = self._ids_of(word)
            if refused.intersection(found):
                found = [number for char in word for number in self._ids_of(char)]
            ids += [number for number in found if number not in refused]
        return self._without_prefix(ids, text)

    def _words(self, text: str) -> list[str]:
        """Normalize a text and split it as the tokenizer does before its model."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [text]
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if backend.pre_tokenizer is None:
            return [text]
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    def _ids_of(self, word: str) -> list[int]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return [token.id for token in backend.model.tokenize(word)]
        found: list[int] = self.tokenizer.convert_tokens_to_ids(self.tokenizer._tokenize(word))
        return found

    def _without_prefix(self, ids: list[int], text: str) -> list[int]:
        """Remove the prefix that SentencePiece adds to the first word: the text continues one."""
        first = str(self.tokenizer.convert_ids_to_tokens(ids[0])) if ids else ""
        if not first.startswith(_WORD_START) or text.startswith((" ", _WORD_START)):
            return ids
        if first == _WORD_START:
            return ids[1:]
        rest = self.tokenizer.convert_tokens_to_ids(first.removeprefix(_WORD_START))
        return ids if rest in (None, self.tokenizer.unk_token_id) else [rest, *ids[1:]]


def explain_loading(source: str, what: str, error: Exception) -> ModelLoadError:
    """Describe an error of transformers while it loads a part of the model in `source`."""
    if isinstance(error, ImportError):
        remedy = "Install the missing library."
    else:
        remedy = "Is the folder complete, and does this version of transformers support the model?"
    return ModelLoadError(f"Cannot load the {what} of '{source}' ({first_line(error)}). {remedy}")


def _spliced(inputs: Mapping[str, Any], plain: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Replace each mark in the tokens by several ids, and extend all tensors along the tokens."""
    import torch

    ids: Tensor = inputs["input_ids"]
    counts = torch.tensor([len(plain.get(number, [0])) for number in ids[0].tolist()])
    spread = {
        name: value.repeat_interleave(counts, dim=1)
        if isinstance(value, torch.Tensor) and value.shape == ids.shape
        else value
        for name, value in inputs.items()
    }
    found = [n for number in ids[0].tolist() for n in plain.get(number, [number])]
    return {**spread, "input_ids": torch.tensor([found], dtype=ids.dtype)}
