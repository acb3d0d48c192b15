"""Load models with transformers from local folders, offline and without custom code.

In: a model folder in the transformers layout (an MLLM with its processor, or a text model with its
tokenizer). Out: a `LoadedModel`. Only safetensors are read, and every weight must match the
architecture.
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
    """A model in memory with its processor or tokenizer."""

    folder: Path
    fingerprint: str
    model: Any
    processor: Any
    takes_images: bool
    nbytes: int

    @property
    def tokenizer(self) -> Any:  # noqa: ANN401 (transformers shares no type that mypy can see)
        """The tokenizer, inside the processor or by itself."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def chat_format(self) -> ChatFormat:
        """The properties that determine the prompt format."""
        return ChatFormat(
            self.folder.name, self.processor, self.tokenizer, self.model.config, self.takes_images
        )


class ModelCache:
    """LRU cache of loaded models by folder and content."""

    def __init__(self, most_models: int = 2) -> None:
        self.most_models = most_models
        self._models: OrderedDict[tuple[Path | str | None, ...], LoadedModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: str | Path, device: str = "cpu") -> LoadedModel:
        """Return the model in `folder`, loading it if it is not cached or has changed on disk.

        Raises: as `load_model`.
        """
        from ipmerge_core.models.checkpoint import Checkpoint
        from ipmerge_core.runtime.devices import resolve_device
        from ipmerge_core.runtime.paths import resolve_path

        device = resolve_device(device, fp64=False)
        with self._lock:
            path = resolve_path(folder)
            found = Checkpoint.open(path)
            key = (path, found.fingerprint, found.content, found.other_files, device)
            if key not in self._models:
                while len(self._models) >= self.most_models:
                    self._models.popitem(last=False)
                self._models[key] = load_model(path, device)
            self._models.move_to_end(key)
            return self._models[key]


def import_libraries() -> None:
    """Import the libraries for running a model, which takes seconds the first time."""
    from transformers import (  # noqa: F401 (imported for its side effect)
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        TextIteratorStreamer,
    )

    from ipmerge_core.models.checkpoint import Checkpoint  # noqa: F401


def load_model(folder: str | Path, device: str = "cpu") -> LoadedModel:
    """Load a model folder and verify that all weights match the architecture.

    Args:
        folder: a local folder with config.json, safetensors weights and a tokenizer or processor.
        device: a torch device name, or "auto".

    Raises:
        CheckpointError: the folder does not exist, or its files are damaged.
        ModelLoadError: transformers cannot build the model, or weights are missing or unexpected.
        PlanError: the device is not available.
    """
    # Imported here, like transformers, so that inputs are checked before torch is loaded.
    from ipmerge_core.models.checkpoint import Checkpoint
    from ipmerge_core.runtime.devices import resolve_device

    device = resolve_device(device, fp64=False)
    checkpoint = Checkpoint.open(Path(folder))
    _refuse_code(checkpoint)
    _refuse_adapter(checkpoint)
    takes_images = _takes_images(checkpoint)
    processor = _load_processor(checkpoint, takes_images)
    model = _load_weights(checkpoint, takes_images)
    return LoadedModel(
        folder=Path(folder),
        fingerprint=checkpoint.fingerprint,
        model=model.to(device).eval(),
        processor=processor,
        takes_images=takes_images,
        nbytes=checkpoint.nbytes,
    )


# --- loading ---------------------------------------------------------------------------------


def _refuse_code(checkpoint: Checkpoint) -> None:
    if "auto_map" in checkpoint.config:
        raise ModelLoadError(
            f"'{checkpoint.id}' requires custom code (its config.json has an auto_map), which is "
            f"never executed. Choose a model that transformers supports."
        )


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    if checkpoint.weights.has_adapter:
        raise ModelLoadError(
            f"'{checkpoint.id}' contains both weights and a PEFT adapter (adapter_config.json), "
            f"which transformers would apply and a merge would not. Merge it into the weights "
            f"(merge_and_unload) or delete it."
        )


def _takes_images(checkpoint: Checkpoint) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return checkpoint.config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _load_processor(checkpoint: Checkpoint, takes_images: bool) -> Any:  # noqa: ANN401
    from transformers import AutoProcessor, AutoTokenizer

    kind = AutoProcessor if takes_images else AutoTokenizer
    with explained(partial(_explain, checkpoint, "processor" if takes_images else "tokenizer")):
        return kind.from_pretrained(checkpoint.id, local_files_only=True, trust_remote_code=False)


def _load_weights(checkpoint: Checkpoint, takes_images: bool) -> Any:  # noqa: ANN401
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    with explained(partial(_explain, checkpoint, "model")):
        model, notes = kind.from_pretrained(
            checkpoint.id,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they raise an error below
        )
    for what, sentence in (
        ("missing_keys", "lacks the weight"),
        ("unexpected_keys", "has an unexpected weight:"),
        ("mismatched_keys", "has a weight of the wrong shape:"),
    ):
        found = notes.get(what) or []  # a mismatch includes both shapes
        names = sorted(note if isinstance(note, str) else str(note[0]) for note in found)
        if names:
            raise ModelLoadError(
                f"'{checkpoint.id}' {sentence} '{names[0]}'"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}, so that its answers "
                f"would be wrong. Do config.json and the weights belong to the same model?"
            )
    return model


def _explain(checkpoint: Checkpoint, what: str, error: Exception) -> ModelLoadError:
    if "torchvision" in str(error):
        remedy = "Install torchvision, which this model's image processor requires."
    elif isinstance(error, ImportError):
        remedy = "Install the missing library."
    else:
        remedy = "Is the folder complete, and does this version of transformers support the model?"
    return ModelLoadError(
        f"Cannot load the {what} of '{checkpoint.id}' ({first_line(error)}). {remedy}"
    )


# --- prompting and generating ------------------------------------------------------------------
