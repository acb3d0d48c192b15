"""Load the processor of a vision-language model, with or without torchvision.

In: a model folder. Out: a processor of transformers that encodes text and images. The image
processors of most families exist for Pillow and for torchvision, the video processors for
torchvision only. Where torchvision is missing, a processor is built from its parts, with
`VideoSettings` in place of the video processor. Which families need that follows from the classes
and the files, not from a list of models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ipmerge_core.errors import ModelLoadError, first_line
from ipmerge_core.runtime.imports import find_torchvision
from ipmerge_core.runtime.input_files import FileKind, Schema

_PROCESSOR_FILE, _VIDEO_FILE = "processor_config.json", "video_preprocessor_config.json"
# The files that can name the class of a processor, in the order in which transformers reads them.
_NAMING_FILES = (_PROCESSOR_FILE, "preprocessor_config.json", _VIDEO_FILE, "tokenizer_config.json")
_VIDEO_PART = "video_processor"
_SETTINGS = FileKind(
    "a processor or tokenizer configuration",
    "Download the file again.",
    ModelLoadError,
    largest=1 << 24,  # bytes; tokenizer_config.json lists every added token
    foreign=True,
)
_OBJECT: Schema[dict[str, Any]] = Schema(dict[str, Any])
_OFFLINE = {"local_files_only": True, "trust_remote_code": False}
_INSTALL = {
    True: "pip install torchvision --index-url https://download.pytorch.org/whl/cpu",
    False: "pip install -r requirements-torchvision.txt",
}


class VideoSettings(dict[str, Any]):
    """The settings of a video processor, for processors that read them without encoding a video.

    A dictionary, as transformers writes processors as JSON. A missing setting is None.

    >>> settings = VideoSettings({"merge_size": 2})
    >>> settings.merge_size, settings.slice_mode
    (2, None)
    """

    model_input_names = ()  # it adds no tensors to the inputs of the model

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (JSON values)
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name)


def load_processor(folder: str | Path) -> Any:  # noqa: ANN401 (transformers has no typed classes)
    """Load the processor of the vision-language model in a folder.

    Raises:
        ModelLoadError: the processor has no image part, or requires a library that is missing.
        Exception: any error of transformers for files that it cannot use.
    """
    folder = Path(folder)
    try:
        return _load(folder)
    except ImportError as error:
        raise _missing_library(folder.name, error) from error


def image_backend(processor: Any) -> str | None:  # noqa: ANN401
    """Return the image processor of a processor and its library; None for a tokenizer.

    Pillow and torchvision resize with slightly different pixels.
    Example: `Qwen2VLImageProcessorPil (pil)`.
    """
    part = getattr(processor, "image_processor", None)
    if part is None:
        return None
    return f"{type(part).__name__} ({getattr(part, 'backend', 'pil')})"


def _load(folder: Path) -> Any:  # noqa: ANN401
    from transformers import AutoProcessor

    torchvision = find_torchvision()
    kind = _processor_class(folder)
    parts = kind.get_attributes() if kind else ["image_processor"]
    if "image_processor" not in parts:
        raise ModelLoadError(
            f"The processor of '{folder.name}' ({kind.__name__}) encodes videos and no images. "
            f"The chat supports text and images only."
        )
    if _VIDEO_PART in parts and not torchvision.works:
        return _load_parts(kind, folder)
    processor = AutoProcessor.from_pretrained(str(folder), **_OFFLINE)
    if not hasattr(processor, "image_processor"):
        raise ModelLoadError(
            f"transformers finds no processor in '{folder.name}', only its "
            f"{type(processor).__name__}. Is preprocessor_config.json missing from the folder?"
        )
    return processor


def _processor_class(folder: Path) -> Any:  # noqa: ANN401
    """Return the processor class that the files or the model type name; None for another class."""
    from transformers import PROCESSOR_MAPPING, AutoConfig, ProcessorMixin
    from transformers.models.auto.processing_auto import processor_class_from_name

    for name in _NAMING_FILES:
        named = _read(folder / name).get("processor_class")
        if isinstance(named, str):
            found = processor_class_from_name(named)
            break
    else:
        config = AutoConfig.from_pretrained(str(folder), **_OFFLINE)
        found = PROCESSOR_MAPPING.get(type(config), None)
    is_processor = isinstance(found, type) and issubclass(found, ProcessorMixin)
    return found if is_processor else None


def _load_parts(kind: Any, folder: Path) -> Any:  # noqa: ANN401
    """Build a processor from its parts, all but the video processor as transformers loads them.

    The class is a subclass that accepts the `VideoSettings`; nothing of transformers changes.
    """
    own = {"check_argument_for_proper_class": lambda _self, _name, argument: type(argument)}
    accepting = type(kind.__name__, (kind,), own)
    settings, _ = kind.get_processor_dict(str(folder), **_OFFLINE)
    parts = [_load_part(name, folder) for name in kind.get_attributes()]
    return accepting.from_args_and_dict(parts, settings)


def _load_part(name: str, folder: Path) -> Any:  # noqa: ANN401
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    if name == _VIDEO_PART:
        stored = _read(folder / _PROCESSOR_FILE).get(_VIDEO_PART)
        return VideoSettings(stored if isinstance(stored, dict) else _read(folder / _VIDEO_FILE))
    if name == "image_processor":
        return AutoImageProcessor.from_pretrained(str(folder), **_OFFLINE)
    if name == "feature_extractor":
        return AutoFeatureExtractor.from_pretrained(str(folder), **_OFFLINE)
    inner = "" if name == "tokenizer" else name  # such as qformer_tokenizer
    return AutoTokenizer.from_pretrained(str(folder), subfolder=inner, **_OFFLINE)


def _read(path: Path) -> dict[str, Any]:
    """Read a configuration; an absent one is empty."""
    return _SETTINGS.load(_OBJECT, path) if path.is_file() else {}


def _missing_library(name: str, error: ImportError) -> ModelLoadError:
    """Describe a library that the processor of a model requires."""
    if "torchvision" not in str(error).lower():
        return ModelLoadError(
            f"The processor of '{name}' requires a library that is not installed "
            f"({first_line(error)}). Install it; analysing and merging the model do not require it."
        )
    import torch

    failure = find_torchvision().failure
    found = f"cannot be imported ({failure})" if failure else "is not installed"
    return ModelLoadError(
        f"The image processor of '{name}' requires torchvision, which {found}. Install the build "
        f"for torch {torch.__version__}: {_INSTALL['+cpu' in torch.__version__]} (analysing and "
        f"merging the model do not require it)."
    )
