"""Generate text: encode a prompt and stream the answer of a loaded model.

In: a `LoadedModel`, a question, optionally an image and earlier messages. Out: pieces of text as
they are generated, or the whole answer. Generation can be stopped at any token. Sampling is seeded
and independent of other threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import ModelLoadError, RunError
from ipmerge_core.inference.images import open_image
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.inference.precisions import Precision
from ipmerge_core.inference.prompts import Message, check_conversation, check_question
from ipmerge_core.inference.rows import RowTokens, generate_rows
from ipmerge_core.inference.sampling import LARGEST_SEED, MOST_NEW_TOKENS, GenerationSettings
from ipmerge_core.inference.streaming import Job, RowState, Stream, stream_jobs

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


__all__ = [
    "LARGEST_SEED",
    "MOST_NEW_TOKENS",
    "GenerationSettings",
    "answer",
    "encode_messages",
    "encode_prompt",
    "on_device",
    "stream_answer",
    "stream_states",
]


def stream_answer(
    loaded: LoadedModel,
    question: str,
    image: Image | None = None,
    settings: GenerationSettings | None = None,
    cancelled: threading.Event | None = None,
) -> Iterator[str]:
    """Stream the answer to a question, without the thinking part of a model that has one.

    Closing the generator, or setting `cancelled`, stops the model at its next token. Each call has
    its own random generator, so that concurrent answers do not affect each other.

    Raises:
        RunError: the question is empty, or the prompt is too long.
        ModelLoadError: the model does not support this input.
        RunCancelled: `cancelled` was set before the first token.
    """
    stops = [cancelled] if cancelled else []
    inputs = encode_prompt(loaded, question, image, stops=stops)
    shown = ""
    for state in stream_states(loaded, inputs, settings or GenerationSettings(), stops):
        if state.state == "failed":
            raise ModelLoadError(state.note)
        if len(state.text) > len(shown):
            yield state.text[len(shown) :]
            shown = state.text


def stream_states(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    settings: GenerationSettings,
    stops: Sequence[threading.Event] = (),
) -> Iterator[RowState]:
    """Stream the reply to an encoded prompt of one conversation, see `RowState`."""
    closed = threading.Event()
    marks = loaded.processor.thinking
    opened = marks.opens(inputs["input_ids"][0].tolist())
    stream = Stream(RowTokens(settings, [closed, *stops], opened))
    ready = on_device(inputs, loaded.model.device)

    def run() -> None:
        rows = [stream.tokens]
        run_in_turns(loaded, ready, rows, lambda: None, lambda: None)

    job = Job(run, [stream], loaded.folder.name)
    for states in stream_jobs([job], [stream], loaded.processor, marks, closed):
        yield states[0]


def run_in_turns(
    loaded: LoadedModel,
    inputs: Mapping[str, Any],
    rows: Sequence[RowTokens],
    install: Callable[[], object],
    remove: Callable[[], object],
) -> None:
    """Generate the replies of one batch, letting other threads run the model between two steps.

    `install` prepares the model for these rows before every turn, `remove` undoes it after.
    """
    from ipmerge_core.inference.shared_weights import Remembered

    remembered = Remembered(loaded.model)

    def leave() -> None:
        remembered.save()
        remove()

    def enter() -> None:
        install()
        remembered.restore()

    with loaded.turns.taken(_common_stops(rows)) as mine:
        if not mine:
            return
        enter()
        try:
            between = partial(loaded.turns.switch, leave, enter)
            generate_rows(loaded.model, inputs, rows, loaded.processor.thinking, between)
        finally:
            leave()


def _common_stops(rows: Sequence[RowTokens]) -> list[threading.Event]:
    """Return the events that stop every row; one of a single row must not stop the others."""
    first, *others = (list(row.stops) for row in rows)
    return [event for event in first if all(event in stops for stops in others)]


def answer(
    model: str | Path | LoadedModel,
    question: str,
    image: str | Path | Image | None = None,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    max_thinking_tokens: int = 1024,
    device: str = "cpu",
    precision: Precision = "stored",
) -> str:
    """Return the complete answer; models and images can be given as paths.

    `device` and `precision` are those of a model that is given as a path, see `load_model`.

    Raises: as `load_model`, `open_image` and `stream_answer`.
    """
    settings = GenerationSettings(temperature, max_new_tokens, seed, max_thinking_tokens)
    loaded = model
    if not isinstance(loaded, LoadedModel):
        loaded = load_model(loaded, device, precision=precision)
    picture = open_image(image) if isinstance(image, str | Path) else image
    return "".join(stream_answer(loaded, question, picture, settings)).strip()


def encode_prompt(
    loaded: LoadedModel,
    question: str,
    image: Image | None,
    before: Sequence[Message] = (),
    stops: Sequence[threading.Event] = (),
) -> dict[str, Any]:
    """Render the question with the model's chat template and tokenize it, in the model's process.

    Args:
        loaded: the model.
        question: the user's message.
        image: the image of the message, if any.
        before: earlier messages: a system prompt, questions and answers.
        stops: events that cancel the request.

    Raises:
        RunError: the question is empty or too long.
        ModelLoadError: an image for a text model, or the model's chat template or processor
            cannot be used.
    """
    images = () if image is None else (image,)
    return encode_messages(
        loaded, [*before, Message("user", check_question(question), images)], stops
    )


def encode_messages(
    loaded: LoadedModel, messages: Sequence[Message], stops: Sequence[threading.Event] = ()
) -> dict[str, Any]:
    """Render a conversation with the model's chat template and tokenize it: a batch of one.

    Raises: as `encode_prompt` and `check_conversation`; RunError if the context of the model is
        shorter than the conversation.
    """
    check_conversation(messages)
    if not loaded.takes_images and any(message.images for message in messages):
        raise ModelLoadError(
            f"'{loaded.folder.name}' is a text model and does not support images. Ask without an "
            f"image, or choose a vision-language model."
        )
    inputs = loaded.processor.encode(messages, stops)
    _refuse_unknown_tokens(loaded, inputs["input_ids"])
    _check_context(loaded, inputs["input_ids"].shape[-1])
    return inputs


def _check_context(loaded: LoadedModel, tokens: int) -> None:
    """Check that a conversation leaves room for an answer. Raises: RunError."""
    config = loaded.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)  # recurrent models have no limit
    if isinstance(longest, int) and tokens >= longest > 0:
        raise RunError(
            f"The conversation has {tokens} tokens; the context of '{loaded.folder.name}' is "
            f"{longest} tokens, the answer included. Shorten it, or send no earlier turns."
        )


def _refuse_unknown_tokens(loaded: LoadedModel, ids: torch.Tensor) -> None:
    """Refuse a token without an embedding, which on a GPU ends every model of the process."""
    rows = loaded.model.get_input_embeddings().num_embeddings
    config = loaded.model.config
    image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    found = ids[(ids < 0) | (ids >= rows)]
    unknown = found if image is None else found[found != image]
    if len(unknown):
        raise ModelLoadError(
            f"The tokenizer of '{loaded.folder.name}' produces the token {int(unknown[0])}, and "
            f"the model has embeddings for {rows}. Is tokenizer.json that of this model?"
        )


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of encoded inputs to a device."""
    return {
        name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()
    }
