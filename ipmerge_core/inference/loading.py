"""Running a model: load a folder, stream its answer to an image and a question.

In: a model folder in the transformers layout (an MLLM with its processor, or a text model with its
tokenizer), a prompt, perhaps an image. Out: pieces of text as they are generated. Offline, no code
from the model, safetensors only, and every weight must be where the model expects it. This is the
door to transformers for chatting; it neither scores answers nor writes models.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import ModelLoadError, explained, first_line
from ipmerge_core.inference.prompts import (
    ChatFormat,
)

if TYPE_CHECKING:
    from ipmerge_core.models.checkpoint import Checkpoint


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
        from ipmerge_core.models.checkpoint import Checkpoint
        from ipmerge_core.runtime.devices import resolve_device

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

    from ipmerge_core.models.checkpoint import Checkpoint  # noqa: F401


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
    from ipmerge_core.models.checkpoint import Checkpoint
    from ipmerge_core.runtime.devices import resolve_device

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
