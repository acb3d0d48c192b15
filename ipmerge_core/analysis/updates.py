"""Keep IP-Merging's updates on disk, so that no later merge or chat decomposes again.

In: the update of every matrix and expert as factors, for lambda = 1. Out: a folder with one
safetensors file per matrix, found by the content of the models and the variant of the method. The
factors are exactly those that a merge computes: they depend on neither the threshold nor
lambda, overrides or layer gains, which only select and scale them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ipmerge_core.errors import RunError, first_line
from ipmerge_core.models.pairing import ModelPair
from ipmerge_core.runtime.atomic import atomic_path, writing
from ipmerge_core.spectral.kinds import Anchor
from ipmerge_core.spectral.similarity import Update
from ipmerge_core.version import __version__

_VERSION = 1
_THIN = ("softmax", "top_k")  # projectors on few directions, which need no measurements
SMALL = 4 << 20  # bytes; the factors of one matrix are always kept up to this size
_LARGEST_SHARE = 4  # kept are at most min(m, n) / 4 directions of a larger matrix


class Variant(NamedTuple):
    """The parameters of IP-Merging that its updates depend on."""

    temperature: float
    gamma_norm: str
    projector: str
    top_k: int
    rank: int | None
    directions: str
    math_energy: float = 1.0
    anchor: Anchor = "two_base"

    @classmethod
    def of(cls, parameters: Mapping[str, Any], anchor: Anchor = "two_base") -> Variant:
        """Take the variant from the parameters of a plan."""
        return cls(**{name: parameters[name] for name in cls._fields[:-1]}, anchor=anchor)


def has_updates(method: str, parameters: Mapping[str, Any]) -> bool:
    """Return whether a plan's change is IP-Merging's projected update, which is of low rank.

    Other projectors, such as a complement, change a matrix in all of its directions.
    """
    projects = parameters.get("ablation") == "none" and parameters.get("projector") in _THIN
    return method == "ip_merging" and projects


class KeptSize(NamedTuple):
    """How many matrices have kept updates, and their bytes."""

    matrices: int
    nbytes: int


class UpdateStore:
    """The kept updates of one pair, variant and type of device, in a folder of their own.

    Safe for several threads and processes: a file is complete or absent.
    """

    def __init__(
        self, folder: Path, pair: ModelPair, variant: Variant, device: str | torch.device = "cpu"
    ) -> None:
        self.variant = variant
        self.identity = _identity(pair, variant, torch.device(device).type)
        self.folder = folder / self.identity[:32]
        self._places = {matrix.name: n for n, matrix in enumerate(pair.matrices)}
        self._shapes = {matrix.name: matrix.shape for matrix in pair.matrices}

    def holds(self, name: str) -> bool:
        """Return whether the updates of a matrix are kept, or are known to be too large."""
        return self._path(name).is_file()

    def read(self, name: str, experts: Sequence[int]) -> tuple[Update, ...] | None:
        """Return the updates of a matrix, one per given expert; None if they are not kept.

        Raises: RunError for a file that is damaged.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                names = set(file.keys())
                wanted = [(f"{k}.left", f"{k}.right") for k in experts]
                if not names.issuperset(part for pair in wanted for part in pair):
                    return None
                found = tuple(
                    Update(file.get_tensor(left), file.get_tensor(right)) for left, right in wanted
                )
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"The kept updates in '{path}' cannot be read ({first_line(error)}). Delete the "
                f"folder; they are computed again."
            ) from error
        self._check(path, name, found)
        return found

    def write(self, name: str, updates: Sequence[Update]) -> bool:
        """Keep the updates of a matrix, one per expert; returns False if they are too large.

        A matrix whose directions are all weighted alike has factors larger than itself: an empty
        file marks it. Raises: RunError if the folder cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for k, update in enumerate(updates):
            assert update.gain == 1.0, "kept updates are those for lambda = 1"
            tensors[f"{k}.left"] = update.left.cpu().contiguous()
            tensors[f"{k}.right"] = update.right.cpu().contiguous()
        fits = self._fits(name, updates)
        with writing(self.folder, "updates written before are kept"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._path(name)) as partial:
                save_file(tensors if fits else {}, partial, metadata={"matrix": name})
        return fits

    def size(self) -> KeptSize:
        """Count the matrices with kept updates and their bytes."""
        paths = [self._path(name) for name in self._places]
        sizes = [path.stat().st_size for path in paths if path.is_file()]
        return KeptSize(len(sizes), sum(sizes))

    def _fits(self, name: str, updates: Sequence[Update]) -> bool:
        m, n = self._shapes[name]
        most = max((len(update.right) for update in updates), default=0)
        return 4 * (m + n) * most <= SMALL or most <= min(m, n) // _LARGEST_SHARE

    def _check(self, path: Path, name: str, found: Sequence[Update]) -> None:
        m, n = self._shapes[name]
        for update in found:
            if update.left.shape != (m, len(update.right)) or update.right.shape[1:] != (n,):
                raise RunError(
                    f"The kept updates in '{path}' have the shapes {tuple(update.left.shape)} and "
                    f"{tuple(update.right.shape)}; expected ({m}, r) and (r, {n}). Delete the "
                    f"folder; they are computed again."
                )

    def _path(self, name: str) -> Path:
        return self.folder / f"{self._places[name]:05d}.safetensors"


def _identity(pair: ModelPair, variant: Variant, device: str) -> str:
    """Return the SHA-256 of everything that determines the updates exactly."""
    fingerprints = [[model.fingerprint, model.content] for _, model in pair.roles()]
    names = [[matrix.name, *matrix.shape] for matrix in pair.matrices]
    content = json.dumps([_VERSION, __version__, list(variant), device, fingerprints, names])
    return hashlib.sha256(content.encode()).hexdigest()
