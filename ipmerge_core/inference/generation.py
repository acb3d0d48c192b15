"""Generate text: encode a prompt and stream the answer of a loaded model.

In: a `LoadedModel`, a question, optionally an image and earlier messages. Out: pieces of text as
they are generated, or the whole answer. Generation can be stopped at any token. Sampling is seeded
and independent of other threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import ModelLoadError, RunError, explained, first_line
from ipmerge_core.inference.images import open_image
from ipmerge_core.inference.loading import LoadedModel, load_model
from ipmerge_core.inference.prompts import Message, check_question

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


MOST_NEW_TOKENS = 2048
LARGEST_SEED = 2**63 - 1


_QUEUE_SECONDS = 0.1  # interval at which a waiting reader checks whether the writer is alive


@dataclass(frozen=True)
class GenerationSettings:
    """Generation settings. Temperature 0 selects the most likely token."""

    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the values. Raises: RunError."""
        if not 0 <= self.temperature <= 5:  # also rejects NaN
            raise RunError(
                f"The temperature is {self.temperature}; expected a number from 0 (greedy "
                f"decoding) to 5."
            )
        if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise RunError(
                f"The number of new tokens is {self.max_new_tokens}; expected an integer from "
                f"1 to {MOST_NEW_TOKENS}."
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise RunError(
                f"The seed is {self.seed}; expected an integer from 0 to {LARGEST_SEED}."
            )


def stream_answer(
    loaded: LoadedModel,
    question: str,
    image: Image | None = None,
    settings: GenerationSettings | None = None,
    cancelled: threading.Event | None = None,
) -> Iterator[str]:
    """Stream the answer to a question.

    Closing the generator, or setting `cancelled`, stops the model at its next token. Each call has
    its own random generator, so that concurrent answers do not affect each other.

    Raises:
        RunError: the question is empty, or the prompt is too long.
        ModelLoadError: the model does not support this input.
        RunCancelled: `cancelled` was set before the first token.
    """
    settings = settings or GenerationSettings()
    closed = threading.Event()
    stops = [closed, *([cancelled] if cancelled else [])]
    inputs = on_device(encode_prompt(loaded, question, image, stops=stops), loaded.model.device)
    streamer = _new_streamer(loaded, stops)

    def stopped(error: Exception) -> ModelLoadError:
        return ModelLoadError(
            f"'{loaded.folder.name}' failed while generating ({first_line(error)}). "
            f"A shorter question or smaller image may help."
        )

    with ThreadPoolExecutor(1) as threads, explained(stopped):
        try:
            run = threads.submit(_generate, loaded, inputs, settings, streamer, stops)
            yield from _pieces(streamer, run)
            run.result()
        finally:
            closed.set()


def answer(
    model: str | Path | LoadedModel,
    question: str,
    image: str | Path | Image | None = None,
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """Return the complete answer; models and images can be given as paths.

    `device` is the device of a model that is given as a path.

    Raises: as `load_model`, `open_image` and `stream_answer`.
    """
    settings = GenerationSettings(temperature, max_new_tokens, seed)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, device)
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
    messages = [*before, Message("user", check_question(question), image)]
    if not loaded.takes_images and any(message.image is not None for message in messages):
        raise ModelLoadError(
            f"'{loaded.folder.name}' is a text model and does not support images. Ask without an "
            f"image, or choose a vision-language model."
        )
    inputs = loaded.processor.encode(messages, stops)
    _refuse_unknown_tokens(loaded, inputs["input_ids"])
    return inputs


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


def _new_streamer(loaded: LoadedModel, stops: Sequence[threading.Event]) -> Any:  # noqa: ANN401
    from transformers import TextIteratorStreamer

    return TextIteratorStreamer(
        loaded.processor,  # it has the `decode` of a tokenizer
        skip_prompt=True,
        timeout=_QUEUE_SECONDS,
        skip_special_tokens=True,
        stops=stops,
    )


def _pieces(streamer: Any, run: Future[None]) -> Iterator[str]:  # noqa: ANN401
    """Yield text from the streamer until it ends or the generating thread fails."""
    while True:
        try:
            yield next(streamer)
        except StopIteration:
            return
        except Empty:
            if run.done():
                return


def _generate(
    loaded: LoadedModel,
    inputs: Any,  # noqa: ANN401
    settings: GenerationSettings,
    streamer: Any,  # noqa: ANN401
    stops: list[threading.Event],
) -> None:
    """Run the model and pass its tokens to the streamer; called in a separate thread."""
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    def stop(ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        stopped = any(event.is_set() for event in stops)
        return torch.full((ids.shape[0],), stopped, device=ids.device)

    noise = [_Sampler(settings)] if settings.temperature else []
    with torch.inference_mode():
        loaded.model.generate(
            **inputs,
            do_sample=False,  # _Sampler adds the sampling noise
            max_new_tokens=settings.max_new_tokens,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList(noise),
        )


class _Sampler:
    """Exact sampling at a temperature with its own seeded random stream.

    Math:   argmax_i (logit_i + T g_i), g_i = -log(-log u_i), draws i with probability
            softmax(logits / T)_i (the Gumbel-max trick, times T, which is finite for every T).
    """

    def __init__(self, settings: GenerationSettings) -> None:
        import torch

        self.temperature = settings.temperature
        self.random = torch.Generator().manual_seed(settings.seed)

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        uniform = torch.rand(scores.shape, generator=self.random, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
        return scores.float() + (self.temperature * gumbel).to(scores.device, torch.float32)
