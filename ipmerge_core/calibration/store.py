"""What a calibration measured, on disk: one number matrix per decoder matrix and model.

In: a folder that `calibration` wrote: `calibration.json` and safetensors files. Out: the inputs of
a data-aware merge method for one matrix at a time (`mllm_gram=...`, `math_gram=[...]`), so memory
does not grow with the model. Matrices that read one input (q, k, v; gate, up) share one Gram
matrix. Runs no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ipmerge_core.errors import CheckpointError, PairingError

Kind: TypeAlias = Literal["gram", "fisher"]
RECORD = "calibration.json"
_FORMAT, _VERSION = "ipmerge-calibration", 1
_WORDS = {"gram": "Gram matrices", "fisher": "Fisher information"}


class Identified(Protocol):
    """A model as far as it matters here: a checkpoint, or a source in a plan."""

    @property
    def id(self) -> str:
        """Folder or hub id."""

    @property
    def fingerprint(self) -> str:
        """Hash of its weights."""


@dataclass(frozen=True)
class Measured:
    """One model's share: which weights, on how many samples and tokens, in which files.

    `places` gives the file and the stored name for every decoder matrix, `norm` the Frobenius norm
    of all that was measured, `mean` its mean; None where an older version did not record it.
    """

    role: str
    id: str
    fingerprint: str
    samples: int
    tokens: int
    norm: float
    places: dict[str, tuple[str, str]]
    mean: float | None = None


@dataclass(frozen=True)
class Measurements:
    """A finished calibration of an MLLM and its experts."""

    folder: Path
    kind: Kind
    settings: dict[str, Any]
    models: tuple[Measured, ...]  # the MLLM first, then the experts in their order

    @classmethod
    def open(cls, folder: str | Path) -> Measurements:
        """Read the record of a calibration; no measurement is read yet.

        Raises: CheckpointError when there is none, or it is not of this version.
        """
        folder = Path(folder).expanduser()
        try:
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
            models = tuple(
                Measured(**{**entry, "places": _pairs(entry["places"])})
                for entry in content["models"]
            )
            return cls(folder, content["kind"], content["settings"], models)
        except OSError as error:
            raise CheckpointError(
                f"There is no finished calibration in '{folder}': cannot read {RECORD} "
                f"({error.strerror}). Make one with `ipmerge calibrate`."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"'{folder / RECORD}' is not a calibration of this version "
                f"({type(error).__name__}: {error}). Make it again with `ipmerge calibrate`."
            ) from error

    def save(self) -> None:
        """Write the record; the calibration counts as finished from then on."""
        models = [asdict(model) for model in self.models]
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": self.kind,
            "settings": self.settings,
            "models": models,
        }
        target = self.folder / RECORD
        part = target.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(target)

    @property
    def digest(self) -> str:
        """SHA-256 of the record: which models, which samples, which settings."""
        return hashlib.sha256((self.folder / RECORD).read_bytes()).hexdigest()

    def check(self, models: Sequence[Identified], kind: Kind) -> None:
        """Make sure that this is what was asked for, measured on these: the MLLM, the experts.

        Raises: PairingError when it is of another kind or of other weights.
        """
        if self.kind != kind:
            raise PairingError(
                f"'{self.folder}' holds {_WORDS[self.kind]}; the method needs {_WORDS[kind]}. "
                f"Calibrate again with --kind {kind}."
            )
        if len(self.models) != len(models):
            raise PairingError(
                f"'{self.folder}' was measured on {len(self.models) - 1} math models and "
                f"{len(models) - 1} are merged. Calibrate these models together."
            )
        for measured, model in zip(self.models, models, strict=True):
            if measured.fingerprint != model.fingerprint:
                raise PairingError(
                    f"'{self.folder}' was measured on other weights than '{model.id}' has now "
                    f"(fingerprint {measured.fingerprint[:8]}, now {model.fingerprint[:8]}). "
                    f"Calibrate again."
                )

    def doubts(self, inputs: int) -> list[tuple[str, str]]:
        """Say where there are fewer tokens than a matrix has inputs, and what to do.

        A Gram matrix of n inputs from fewer than n tokens is singular; RegMean then leans on the
        diagonal and on the mean of the models.
        """
        few = [model for model in self.models if model.tokens < inputs]
        if self.kind != "gram" or not few:
            return []
        counted = ", ".join(f"{model.tokens} of {model.role}" for model in few)
        return [
            (
                f"There are fewer tokens ({counted}) than the widest matrix has inputs ({inputs}).",
                "Calibrate on more samples; several times as many tokens are good.",
            )
        ]

    def inputs(
        self, name: str, experts: Sequence[int], device: torch.device | None = None
    ) -> dict[str, Any]:
        """Read what a method needs for one matrix, by keyword, for these experts.

        Raises: CheckpointError when the matrix was not measured or a file is damaged.
        """
        return {
            f"mllm_{self.kind}": self._read(self.models[0], name).to(device),
            f"math_{self.kind}": [self._read(self.models[1 + k], name).to(device) for k in experts],
        }

    def statistic(self, numbers: Sequence[Literal["norm", "mean"]]) -> tuple[float, ...]:
        """Return numbers of all that was measured: the first one of every model, then the next.

        Raises: CheckpointError when a mean was not recorded and a file is damaged.
        """
        return tuple(
            model.norm if number == "norm" else self._mean(model)
            for number in numbers
            for model in self.models
        )

    def _mean(self, model: Measured) -> float:
        """Return the mean of all that was measured of a model; read it all if nobody noted it."""
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
                f"The calibration '{self.folder}' holds nothing for '{name}' of the {model.role} "
                f"model. Calibrate again with all matrices."
            )
        file, stored = model.places[name]
        try:
            with safe_open(self.folder / file, framework="pt") as content:
                tensor: Tensor = content.get_tensor(stored)
                return tensor
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Cannot read '{stored}' from '{self.folder / file}' ({error}). The file is "
                f"missing or damaged; calibrate again."
            ) from error


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


def _pairs(places: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    return {name: (file, stored) for name, (file, stored) in places.items()}
