"""What the tabs and the endpoints share: the runs, the models in memory, and who they belong to.

In: a pair and a choice. Out: the folders of the model as it is and of the merged one, and these
models in memory. One `Backend` is made per app; nothing here is global, and no torch is loaded
before it is needed.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import CheckpointError, FolderInUseError, IPMergeError, RunError
from ipmerge_core.merging.provenance import read_provenance
from ipmerge_core.runtime.host import is_hosted
from ipmerge_core.runtime.jobs import Claim, JobStore, Started, home_folder
from ipmerge_core.ui.plan_choice import analysis_of

if TYPE_CHECKING:
    from ipmerge_core.calibration.calibrate import CalibrationCost
    from ipmerge_core.inference.loading import LoadedModel, ModelCache
    from ipmerge_core.planning.plan import MergePlan

SMALL_MODEL = 200_000_000  # bytes; up to here the chat merges by itself, in seconds
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_NUMBER = re.compile(r"-[0-9]{1,3}\Z")  # that was put behind a taken name
MOST_NAMES = 999  # that differ in a number only
KEPT_PREVIEWS = 6  # merged models that the chat made, kept for the next question

Progress = Callable[[str], None]


@dataclass
class Backend:
    """The runs, the previews and the models of one app."""

    store: JobStore = field(default_factory=lambda: JobStore(home_folder() / "runs"))
    hosted: bool = field(default_factory=is_hosted)
    device: str = "auto"  # of every run that is not given one
    _models: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _preview_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def models(self) -> ModelCache:
        """The models in memory: one pair of them, and one more while plans are being tried."""
        from ipmerge_core.inference.loading import ModelCache

        with self._lock:
            if self._models is None:
                self._models = ModelCache(most_models=3)
            return self._models  # type: ignore[no-any-return]

    def import_libraries(self) -> None:
        """Import torch and transformers, one thread at a time: they do not like to be raced."""
        from ipmerge_core.inference.loading import import_libraries

        with self._lock:
            import_libraries()

    def warm_up(self) -> None:
        """Do so in the background, for a visitor who is about to ask something."""
        threading.Thread(target=self.import_libraries, daemon=True).start()

    def load(self, folder: Path) -> LoadedModel:
        """Return the model in a folder, on the device of this app."""
        return self.models.get(folder, self.device_for(fp64=False))

    def device_for(self, asked: str = "auto", *, fp64: bool = True) -> str:
        """Return the device that a run takes: the one that was asked for, else this app's.

        Raises: PlanError for a device that is not here, or cannot do this work (see
            `resolve_device`).
        """
        from ipmerge_core.runtime.devices import AUTO, resolve_device

        return resolve_device(self.device if asked == AUTO else asked, fp64=fp64)

    @property
    def packs_folder(self) -> Path:
        """Where the user's own packs are looked for."""
        return home_folder() / "packs"

    def start_merge(
        self, plan: MergePlan, name: str, *, device: str = "auto", owner: str = ""
    ) -> Started:
        """Start a run that merges `plan` into a new folder.

        Asked by the `owner` (see `JobStore.start`) of a run that is making the very same there,
        this returns that run.

        Raises: CheckpointError when the folder is not empty, PlanError for a device that is not
            here, FolderInUseError or RunError when the folder may not be used.
        """
        from ipmerge_core.merging.merge import iter_merge
        from ipmerge_core.models.writer import check_output, check_unfinished

        device = self.device_for(device)
        out = check_output(self.output_folder(name))
        check_unfinished(out, plan.digest)
        arguments = {"plan": plan, "out": str(out), "device": device}
        title = f"Merge plan {plan.hash} into {out.name}"
        claim = Claim(str(out), plan.digest)
        try:
            return self.store.start(iter_merge, arguments, title=title, claim=claim, owner=owner)
        except FolderInUseError as error:
            key = self.store.key_of(error.job, owner)
            if error.same_work and self.store.holds_key(error.job, key):
                return Started(error.job, key)
            raise

    @property
    def calibrations_folder(self) -> Path:
        """Where calibrations made in the app are kept."""
        return home_folder() / "calibrations"

    def start_calibration(
        self, pack_id: str, method: str, seen: str, read: str, limit: int
    ) -> Started:
        """Start a run that measures a pair's models on samples, for a method that needs them.

        Raises: RunError for samples that cannot be read, or others than demo ones on a Space.
        """
        from ipmerge_core.calibration.calibrate import iter_calibration_of
        from ipmerge_core.calibration.samples import is_demo, load_samples
        from ipmerge_core.methods import find_method

        if self.hosted and not (is_demo(seen) and is_demo(read)):
            raise RunError("Here the samples are the demo problems; on your own machine, any file.")
        for source, takes_images in ((seen, True), (read, False)):
            load_samples(source, limit, takes_images=takes_images)
        kind = str(find_method(method).data)
        sources = analysis_of(pack_id).sources
        stem = f"{Path(sources.mllm.id).name}-{kind}"
        arguments = {
            "mllm": sources.mllm.location,
            "math": [expert.location for expert in sources.math],
            "base": sources.base.location,
            "base_mllm": sources.base_mllm.location if sources.base_mllm else None,
            "kind": kind,
            "mllm_samples": seen,
            "math_samples": read,
            "limit": limit,
            "device": self.device_for(fp64=False),
        }
        for name in _numbered(stem):
            out = self.calibrations_folder / name
            with contextlib.suppress(FolderInUseError):
                if not out.exists():
                    arguments["out"] = str(out)
                    claim, title = Claim(str(out)), f"Calibrate {name}"
                    return self.store.start(
                        iter_calibration_of, arguments, title=title, claim=claim
                    )
        raise RunError(f"There are {MOST_NAMES} calibrations named '{stem}'. Remove some.")

    def finished_calibrations(self, pack_id: str, method: str) -> list[Path]:
        """List the calibrations that this method can use for this pair, the newest last."""
        from ipmerge_core.calibration.store import find_finished
        from ipmerge_core.methods import find_method

        sources = analysis_of(pack_id).sources
        kind = find_method(method).data
        assert kind is not None, f"{method} needs no data"
        found = find_finished(self.calibrations_folder, [sources.mllm, *sources.math], kind)
        return sorted(found, key=lambda folder: folder.stat().st_mtime)

    def calibration_cost(self, pack_id: str, method: str) -> CalibrationCost:
        """Work out what a calibration takes. Raises: IPMergeError when a model is not there."""
        from ipmerge_core.calibration.calibrate import estimate
        from ipmerge_core.calibration.passes import Settings
        from ipmerge_core.methods import find_method
        from ipmerge_core.planning.plan import open_sources

        kind = find_method(method).data
        assert kind is not None, f"{method} needs no data"
        pair = open_sources(analysis_of(pack_id).sources)
        return estimate(pair, self.calibrations_folder, Settings(kind), 1, 1)

    def output_folder(self, name: str) -> Path:
        """Say where a merged model goes: a plain name lies in the models folder.

        Raises: RunError for an empty name, or on a Space for anything but a plain name.
        """
        name = name.strip()
        if _NAME.fullmatch(name):
            return home_folder() / "models" / name
        if self.hosted or not name:
            raise RunError(
                f"The output folder is called '{name[:80]}'; expected a plain name of letters, "
                f"digits, dots, dashes and underscores."
            )
        path = Path(name).expanduser()
        if not path.is_absolute():
            raise RunError(
                f"The output folder '{name[:80]}' is neither a plain name nor a full path. Give "
                f"a name such as 'merged', or a path that starts at the root."
            )
        return path

    def free_name(self, plan: MergePlan) -> str:
        """Suggest a folder name that is not taken: the model's, the plan's hash, and a number."""
        return self.free_name_like(f"{Path(plan.sources.mllm.id).name}-{plan.hash}")

    def free_name_like(self, name: str) -> str:
        """Suggest a folder that is not taken: this one, or it with a number; "" for no name."""
        stem = _NUMBER.sub("", name.strip())
        with contextlib.suppress(RunError):
            return next(filter(self._is_free, _numbered(stem)), "")
        return ""

    def folder_problem(self, name: str) -> str:
        """Say why a merge cannot write to the folder of this name; "" where it can."""
        from ipmerge_core.models.writer import check_output

        try:
            out = check_output(self.output_folder(name))
        except IPMergeError as error:
            return str(error)
        job = self.store.writer_of(out)
        return str(FolderInUseError(str(out), job, same_work=False)) if job else ""

    def _is_free(self, name: str) -> bool:
        from ipmerge_core.models.writer import place_of

        place = place_of(self.output_folder(name))
        taken = place.out.exists() or place.run.exists()
        return not taken and self.store.writer_of(place.out) is None

    def base_folder(self, pack_id: str) -> Path:
        """Return the folder of the pair's vision-language model. Raises: CheckpointError."""
        source = analysis_of(pack_id).sources.mllm
        folder = Path(source.id)
        return folder if folder.is_dir() else _from_hub_cache(source.id, source.revision)

    def merged_folder(self, plan: MergePlan, progress: Progress) -> Path:
        """Return the merged model of a plan: the one merged before, or for small models a new one.

        Raises: RunError when the model is too large to merge on the side.
        """
        found = self.finished_merge(plan)
        if found is not None:
            return found
        size = plan.totals.model_bytes
        if size > SMALL_MODEL:
            raise RunError(
                f"Plan {plan.hash} has not been merged yet, and with {size / 1e9:.1f} GB the model "
                f"is too large to merge while you wait. Start it in the Merge tab, then ask again."
            )
        with self._preview_lock:
            return self._merge_preview(plan, progress)

    def finished_merge(self, plan: MergePlan) -> Path | None:
        """Return the folder of a finished run of this very plan, if it is still there."""
        for status in self.store.all():
            folder = Path(str(status.arguments.get("out", "")))
            if status.state == "finished" and _plan_hash(folder) == plan.hash:
                return folder
        return None

    def _merge_preview(self, plan: MergePlan, progress: Progress) -> Path:
        from ipmerge_core.merging.merge import iter_merge

        previews = home_folder() / "previews"
        out = previews / plan.digest[:32]
        if _plan_hash(out) != plan.hash:
            previews.mkdir(parents=True, exist_ok=True)
            _remove_oldest(previews, keep=KEPT_PREVIEWS - 1)
            for step in iter_merge(plan, out, device=self.device_for()):
                progress(f"merging plan {plan.hash[:4]}: {step.index} of {step.total}")
        out.touch()
        return out


def _numbered(stem: str) -> Iterator[str]:
    """Yield a name, then the same with a number: `a`, `a-2`, `a-3`, ..."""
    yield stem
    yield from (f"{stem}-{number}" for number in range(2, MOST_NAMES + 1))


def _from_hub_cache(source_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with contextlib.suppress(OSError, ValueError):
        return Path(snapshot_download(source_id, revision=revision, local_files_only=True))
    raise CheckpointError(
        f"The model '{source_id}' is not on this machine. Download it first with "
        f"`hf download {source_id}`, or look at the recorded answers."
    )


def _plan_hash(folder: Path) -> str | None:
    """Read from a merged model's manifest which plan made it."""
    made = read_provenance(folder)
    return made.plan if made else None


def _remove_oldest(folder: Path, *, keep: int) -> None:
    models = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)
    for model in models[keep:]:
        shutil.rmtree(model, ignore_errors=True)
