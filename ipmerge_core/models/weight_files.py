"""Select the weight files of a model folder, in the order that transformers uses.

In: the file names of a folder and its config. Out: `WeightFiles`: the shards to read, their index,
and the ignored files. The order is that of `from_pretrained` (transformers 5): the file named in
the config, `model.safetensors`, `model.safetensors.index.json`, then pickle files, which are
rejected here. A folder from which transformers would load an unsupported file is rejected, so that
the analysed or merged weights are always those that transformers loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from ipmerge_core.errors import CheckpointError, MissingTensorError
from ipmerge_core.models.files import Files, LocalFiles
from ipmerge_core.runtime.input_files import (
    MEGABYTE,
    InvalidContentError,
    Name,
    Schema,
    parse_json,
)

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SAFETENSORS = ".safetensors"
_FORMATS = (_SAFETENSORS, *_PICKLES, ".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot")
_AN_INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack)\.index(\.[^.]+)?\.json$")
_A_SHARD = re.compile(r"-\d+-of-0*(?!1\b)\d+\.")  # one of several shards
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_VARIANT = re.compile(
    r"model(-\d+-of-\d+)?\.[^.]+\.safetensors|model\.safetensors\.index\.[^.]+\.json"
)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_OTHER_LAYOUTS = ("adapter_model", "consolidated")  # PEFT adapters; Mistral's additional copy
# The state of a training run, which belongs to no model.
_TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states)[^/]*"
    r"\.(bin|pt|pth|pkl)|trainer_state\.json|trainer_log\.jsonl|latest"
)
_NAMED_BY_CONFIG = "transformers_weights"  # a key of config.json
_LARGEST_JSON = 64 * MEGABYTE  # of a config or an index: 100 bytes per tensor
T = TypeVar("T")


@dataclass(frozen=True)
class _Index:
    """Contents of an index; other programs add fields of their own."""

    weight_map: Annotated[dict[Name, Name], Field(min_length=1)]


_OBJECT, _INDEX = Schema[dict[str, Any]](dict[str, Any]), Schema[_Index](_Index)


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model.

    Attributes:
        shards: the safetensors files to read, sorted.
        index: the index that lists them, if any.
        weight_map: the shard of each tensor, according to the index.
        unused: other safetensors files and indexes in the folder, which are not loaded by
            default; well-known second copies (variants, `consolidated`, adapters) are not listed.
        has_adapter: whether the folder also contains a PEFT adapter.
        renamed: whether the only shard has a non-standard name, under which it is not loaded.
    """

    shards: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    has_adapter: bool = False
    renamed: bool = False

    def saved_as(self, shard: str) -> str:
        """Return the name of a shard's copy in a merged model, under which it is loaded."""
        return WEIGHTS if self.renamed else shard

    def is_copied(self, name: str) -> bool:
        """Return whether a file of this name is copied unchanged into a merged model.

        Weights are written tensor by tensor. Other weight files, their indexes and adapters are
        not copied, since they could be loaded instead of or on top of the merged weights, nor is
        the state of a training run.
        """
        return name == self.index or not (
            name.endswith(_FORMATS)
            or _AN_INDEX.search(name)
            or _TRAINING_STATE.fullmatch(name)
            or name == ADAPTER_CONFIG
        )

    def check_index(self, model: str, placed: Mapping[str, str]) -> None:
        """Check that each tensor is in the shard given by the index.

        Raises: MissingTensorError for the first tensor that is not.
        """
        for name, shard in self.weight_map.items():
            if placed.get(name) != shard:
                where = f"it is in '{placed[name]}'" if name in placed else "it is in no shard"
                raise MissingTensorError(
                    f"According to the index of '{model}', '{name}' is in '{shard}', but {where}."
                )


def find_weights(files: Files, config: Mapping[str, Any]) -> WeightFiles:
    """Select the weight files of a model folder as transformers does.

    Raises:
        CheckpointError: the folder has no supported weights, or transformers would load other
            files; the message names both.
        MissingTensorError: the index or the config names a missing file.
    """
    names = files.names()
    _refuse_distributed(files, names)
    chosen = config.get(_NAMED_BY_CONFIG)
    if chosen is not None:
        found = _named_by_config(files, names, chosen)
    elif WEIGHTS in names:
        found = WeightFiles((WEIGHTS,))
    elif INDEX in names:
        found = _indexed(files, names, INDEX)
    else:
        found = _of_another_name(files, names)
    read = {*found.shards, found.index}
    return WeightFiles(
        found.shards,
        found.index,
        found.weight_map,
        unused=tuple(name for name in names if name not in read and _is_other_set(name)),
        has_adapter=ADAPTER_CONFIG in names,
        renamed=found.renamed,
    )


def is_adapter(names: Sequence[str]) -> bool:
    """Whether a folder holds a PEFT adapter and no full weights."""
    full = (
        name
        for name in names
        if name.endswith(_SAFETENSORS) or name in (INDEX, *_PICKLED)
        if not name.startswith(_OTHER_LAYOUTS)
    )
    return ADAPTER_CONFIG in names and not any(full)


def adapter_weights(files: Files) -> WeightFiles:
    """Select the weight file of an adapter. Raises: CheckpointError if it has none."""
    names = files.names()
    if ADAPTER_WEIGHTS in names:
        return WeightFiles((ADAPTER_WEIGHTS,))
    pickled = next((name for name in names if name.endswith(_PICKLES)), None)
    if pickled is not None:
        raise CheckpointError(
            f"The adapter '{files.id}' has its weights only as pickle ('{pickled}'), which can "
            f"execute code. If you trust it, load it with PEFT and save it with save_pretrained."
        )
    raise CheckpointError(
        f"The adapter '{files.id}' has no '{ADAPTER_WEIGHTS}'. Was the download complete?"
    )


def read_json(files: Files, name: str) -> dict[str, Any]:
    """Read a JSON object from a model folder. Raises: CheckpointError."""
    if name not in files.names():
        raise CheckpointError(
            f"'{files.id}' has no {name}. Expected a model folder in the transformers layout."
            f"{_hint(files.names()) or _models_inside(files)}"
        )
    return _parsed(files, name, _OBJECT, foreign=True)


def _parsed(files: Files, name: str, schema: Schema[T], *, foreign: bool = False) -> T:
    """Read and validate a JSON file of a model folder. Raises: CheckpointError."""
    try:
        if files.size(name) > _LARGEST_JSON:
            raise InvalidContentError(
                f"it has {files.size(name)} bytes; the maximum is {_LARGEST_JSON}"
            )
        content = parse_json(files.read(name), _LARGEST_JSON, foreign=foreign)
        return schema.validate(content)
    except InvalidContentError as error:
        raise CheckpointError(
            f"'{name}' of '{files.id}' is damaged: {error}. Download or save it again."
        ) from error


def _refuse_distributed(files: Files, names: Sequence[str]) -> None:
    parts = [name for name in names if _DISTRIBUTED.fullmatch(name)]
    if parts:
        raise CheckpointError(
            f"'{files.id}' contains a distributed checkpoint ('{parts[0]}' and {len(parts) - 1} "
            f"more files), which transformers loads in preference to other weights. Load it with "
            f"transformers and save it with save_pretrained into a new folder."
        )


def _named_by_config(files: Files, names: Sequence[str], chosen: object) -> WeightFiles:
    """Use the file named in the config, as transformers does with the highest priority."""
    allowed = isinstance(chosen, str) and chosen.endswith((_SAFETENSORS, ".safetensors.index.json"))
    if not isinstance(chosen, str) or not allowed or not _is_bare(chosen):
        raise CheckpointError(
            f"The config of '{files.id}' names {chosen!r} as its weights ({_NAMED_BY_CONFIG}). "
            f"Expected a safetensors file or index in the same folder."
        )
    if chosen not in names:
        raise MissingTensorError(
            f"'{files.id}' lacks '{chosen}', which its config names as its weights "
            f"({_NAMED_BY_CONFIG}). Was the download complete?"
        )
    return (
        WeightFiles((chosen,)) if chosen.endswith(_SAFETENSORS) else _indexed(files, names, chosen)
    )


def _indexed(files: Files, names: Sequence[str], index: str) -> WeightFiles:
    weight_map = _parsed(files, index, _INDEX).weight_map
    for shard in sorted(set(weight_map.values())):
        if not _is_bare(shard):
            raise CheckpointError(
                f"'{index}' of '{files.id}' names the shard {shard!r}; "
                f"only bare file names are allowed."
            )
        if shard not in names:
            raise MissingTensorError(
                f"'{files.id}' lacks the shard '{shard}' that its index names. "
                f"Was the download complete?"
            )
    return WeightFiles(tuple(sorted(set(weight_map.values()))), index, weight_map)


def _of_another_name(files: Files, names: Sequence[str]) -> WeightFiles:
    """Use the only safetensors file of a folder in which transformers would find no weights."""
    found = [
        name
        for name in names
        if name.endswith(_SAFETENSORS) and not name.startswith(_OTHER_LAYOUTS)
    ]
    pickled = next((name for name in _PICKLED if name in names), None)
    if len(found) == 1 and pickled is None and not _A_SHARD.search(found[0]):
        return WeightFiles((found[0],), renamed=True)
    raise CheckpointError(_why_none(files, names, found, pickled))


def _why_none(files: Files, names: Sequence[str], found: Sequence[str], pickled: str | None) -> str:
    """Explain why none of the files can be used as the weights, and how to fix it."""
    variants = [name for name in names if _AN_INDEX.search(name) and _VARIANT.fullmatch(name)]
    layouts = [name for name in names if name.startswith(_OTHER_LAYOUTS[1])]
    pickles = [
        name for name in names if name.endswith(_PICKLES) and not _TRAINING_STATE.fullmatch(name)
    ]
    if found and pickled is not None:
        return (
            f"'{files.id}' contains '{pickled}' and '{found[0]}', and transformers loads the "
            f"first, a pickle file, which can run code. Remove it if '{found[0]}' is the model; "
            f"otherwise, if you trust it, load the folder with transformers and save it with "
            f"save_pretrained."
        )
    if variants:
        return (
            f"'{files.id}' has its weights only as a variant ('{variants[0]}'), which transformers "
            f"does not load by default. Load it with variant=... and save it with save_pretrained."
        )
    if found:
        return (
            f"'{files.id}' has {len(found)} safetensors file{'s' * (len(found) > 1)} and no "
            f"{INDEX} that lists those of the model. Add the index."
        )
    if pickles and not layouts:
        return (
            f"'{files.id}' has its weights only as pickle ('{pickles[0]}'), which can execute "
            f"code. Convert it to safetensors first (if you trust it, load it with transformers "
            f"and save it with save_pretrained)."
        )
    if layouts:
        return (
            f"'{files.id}' has its weights only in a layout other than that of transformers "
            f"('{layouts[0]}'). Use the model in the transformers layout ({WEIGHTS} or {INDEX})."
        )
    return f"'{files.id}' has no safetensors weights ({WEIGHTS} or {INDEX}).{_hint(names)}"


def _hint(names: Sequence[str]) -> str:
    """Name weights in a layout that is not read, and what to use instead."""
    if is_adapter(names):
        return (
            " It is a PEFT adapter: where full weights are required, merge it into its base first "
            "(merge_and_unload)."
        )
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        return (
            f" '{gguf}' is a GGUF file, which is usually quantised: use the safetensors weights "
            f"that it was converted from."
        )
    own = next((name for name in names if name.startswith(_OTHER_LAYOUTS[1])), None)
    if own is None:
        return ""
    return (
        f" '{own}' is in Mistral's own layout: use the release in the transformers layout "
        f"(config.json with {WEIGHTS} or {INDEX})."
    )


def _models_inside(files: Files) -> str:
    """Name a model in a subfolder, such as those of a training run or of the hub cache."""
    if not isinstance(files, LocalFiles):
        return ""
    found = [
        path.parent
        for depth in ("*", "snapshots/*")
        for name in (CONFIG, ADAPTER_CONFIG)
        for path in files.folder.glob(f"{depth}/{name}")
    ]
    if not found:
        return ""
    newest = max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    count = f"{len(found)} model folder{'s' * (len(found) > 1)}"
    return f" It contains {count}: give one of them, such as the last written, '{newest}'."


def _is_bare(name: str) -> bool:
    return Path(name).name == name and "\\" not in name


def _is_other_set(name: str) -> bool:
    """Return whether a file belongs to another set of safetensors weights of the folder."""
    belongs = name.endswith(_SAFETENSORS) or bool(_AN_INDEX.search(name) and _SAFETENSORS in name)
    return belongs and not name.startswith(_OTHER_LAYOUTS) and not _VARIANT.fullmatch(name)
