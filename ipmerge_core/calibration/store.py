"""Store and read the measurements of a calibration, one per decoder matrix and model.

In: a folder written by `calibrate`: `calibration.json` and safetensors files. Out: the inputs of a
data-aware merge method for one matrix at a time (`mllm_gram=...`, `math_gram=[...]`), so that
memory does not grow with the model. Matrices with the same input (q, k, v; gate, up) share one Gram
matrix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ipmerge_core.analysis.records import Source
from ipmerge_core.errors import CheckpointError, PairingError
from ipmerge_core.models.checkpoint import count_non_finite
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.input_files import (
    CLOSED,
    MEGABYTE,
    Count,
    FileKind,
    FileName,
    InvalidContentError,
    Location,
    Magnitude,
    Name,
    Number,
    Schema,
    versioned,
)
from ipmerge_core.runtime.paths import expand_path

Kind: TypeAlias = Literal["gram", "fisher"]
RECORD = "calibration.json"
_FORMAT, _VERSION = "ipmerge-calibration", 1
CALIBRATION = FileKind(
    "a calibration",
    "Create it again with `ipmerge calibrate`.",
    CheckpointError,
    largest=64 * MEGABYTE,
)
_KINDS = {"gram": "Gram matrices", "fisher": "Fisher information"}


class Identified(Protocol):
    """A model with an id and a fingerprint: a checkpoint, or a source in a plan."""

    @property
    def id(self) -> str:
        """Folder or hub id of the model."""

    @property
    def fingerprint(self) -> str:
        """Hash of the weights."""

    @property
    def content(self) -> str | None:
        """Hash of more of the weights; None if unknown."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one model: its weights, numbers of samples and tokens, and files.

    `places` maps every decoder matrix to a file and a stored name, `norm` is the Frobenius norm of
    all measurements, `mean` their mean; None if an older version did not record it. `source` is
    where the samples were read from, `samples_digest` identifies their content; both are empty if
    an older version did not record them.
    """

    __pydantic_config__ = CLOSED

    role: Name
    id: Location
    fingerprint: Name
    samples: Count
    tokens: Count
    norm: Magnitude
    places: dict[Name, tuple[FileName, Name]]
    mean: Number | None = None
    source: str = ""
    samples_digest: Name = ""
    content: Name | None = None  # see `Source.content`


@dataclass(frozen=True)
class Measurements:
    """A finished calibration of an MLLM and its experts."""

    folder: Path
    kind: Kind
    settings: dict[str, Any]
    models: tuple[Measured, ...]  # the MLLM first, then the experts in order
    created: str = ""  # time in ISO format; empty if an older version did not record it
    _recent: dict[int, tuple[object, Tensor]] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> Measurements:
        """Read the metadata of a calibration, without its measurements.

        Raises: CheckpointError if there is none, or its version is not supported.
        """
        folder = expand_path(folder)
        record = folder / RECORD
        if not record.is_file():
            raise CheckpointError(
                f"'{folder}' contains no finished calibration: it has no {RECORD}. Create one with "
                f"`ipmerge calibrate`."
            )
        content = CALIBRATION.content(record)
        try:
            fields = versioned(content, _FORMAT, (_VERSION,))[1]
        except InvalidContentError as error:
            raise CALIBRATION.refusal(record, error) from error
        found = CALIBRATION.validate(_RECORD, fields, record)
        return cls(folder, found.kind, found.settings, found.models, found.created)

    def save(self) -> None:
        """Write the metadata, which marks the calibration as finished."""
        models = [asdict(model) for model in self.models]
        content: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": self.kind,
            "settings": self.settings,
            "models": models,
            "created": self.created,
        }
        write_whole(self.folder / RECORD, json.dumps(content, indent=1) + "\n")

    @property
    def digest(self) -> str:
        """SHA-256 of what was measured: the content of models and samples, settings and results.

        It does not depend on when and where: a copy of the folder, or a second run on the same
        samples and models, has the same digest. Metadata of older versions, which do not record the
        samples, are hashed as a whole.
        """
        data = (self.folder / RECORD).read_bytes()
        content = json.loads(data)
        if content.pop("created", None) is None:
            return hashlib.sha256(data).hexdigest()
        for model in content["models"]:
            del model["id"], model["source"]  # places; fingerprint and samples_digest identify them
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """Return a short label: date, number of samples and their sources.

        The date is in UTC. What an older version did not record is left out.
        """
        counts = " + ".join(str(model.samples) for model in self.models)
        sources = dict.fromkeys(_short(model.source) for model in self.models if model.source)
        words = [self.created[:16].replace("T", " "), f"{counts} samples", ", ".join(sources)]
        return " · ".join(filter(None, words))

    def check(self, models: Sequence[Identified], kind: Kind) -> None:
        """Check the kind of the calibration and that it was run on these models.

        Raises: PairingError if the kind or the weights differ.
        """
        if self.kind != kind:
            raise PairingError(
                f"'{self.folder}' contains {_KINDS[self.kind]}; the method requires "
                f"{_KINDS[kind]}. Calibrate again with --kind {kind}."
            )
        if len(self.models) != len(models):
            raise PairingError(
                f"'{self.folder}' is a calibration of {len(self.models) - 1} math models, but "
                f"{len(models) - 1} are merged. Calibrate these models together."
            )
        for measured, model in zip(self.models, models, strict=True):
            known = Source(measured.id, None, measured.fingerprint, measured.content)
            if known.differs_from(model.fingerprint, model.content):
                raise PairingError(
                    f"The weights of '{model.id}' have changed since the calibration "
                    f"'{self.folder}' (fingerprint {measured.fingerprint[:8]}, now "
                    f"{model.fingerprint[:8]}). Calibrate again."
                )

    def doubts(self, inputs: int) -> list[tuple[str, str]]:
        """Return warnings and remedies if there are fewer tokens than inputs of a matrix.

        A Gram matrix of n inputs from fewer than n tokens is singular; RegMean then depends on the
        jitter and on the mean of the models.
        """
        few = [model for model in self.models if model.tokens < inputs]
        if self.kind != "gram" or not few:
            return []
        counted = ", ".join(f"{model.tokens} of {model.role}" for model in few)
        return [
            (
                f"There are fewer tokens ({counted}) than the widest matrix has inputs ({inputs}).",
                "Calibrate on more samples, ideally with several times as many tokens as inputs.",
            )
        ]

    def inputs(
        self, name: str, experts: Sequence[int], device: torch.device | None = None
    ) -> dict[str, Any]:
        """Read the measurements of one matrix for these experts, as keywords of a method.

        Matrices that share a measurement get the same tensor one after another, so that it is read,
        and whatever is computed from it, once.

        Raises: CheckpointError if the matrix was not measured or a file is damaged.
        """
        return {
            f"mllm_{self.kind}": self._shared(0, name, device),
            f"math_{self.kind}": [self._shared(1 + k, name, device) for k in experts],
        }

    def _shared(self, number: int, name: str, device: torch.device | None) -> Tensor:
        """Read a measurement, or return the last one of the model if several matrices share it."""
        model = self.models[number]
        place = model.places.get(name)
        key = place, device
        known = self._recent.get(number)
        if known is not None and known[0] == key:
            return known[1]
        found = self._read(model, name).to(device)
        if sum(other == place for other in model.places.values()) > 1:  # others are read once
            self._recent[number] = key, found
        return found

    def statistic(self, numbers: Sequence[Literal["norm", "mean"]]) -> tuple[float, ...]:
        """Return the requested statistics of every model: the first for all models, then the next.

        Raises: CheckpointError if a mean was not recorded and a file is damaged.
        """
        return tuple(
            model.norm if number == "norm" else self._mean(model)
            for number in numbers
            for model in self.models
        )

    def _mean(self, model: Measured) -> float:
        """Return the mean of a model's measurements; computed from the files if not recorded."""
        if model.mean is not None:
            return model.mean
        total, size = 0.0, 0
        for name in {place: name for name, place in model.places.items()}.values():
            matrix = self._read(model, name)
            total += float(matrix.sum(dtype=torch.float64))
            size += matrix.numel()
        return total / max(1, size)

    def _read(self, model: Measured, name: str) -> Tensor:
        if name not in model.places:
            raise CheckpointError(
                f"The calibration '{self.folder}' has no measurement of '{name}' of the "
                f"{model.role} model. Calibrate again with all matrices."
            )
        file, stored = model.places[name]
        try:
            with safe_open(self.folder / file, framework="pt") as content:
                tensor: Tensor = content.get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Cannot read '{stored}' from '{self.folder / file}' ({error}). The file is "
                f"missing or damaged; calibrate again."
            ) from error
        if not tensor.is_floating_point() or count_non_finite(tensor):
            raise CheckpointError(
                f"'{stored}' in '{self.folder / file}' has dtype {tensor.dtype} and "
                f"{count_non_finite(tensor)} NaN or infinite values; expected finite numbers. "
                f"The file is damaged; calibrate again."
            )
        return tensor


@dataclass(frozen=True)
class _Record:
    """Contents of `calibration.json` after its format."""

    __pydantic_config__ = CLOSED

    kind: Kind
    settings: dict[str, Any]
    models: Annotated[tuple[Measured, ...], Field(min_length=2)]
    created: str = ""


_RECORD = Schema[_Record](_Record)


def find_finished(folder: Path, models: Sequence[Identified], kind: Kind) -> list[Path]:
    """List the calibrations below a folder that are of this kind and of these models' weights."""
    found = []
    for record in sorted(folder.glob(f"*/{RECORD}")):
        try:
            Measurements.open(record.parent).check(models, kind)
        except (CheckpointError, PairingError):
            continue
        found.append(record.parent)
    return found


def _short(source: str) -> str:
    """Return the last part of a path; other sources unchanged.

    >>> _short("data/samples.jsonl"), _short("datasets:org/name"), _short("demo:math")
    ('samples.jsonl', 'datasets:org/name', 'demo:math')
    """
    return source if source.startswith("datasets:") else Path(source).name
