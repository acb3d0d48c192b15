"""The calibration that a plan uses: checked when the plan is made, and again before the merge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ipmerge_core.analysis.records import Sources
from ipmerge_core.calibration.store import Measurements
from ipmerge_core.errors import PlanError
from ipmerge_core.methods import MergeMethod
from ipmerge_core.methods.registry import DataKind
from ipmerge_core.runtime.input_files import CLOSED, Location, Name
from ipmerge_core.runtime.paths import resolve_path

_NEEDED = {"fisher": "the Fisher information", "gram": "the Gram matrices of the inputs"}


@dataclass(frozen=True)
class Calibrated:
    """A finished calibration: its folder, the hash of its metadata, and the samples per model."""

    __pydantic_config__ = CLOSED

    folder: Location
    digest: Name
    samples: tuple[Name, ...] = ()  # as text; empty in plans of older versions

    @classmethod
    def find(
        cls,
        method: MergeMethod,
        kind: DataKind | None,
        folder: str | Path | None,
        sources: Sources,
        reason: str = "",
    ) -> Calibrated | None:
        """Open the calibration of a kind in a folder for a method; None if it needs none.

        `reason` is the option that needs it, if the method itself does not.

        Raises:
            PlanError: the calibration is missing, or the method does not use one.
            CheckpointError, PairingError: it cannot be read, or is of other models.
        """
        if kind is None:
            if folder is not None:
                raise PlanError(
                    f"{method.label} with these parameters does not use calibration data; omit the "
                    f"calibration."
                )
            return None
        if folder is None:
            raise PlanError(
                f"{method.label}{reason} requires {_NEEDED[kind]} of every model. Run `ipmerge "
                f"calibrate --kind {kind}` (in the app: Calibrate in the Merge tab) and pass its "
                f"output folder as calibration, or choose a method that needs no calibration data."
            )
        found = Measurements.open(folder)
        found.check(sources.merged(), kind)
        counts = (f"{model.role}: {model.samples} samples" for model in found.models)
        return cls(str(resolve_path(folder)), found.digest, tuple(counts))

    def open(self) -> Measurements:
        """Open the measurements. Raises: PlanError if they have changed since the plan was made."""
        found = Measurements.open(self.folder)
        if found.digest != self.digest:
            raise PlanError(
                f"The calibration in '{found.folder}' has changed since the plan was made. Make a "
                f"new plan with it."
            )
        return found

    def describe(self) -> str:
        """Describe the calibration by name, digest and the samples of every model.

        >>> Calibrated("/c/mllm-gram", "a1b2c3d4e5", ("mllm: 60 samples",)).describe()
        'mllm-gram (a1b2c3d4; mllm: 60 samples)'
        """
        facts = "; ".join([self.digest[:8], *self.samples])
        return f"{Path(self.folder).name} ({facts})"
