"""Load models with transformers from local folders, offline and without custom code.

In: a model folder in the transformers layout (an MLLM with its processor, or a text model with its
tokenizer). Out: a `LoadedModel`: the model in this process, its processor in a process of its own.
Only safetensors are read, every weight must match the architecture, and of the model's generation
settings only the ids of the special tokens are kept.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import IPMergeError, ModelLoadError, RunCancelled, explained
from ipmerge_core.inference.encoding import SpecialIds, explain_loading
from ipmerge_core.inference.processor_loading import processes_images
from ipmerge_core.inference.processor_process import RemoteProcessor, default_server
from ipmerge_core.runtime.imports import IMPORTING, find_torchvision
from ipmerge_core.runtime.turns import Turns

if TYPE_CHECKING:
    from ipmerge_core.inference.placement import Placement
    from ipmerge_core.inference.precisions import Precision
    from ipmerge_core.models.checkpoint import Checkpoint

Progress = Callable[[float], object]

_COUNTS_LAYERS = re.compile(r"(?<!max_window_)layers$|^depth$|^n_layer$")
_MOST_LARGER = 3  # than the files; tied weights are stored once


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with its processor or tokenizer in another process.

    Threads that run it take `turns`, one step of the model each.
    """

    folder: Path
    fingerprint: str
    model: Any
    processor: RemoteProcessor
    special_ids: SpecialIds
    takes_images: bool
    nbytes: int
    turns: Turns = field(default_factory=Turns)


class ModelCache:
    """LRU cache of loaded models by folder and content."""

    def __init__(self, most_models: int = 2) -> None:
        self.most_models = most_models
        self._models: OrderedDict[tuple[Path | str | None, ...], LoadedModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self,
        folder: str | Path,
        device: str = "cpu",
        stops: Sequence[threading.Event] = (),
        *,
        precision: Precision = "auto",
        progress: Progress = lambda share: None,
    ) -> LoadedModel:
        """Return the model in `folder`, loading it if it is not cached or has changed on disk.

        The models that were used longest ago are released while there are too many, or the memory
        is too small for the new one. Raises: as `load_model`.
        """
        from ipmerge_core.models.checkpoint import Checkpoint
        from ipmerge_core.runtime.devices import resolve_device
        from ipmerge_core.runtime.paths import resolve_path

        device = resolve_device(device, fp64=False)
        with self._lock:
            path = resolve_path(folder)
            found = Checkpoint.open(path)
            content = (found.fingerprint, found.content, found.other_files)
            key = (path, *content, device, precision)
            if key not in self._models:
                self._make_room(found, device)
                self._models[key] = load_model(
                    path, device, stops, precision=precision, progress=progress
                )
            self._models.move_to_end(key)
            return self._models[key]

    def _make_room(self, model: Checkpoint, device: str) -> None:
        """Release models until there are few enough, and the weights as stored fit."""
        from ipmerge_core.inference.memory import loading_options, release_memory

        while self._models:
            if len(self._models) < self.most_models and loading_options(model, device)[0].fits:
                return
            self._models.popitem(last=False)
            release_memory()

    def loaded(self) -> tuple[LoadedModel, ...]:
        """Return the models in memory."""
        with self._lock:
            return tuple(self._models.values())


def import_libraries() -> None:
    """Import the libraries for running a model, which takes seconds the first time."""
    default_server().start()  # imports them too, at the same time
    find_torchvision()
    with IMPORTING:
        from transformers import (  # noqa: F401 (imported for its side effect)
            AutoModelForCausalLM,
            AutoModelForImageTextToText,
            TextIteratorStreamer,
        )

    from ipmerge_core.models.checkpoint import Checkpoint  # noqa: F401


def load_model(
    folder: str | Path,
    device: str = "cpu",
    stops: Sequence[threading.Event] = (),
    *,
    precision: Precision = "stored",
    progress: Progress = lambda share: None,
) -> LoadedModel:
    """Load a model folder and verify that all weights match the architecture.

    Args:
        folder: a local folder with config.json, safetensors weights and a tokenizer or processor.
        device: a torch device name, or "auto".
        stops: events that cancel loading.
        precision: "stored" for the values of the files, "bf16", "fp16", "8bit" or "4bit" (the last
            two with bitsandbytes on a CUDA GPU); "auto" takes the most exact that fits into free
            memory. `device` "cuda" with several GPUs uses all of them if the model does not fit
            into one.
        progress: takes the share of the weights that are loaded, from 0 to 1.

    Raises:
        CheckpointError: the folder does not exist, or its files are damaged.
        ModelLoadError: transformers cannot build the model, weights are missing or unexpected, or
            there is too little memory.
        PlanError: the device or the precision is not available.
        RunCancelled: one of the events was set.
    """
    default_server().start()
    # Imported here, like transformers, so that inputs are checked before torch is loaded.
    from ipmerge_core.inference.placement import placement, reported_loading
    from ipmerge_core.models.checkpoint import Checkpoint
    from ipmerge_core.runtime.devices import resolve_device

    device = resolve_device(device, fp64=False)
    find_torchvision()
    folder = Path(folder).expanduser()
    checkpoint = Checkpoint.open(folder)
    refuse_unsupported(checkpoint)
    takes_images = _takes_images(checkpoint)
    processor = RemoteProcessor(folder, takes_images=takes_images)
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(processor.load, stops)
        place = placement(checkpoint, device, precision)
        with reported_loading(progress, stops):
            model = _load_weights(checkpoint, place)
        special_ids = reading.result()
    model.generation_config = _generation_config(checkpoint, special_ids)
    return LoadedModel(
        folder=folder,
        fingerprint=checkpoint.fingerprint,
        model=(model if place.device_map else model.to(device)).eval(),
        processor=processor,
        special_ids=special_ids,
        takes_images=takes_images,
        nbytes=checkpoint.nbytes,
    )


# --- loading ---------------------------------------------------------------------------------


def load_weights(checkpoint: Checkpoint) -> Any:  # noqa: ANN401
    """Load the model of a local folder in its stored dtype, on the CPU, without its processor.

    Raises: ModelLoadError as `load_model`.
    """
    from ipmerge_core.inference.placement import placement

    find_torchvision()
    refuse_unsupported(checkpoint)
    return _load_weights(checkpoint, placement(checkpoint, "cpu", "stored"))


def refuse_unsupported(checkpoint: Checkpoint) -> None:
    """Raise ModelLoadError for a model that transformers cannot load as its files describe it."""
    _refuse_code(checkpoint)
    _refuse_type(checkpoint)
    _refuse_adapter(checkpoint)
    refuse_layers(checkpoint)


def _refuse_code(checkpoint: Checkpoint) -> None:
    """Refuse a model type that only custom code supports; the code of others is not needed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = str(checkpoint.config.get("model_type"))
    if "auto_map" in checkpoint.config and model_type not in CONFIG_MAPPING_NAMES:
        raise ModelLoadError(
            f"'{checkpoint.id}' requires custom code (its config.json has an auto_map, and the "
            f"type {model_type!r} is unknown to transformers), which is never executed. Choose a "
            f"model that transformers supports."
        )


def _refuse_type(checkpoint: Checkpoint) -> None:
    """Refuse a known model type that generates text from neither text nor text and images."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(checkpoint.config.get("model_type"))
    known = model_type in CONFIG_MAPPING_NAMES
    if (
        known
        and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and not _has_images(model_type)
    ):
        raise ModelLoadError(
            f"'{checkpoint.id}' cannot chat: transformers has no class for its type "
            f"'{model_type}' that answers text, or text with images (audio and omni models have "
            f"other inputs). Analysing and merging it do not require that."
        )


def refuse_layers(checkpoint: Checkpoint) -> None:
    """Refuse a config with more layers than tensors, which would be built one by one."""
    most, parts = len(checkpoint.tensors), [checkpoint.config]
    for part in parts:
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if _COUNTS_LAYERS.search(key) and isinstance(value, int) and value > most:
                raise ModelLoadError(
                    f"The config of '{checkpoint.id}' has {key} = {value}, and its files have "
                    f"only {most} tensors. Do config.json and the weights belong to the same model?"
                )


def _refuse_size(checkpoint: Checkpoint, kind: Any) -> None:  # noqa: ANN401
    """Refuse a config of a larger model than the files, whose weights would be made up."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        checkpoint.id, local_files_only=True, trust_remote_code=False
    )
    with torch.device("meta"):  # shapes without memory
        numel = sum(weight.numel() for weight in kind.from_config(config).parameters())
    if numel > _MOST_LARGER * checkpoint.numel:
        raise ModelLoadError(
            f"The config of '{checkpoint.id}' describes a model of {numel:.3g} parameters, and its "
            f"files have {checkpoint.numel:.3g}. Do config.json and the weights belong to the same "
            f"model?"
        )


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    if checkpoint.weights.has_adapter:
        raise ModelLoadError(
            f"'{checkpoint.id}' contains both weights and a PEFT adapter (adapter_config.json), "
            f"which transformers would apply and a merge would not. Merge it into the weights "
            f"(merge_and_unload) or delete it."
        )


def _takes_images(checkpoint: Checkpoint) -> bool:
    """Whether a model has a class for images and text, or a processor for images."""
    model_type = str(checkpoint.config.get("model_type"))
    return _has_images(model_type) or processes_images(model_type)


def _has_images(model_type: str) -> bool:
    """Whether transformers has a class for images and text for a model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _load_weights(checkpoint: Checkpoint, place: Placement) -> Any:  # noqa: ANN401
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        GenerationConfig,
    )

    has_images = _has_images(str(checkpoint.config.get("model_type")))
    kind = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    with explained(partial(_explain, checkpoint.id)):
        _refuse_size(checkpoint, kind)
        how = {
            **place.options(),
            "local_files_only": True,
            "use_safetensors": True,
            "generation_config": GenerationConfig(),  # otherwise read from the folder
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # they raise an error below
        }
        if checkpoint.dequantised:
            model, notes = _from_floats(checkpoint, kind, **how)
        else:
            model, notes = kind.from_pretrained(checkpoint.id, trust_remote_code=False, **how)
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


def _explain(source: str, error: Exception) -> IPMergeError:
    """Describe an error while weights are loaded."""
    if isinstance(error, CancelledError):
        return RunCancelled("Stopped while the model was loading.")
    if type(error).__name__ == "OutOfMemoryError":
        return ModelLoadError(
            f"There is too little memory to load '{source}'. Close other programs, choose a lower "
            f"precision or another device, or use a smaller model."
        )
    return explain_loading(source, "model", error)


def _from_floats(checkpoint: Checkpoint, kind: Any, **how: Any) -> Any:  # noqa: ANN401
    """Load fp8 weights as the floats that are merged, on any device.

    Transformers itself would run them in fp8 on some GPUs, and needs further libraries for others.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(**checkpoint.config)
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    model_class = kind._model_mapping[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=weights, **how)


def _generation_config(checkpoint: Checkpoint, tokenizer: SpecialIds) -> Any:  # noqa: ANN401
    """Return generation settings that keep nothing of the model's but the special tokens.

    generation_config.json has precedence over the config and the tokenizer. Other settings in it,
    such as beams, stop strings or several answers, would change what is generated or fail.
    """
    from transformers import GenerationConfig

    from ipmerge_core.models.decoders import text_config
    from ipmerge_core.models.weight_files import read_json

    name = "generation_config.json"
    stored = read_json(checkpoint.files, name) if name in checkpoint.files.names() else {}
    config = text_config(checkpoint)

    def find(token: str, otherwise: int | None) -> list[int]:
        for source in (stored, config):
            if source.get(token) is not None:
                return _token_ids(checkpoint, token, source[token])
        return [] if otherwise is None else [otherwise]

    eos = find("eos_token_id", tokenizer.eos)
    pad = find("pad_token_id", tokenizer.pad) or eos or [0]
    return GenerationConfig(eos_token_id=eos or None, pad_token_id=pad[0])


def _token_ids(checkpoint: Checkpoint, token: str, value: object) -> list[int]:
    """Check one id or a list of ids. Raises: ModelLoadError."""
    ids: list[Any] = value if isinstance(value, list) and value else [value]
    if not all(type(number) is int and -1 <= number < 2**31 for number in ids):
        raise ModelLoadError(
            f"The {token} of '{checkpoint.id}' is {str(value)[:80]}; expected the id of a token or "
            f"a list of ids. Correct generation_config.json or config.json."
        )
    return [number for number in ids if number >= 0]  # -1 is a convention for none
