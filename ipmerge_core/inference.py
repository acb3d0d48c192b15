"""Running a model: load a folder, stream its answer to an image and a question.

In: a model folder in the transformers layout (an MLLM with its processor, or a text model with its
tokenizer), a prompt, perhaps an image. Out: pieces of text as they are generated. Offline, no code
from the model, safetensors only, and every weight must be where the model expects it. This is the
door to transformers for chatting; it neither scores answers nor writes models.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, BinaryIO

from ipmerge_core.errors import ModelLoadError, RunError, explained, first_line
from ipmerge_core.prompts import (
    ChatFormat,
    Message,
    chat_template,
    check_question,
    render_chat,
    without_begin,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ipmerge_core.checkpoint import Checkpoint

MOST_NEW_TOKENS = 2048
MOST_PIXELS = 20_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
_QUEUE_SECONDS = 0.1  # how often a waiting reader looks whether the writer still lives


@dataclass(frozen=True)
class Settings:
    """How to generate. Temperature 0 takes the most likely token each time."""

    temperature: float = 0.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that make no sense. Raises: RunError."""
        if not 0 <= self.temperature <= 5:  # also refuses NaN
            raise RunError(
                f"The temperature is {self.temperature}; expected a number from 0 (always the "
                f"most likely token) to 5."
            )
        if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise RunError(
                f"The number of new tokens is {self.max_new_tokens}; expected a whole number from "
                f"1 to {MOST_NEW_TOKENS}."
            )


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with what turns text and images into its tokens."""

    folder: Path
    fingerprint: str
    model: Any
    processor: Any
    sees: bool  # whether it takes images
    nbytes: int

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 (transformers shares no type that mypy can see)
        """The tokenizer, inside the processor or by itself."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def chat_format(self) -> ChatFormat:
        """What decides how its prompts look."""
        return ChatFormat(
            self.folder.name, self.processor, self.tokenizer, self.model.config, self.sees
        )


class ModelCache:
    """The models used last, by folder and content; the oldest leaves when the room is used up."""

    def __init__(self, most_models: int = 2) -> None:
        self.most_models = most_models
        self._models: OrderedDict[tuple[Path, str, str], LoadedModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: str | Path, device: str = "cpu") -> LoadedModel:
        """Return the model in `folder`, loading it if it is not here or has changed on disk.

        Raises: as `load_model`.
        """
        from ipmerge_core.checkpoint import Checkpoint
        from ipmerge_core.devices import resolve_device

        device = resolve_device(device, fp64=False)
        with self._lock:
            path = Path(folder).expanduser().resolve()
            key = (path, Checkpoint.open(path).fingerprint, device)
            if key not in self._models:
                while len(self._models) >= self.most_models:
                    self._models.popitem(last=False)
                self._models[key] = load_model(path, device)
            self._models.move_to_end(key)
            return self._models[key]


def import_libraries() -> None:
    """Import what running a model needs; the first time takes seconds, afterwards nothing."""
    from transformers import (  # noqa: F401 (imported for the sake of it)
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        TextIteratorStreamer,
    )

    from ipmerge_core.checkpoint import Checkpoint  # noqa: F401


def load_model(folder: str | Path, device: str = "cpu") -> LoadedModel:
    """Load a model folder, whole and clean.

    Args:
        folder: a local folder with config.json, safetensors weights and a tokenizer or processor.
        device: where to put it: "auto", or as torch names it.

    Raises:
        CheckpointError: there is no such folder, or its files are damaged.
        ModelLoadError: transformers cannot build the model, or a weight has no place or no value.
        PlanError: the device is not there.
    """
    # Imported here, as transformers is: pictures and settings are checked before torch is loaded.
    from ipmerge_core.checkpoint import Checkpoint
    from ipmerge_core.devices import resolve_device

    device = resolve_device(device, fp64=False)
    checkpoint = Checkpoint.open(Path(folder))
    _refuse_code(checkpoint)
    _refuse_adapter(checkpoint)
    sees = _takes_images(checkpoint)
    processor = _load_processor(checkpoint, sees)
    model = _load_weights(checkpoint, sees)
    return LoadedModel(
        folder=Path(folder),
        fingerprint=checkpoint.fingerprint,
        model=model.to(device).eval(),
        processor=processor,
        sees=sees,
        nbytes=checkpoint.nbytes,
    )


def stream_answer(
    loaded: LoadedModel,
    question: str,
    image: Image | None = None,
    settings: Settings | None = None,
    cancelled: threading.Event | None = None,
) -> Iterator[str]:
    """Answer a question, piece by piece.

    Closing the generator, or setting `cancelled`, stops the model at its next token. Sampling draws
    from a generator of its own, so two answers at the same time do not disturb each other.

    Raises:
        RunError: nothing to answer, or the prompt is too long.
        ModelLoadError: the model cannot take this input.
    """
    settings = settings or Settings()
    inputs = encode_prompt(loaded, question, image).to(loaded.model.device)
    closed = threading.Event()
    stops = [closed, *([cancelled] if cancelled else [])]
    streamer = _new_streamer(loaded)

    def stopped(error: Exception) -> ModelLoadError:
        return ModelLoadError(
            f"'{loaded.folder.name}' stopped while answering ({first_line(error)}). "
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
    """Return the whole answer at once; models and images may be given by their paths.

    `device` is where a model that is given by its path is put.

    Raises: as `load_model`, `open_image` and `stream_answer`.
    """
    settings = Settings(temperature, max_new_tokens, seed)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, device)
    picture = open_image(image) if isinstance(image, str | Path) else image
    return "".join(stream_answer(loaded, question, picture, settings)).strip()


def open_image(file: str | Path | BinaryIO) -> Image:
    """Open a picture that a stranger gave: PNG, JPEG or WebP of a bearable size, upright, RGB.

    Raises: RunError when it is something else; nothing is decoded before its size is known.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = Path(file).name if isinstance(file, str | Path) else "picture"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise RunError(
                        f"The image '{name}' has {width} x {height} pixels; at most "
                        f"{MOST_PIXELS / 1e6:.0f} million are taken. Make it smaller."
                    )
                picture.verify()
            with Image.open(file, formats=IMAGE_FORMATS) as picture:  # verify() used it up
                return ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RunError(f"The image '{name}' is too large to open. Make it smaller.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise RunError(
            f"'{name}' is not a readable image. Expected a PNG, JPEG or WebP file."
        ) from error


def encode_prompt(
    loaded: LoadedModel, question: str, image: Image | None, before: Sequence[Message] = ()
) -> Any:  # noqa: ANN401
    """Put the question into the model's own chat format and turn it into tensors.

    Args:
        loaded: the model that is asked.
        question: what is asked.
        image: the image that goes with it, if any.
        before: what precedes the question: a system prompt, earlier questions and answers.

    Raises:
        RunError: the question is empty or too long.
        ModelLoadError: an image for a model that takes none, or the model's chat template or
            processor cannot be used.
    """
    messages = [*before, Message("user", check_question(question), image)]
    images = [message.image.convert("RGB") for message in messages if message.image is not None]
    if images and not loaded.sees:
        raise ModelLoadError(
            f"'{loaded.folder.name}' is a text model and takes no image. Ask it in words, or "
            f"choose a vision-language model."
        )
    text = render_chat(loaded.chat_format, messages)

    def refused(error: Exception) -> ModelLoadError:
        return ModelLoadError(
            f"The processor of '{loaded.folder.name}' cannot encode the question "
            f"({first_line(error)}). Are its processor and tokenizer files those of this model?"
        )

    with explained(refused):
        return _encode(loaded, text, images)


# --- loading ---------------------------------------------------------------------------------


def _refuse_code(checkpoint: Checkpoint) -> None:
    if "auto_map" in checkpoint.config:
        raise ModelLoadError(
            f"'{checkpoint.id}' needs code of its own to run (its config.json has an auto_map). "
            f"Code from model folders is never run; choose a model that transformers knows."
        )


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    if checkpoint.weights.has_adapter:
        raise ModelLoadError(
            f"'{checkpoint.id}' holds a PEFT adapter (adapter_config.json) beside its weights. "
            f"Transformers would add it and a merge does not: merge it into the weights "
            f"(merge_and_unload) or delete it."
        )


def _takes_images(checkpoint: Checkpoint) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return checkpoint.config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _load_processor(checkpoint: Checkpoint, sees: bool) -> Any:  # noqa: ANN401
    from transformers import AutoProcessor, AutoTokenizer

    kind = AutoProcessor if sees else AutoTokenizer
    with explained(partial(_explain, checkpoint, "processor" if sees else "tokenizer")):
        return kind.from_pretrained(checkpoint.id, local_files_only=True, trust_remote_code=False)


def _load_weights(checkpoint: Checkpoint, sees: bool) -> Any:  # noqa: ANN401
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with explained(partial(_explain, checkpoint, "model")):
        model, notes = kind.from_pretrained(
            checkpoint.id,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    for what, sentence in (
        ("missing_keys", "has no weight for"),
        ("unexpected_keys", "has a weight that its architecture does not use:"),
        ("mismatched_keys", "has a weight of the wrong shape:"),
    ):
        found = notes.get(what) or []  # a mismatch comes with its two shapes
        names = sorted(note if isinstance(note, str) else str(note[0]) for note in found)
        if names:
            raise ModelLoadError(
                f"'{checkpoint.id}' {sentence} '{names[0]}'"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}. Its answers would be "
                f"wrong, so it is not used. Are config.json and the weights of one model?"
            )
    return model


def _explain(checkpoint: Checkpoint, what: str, error: Exception) -> ModelLoadError:
    if "torchvision" in str(error):
        remedy = "Install torchvision, which this model's image processor needs."
    elif isinstance(error, ImportError):
        remedy = "Install the library that it names."
    else:
        remedy = "Is the folder complete, and does this version of transformers know the model?"
    return ModelLoadError(
        f"Cannot load the {what} of '{checkpoint.id}' ({first_line(error)}). {remedy}"
    )


# --- prompting and generating ------------------------------------------------------------------


def _encode(loaded: LoadedModel, text: str, images: list[Image]) -> Any:  # noqa: ANN401
    if loaded.sees:
        more = {"images": images} if images else {}
        return loaded.processor(
            text=[without_begin(loaded.tokenizer, text)], return_tensors="pt", **more
        )
    # A chat template writes the special tokens itself; without one the tokenizer has to.
    special = chat_template(loaded.chat_format) is None
    tokens = loaded.tokenizer([text], return_tensors="pt", add_special_tokens=special)
    tokens.pop("token_type_ids", None)
    return tokens


def _new_streamer(loaded: LoadedModel) -> Any:  # noqa: ANN401
    from transformers import TextIteratorStreamer

    return TextIteratorStreamer(
        loaded.tokenizer, skip_prompt=True, timeout=_QUEUE_SECONDS, skip_special_tokens=True
    )


def _pieces(streamer: Any, run: Future[None]) -> Iterator[str]:  # noqa: ANN401
    """Take text from the streamer until it ends, or its writer has failed."""
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
    settings: Settings,
    streamer: Any,  # noqa: ANN401
    stops: list[threading.Event],
) -> None:
    """Run the model, in a thread of its own, and let the streamer pass on what it says."""
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    def stop(ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        stopped = any(event.is_set() for event in stops)
        return torch.full((ids.shape[0],), stopped, device=ids.device)

    tokenizer = loaded.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    noise = [_Sampler(settings)] if settings.temperature else []
    with torch.inference_mode():
        loaded.model.generate(
            **inputs,
            do_sample=False,  # sampling is the noise that _Sampler adds
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=pad,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=LogitsProcessorList(noise),
        )


class _Sampler:
    """Exact sampling at a temperature by a seeded stream of its own.

    Math:   argmax_i (logit_i / T + g_i), g_i = -log(-log u_i), draws i with probability
            softmax(logits / T)_i (the Gumbel-max trick).
    """

    def __init__(self, settings: Settings) -> None:
        import torch

        self.temperature = settings.temperature
        self.random = torch.Generator().manual_seed(settings.seed)

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        uniform = torch.rand(scores.shape, generator=self.random, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
        return scores.float() / self.temperature + gumbel.to(scores.device, torch.float32)
