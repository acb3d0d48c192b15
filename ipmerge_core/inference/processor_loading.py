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
    True: "pip install torchvision torch=={} --index-url https://download.pytorch.org/whl/cpu",
    False: "pip install torchvision torch=={}",
}  # by whether torch is a CPU build, which pip does not pair with a torchvision by itself


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
    torchvision = find_torchvision()
    try:
        return _load(folder)
    except ImportError as error:
        if _is_of_torchvision(error):
            raise _without_torchvision(folder.name) from error
        raise ModelLoadError(
            f"The processor of '{folder.name}' requires a library that is not installed "
            f"({first_line(error)}). Install it; analysing and merging the model do not require it."
        ) from error
    except ValueError as error:  # of an image processor that has no class without torchvision
        if torchvision.works or not _is_of_torchvision(error):
            raise
        raise _without_torchvision(folder.name) from error


def name_image_processor(processor: Any) -> str | None:  # noqa: ANN401
    """Return the class of the image processor and its library, None for a tokenizer.

    Pillow and torchvision resize with slightly different pixels, so that it belongs to an answer.
    Example: `Qwen2VLImageProcessorPil (pil)`.
    """
    part = getattr(processor, "image_processor", None)
    if part is None:
        return None
    return f"{type(part).__name__} ({getattr(part, 'backend', 'pil')})"


def read_picture_settings(folder: str | Path) -> dict[str, Any]:
    """Return the stored settings of the image processor in a folder; empty if there are none."""
    for name in (_PROCESSOR_FILE, "preprocessor_config.json"):
        found = _read(Path(folder) / name)
        part = found.get("image_processor")
        if isinstance(part, dict):
            return part
        if "image_processor_type" in found:
            return found
    return {}


def processes_images(model_type: str) -> bool:
    """Whether transformers has a processor class with an image part for a model type."""
    from transformers.models.auto.processing_auto import (
        PROCESSOR_MAPPING_NAMES,
        processor_class_from_name,
    )

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    try:
        return name is not None and "image_processor" in _parts(processor_class_from_name(name))
    except ImportError:  # a class for audio requires further libraries
        return False


def _load(folder: Path) -> Any:  # noqa: ANN401
    from transformers import AutoProcessor

    kind = _processor_class(folder)
    parts = _parts(kind)
    if parts and "image_processor" not in parts:
        raise ModelLoadError(
            f"The processor of '{folder.name}' ({kind.__name__}) has no image processor: its parts "
            f"are {', '.join(parts)}. The chat supports text and images only."
        )
    if _VIDEO_PART in parts and not find_torchvision().works:
        return _load_parts(kind, folder)
    processor = AutoProcessor.from_pretrained(str(folder), **_OFFLINE)
    if not hasattr(processor, "image_processor"):
        raise ModelLoadError(
            f"transformers finds no processor in '{folder.name}', only its "
            f"{type(processor).__name__}. Is preprocessor_config.json missing from the folder?"
        )
    return processor


def _processor_class(folder: Path) -> Any:  # noqa: ANN401
    """Return the processor class that the files name, or that of the model type, if it has one.

    Raises: ModelLoadError for the name of another class, which transformers would load as well.
    """
    import transformers
    from transformers import PROCESSOR_MAPPING, AutoConfig
    from transformers.models.auto.processing_auto import processor_class_from_name

    names = [_read(folder / file).get("processor_class") for file in _NAMING_FILES]
    named = next((name for name in names if name is not None), None)
    if named is None:
        config = AutoConfig.from_pretrained(str(folder), **_OFFLINE)
        return PROCESSOR_MAPPING.get(type(config), None)
    found = processor_class_from_name(named) if isinstance(named, str) else None
    if not _parts(found):
        raise ModelLoadError(
            f"The processor_class in the files of '{folder.name}' is {named!r}, which is not a "
            f"processor of transformers {transformers.__version__}. Correct {_PROCESSOR_FILE}, or "
            f"install a version with this class."
        )
    return found


def _parts(kind: Any) -> list[str]:  # noqa: ANN401
    """List the parts of a processor class, in the order of its arguments; none of another class.

    Raises: ImportError if the class requires a library that is not installed.
    """
    return list(kind.get_attributes()) if hasattr(kind, "get_attributes") else []


def _load_parts(kind: Any, folder: Path) -> Any:  # noqa: ANN401
    """Build a processor from its parts, all but the video processor as transformers loads them.

    The class is a subclass that accepts the `VideoSettings`; nothing of transformers changes.
    """
    own = {"check_argument_for_proper_class": lambda _self, _name, argument: type(argument)}
    accepting: Any = type(kind.__name__, (kind,), own)
    settings, _ = kind.get_processor_dict(str(folder), **_OFFLINE)
    parts = [_load_part(name, folder) for name in _parts(kind)]
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


def _is_of_torchvision(error: Exception) -> bool:
    return "torchvision" in str(error).lower()


def _without_torchvision(name: str) -> ModelLoadError:
    """Describe how to install the torchvision that the image processor of a model requires."""
    import torch

    version, _, build = torch.__version__.partition("+")
    install = _INSTALL[build == "cpu"].format(version)
    found = "is not installed"
    if failure := find_torchvision().failure:
        found = f"cannot be imported ({failure})"
        install = f"pip uninstall torchvision, then {install}"
    return ModelLoadError(
        f"The image processor of '{name}' requires torchvision, which {found}. Install the build "
        f"for this torch: {install}. Analysing and merging the model do not require it."
    )
