"""Hold what the tabs and the endpoints share: runs, output folders and the models in memory.

In: a pair and a choice. Out: the folders of the unmerged and of the merged model, and these models
in memory. An app has one `Backend`; nothing here is global, and torch is imported when it is first
needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipmerge_core.errors import FolderInUseError, IPMergeError, RunError
from ipmerge_core.merging.provenance import read_provenance
from ipmerge_core.models.files import local_copy
from ipmerge_core.runtime.host import check_home, home_folder, is_hosted
from ipmerge_core.runtime.job_lists import jobs_with_keys, keys_of_owner
from ipmerge_core.runtime.jobs import Claim, JobStore, Started
from ipmerge_core.runtime.paths import expand_path, resolve_path
from ipmerge_core.runtime.retention import keep_sweeping
from ipmerge_core.ui.pairs import find_pack
from ipmerge_core.ui.plan_choice import analysis_of
from ipmerge_core.ui.serving import current_visitor

if TYPE_CHECKING:
    from ipmerge_core.adapters.live import LiveModel
    from ipmerge_core.adapters.live_cache import LiveCache
    from ipmerge_core.calibration.calibrate import CalibrationCost
    from ipmerge_core.calibration.store import Kind
    from ipmerge_core.inference.loading import LoadedModel, ModelCache
    from ipmerge_core.inference.precisions import Precision
    from ipmerge_core.planning.plan import MergePlan
    from ipmerge_core.runtime.warm_worker import WarmWorker

SMALL_MODEL = 200_000_000  # bytes; up to this size the chat merges a plan on demand
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_NUMBER = re.compile(r"-[0-9]{1,3}\Z")  # the suffix of a name whose stem was taken
MOST_NAMES = 999  # with one stem
MEASURED = {"gram": "Gram matrices", "fisher": "Fisher information"}  # by a calibration
# What runs import; a calibration also imports transformers, but takes minutes.
MODULES = (
    "torch",
    "ipmerge_core.merging.merge",
    "ipmerge_core.analysis.analyse",
    "ipmerge_core.calibration.calibrate",
)
WARM_UP_SECONDS = 1.0  # from the first page to the imports: the page loads its files meanwhile
KEPT_PREVIEWS = 6  # models merged on demand by the chat that are kept for later questions

Progress = Callable[[str], object]


@dataclass
class Backend:
    """The runs, the previews and the models of one app."""

    store: JobStore = field(default_factory=lambda: JobStore(home_folder() / "runs"))
    hosted: bool = field(default_factory=is_hosted)
    device: str = "auto"  # default of all runs
    precision: Precision = "auto"  # of the models in memory
    worker: WarmWorker | None = None  # runs the next job of the store
    report: Callable[[str], object] = lambda _: None  # takes a line for the log
    _models: Any = None
    _live: Any = None
    _warming: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _preview_lock: threading.Lock = field(default_factory=threading.Lock)
    start_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Let the worker run the jobs."""
        self.store.launcher = self.worker or self.store.launcher

    @property
    def models(self) -> ModelCache:
        """The models in memory: one pair, and a third while several plans are compared."""
        from ipmerge_core.inference.loading import ModelCache

        with self._lock:
            if self._models is None:
                self._models = ModelCache(most_models=3)
            return self._models  # type: ignore[no-any-return]

    @property
    def live(self) -> LiveCache:
        """The live models and their columns: the base and its merges on one copy of the weights."""
        from ipmerge_core.adapters.live_cache import LiveCache

        models = self.models
        with self._lock:
            if self._live is None:
                self._live = LiveCache(models, self.updates_folder)
            return self._live  # type: ignore[no-any-return]

    def live_model(
        self, pack_id: str, stops: Sequence[threading.Event] = (), progress: Progress = lambda _: _
    ) -> LiveModel:
        """Return a pair's vision-language model. Raises: as `base_folder` and `load_model`."""
        folder, device = self.base_folder(pack_id), self.device_for(fp64=False)
        return self.live.model(folder, device, stops, precision=self.precision, progress=progress)

    @property
    def updates_folder(self) -> Path:
        """The folder in which updates of IP-Merging are kept."""
        return home_folder() / "updates"

    def import_libraries(self) -> None:
        """Import torch and transformers in one thread: their imports are not thread-safe.

        First come the modules that other threads import, too, so that they wait or find them.
        """
        with self._lock:
            for module in MODULES:
                importlib.import_module(module)
            from ipmerge_core.inference.loading import import_libraries

            import_libraries()

    def use(self) -> None:
        """Get ready for a run and a question in the background; called when the app is used."""
        if self.worker:
            self.worker.wake()
        if not self._warming.is_set():
            self._warming.set()
            threading.Thread(target=self._warm_up, daemon=True).start()

    def _warm_up(self) -> None:
        """Start to delete what is old; with a worker, import libraries once the page has loaded."""
        keep_sweeping(self.store, home_folder(), self.report)
        if self.worker:
            time.sleep(WARM_UP_SECONDS)
            self.import_libraries()

    def load(self, folder: Path, stops: Sequence[threading.Event] = ()) -> LoadedModel:
        """Return the model in a folder, on the device of this app; `stops` cancel loading it."""
        return self.models.get(folder, self.device_for(fp64=False), stops, precision=self.precision)

    def device_for(self, asked: str = "auto", *, fp64: bool = True) -> str:
        """Return the device of a run: the requested one, or this app's default.

        Raises: PlanError for a device that is not available or not suitable (see
            `resolve_device`).
        """
        from ipmerge_core.runtime.devices import AUTO, resolve_device

        return resolve_device(self.device if asked == AUTO else asked, fp64=fp64)

    @property
    def packs_folder(self) -> Path:
        """The folder of the user's own packs."""
        return home_folder() / "packs"

    @property
    def models_folder(self) -> Path:
        """The folder of models that are merged under a plain name."""
        return home_folder() / "models"

    def start_merge(
        self,
        plan: MergePlan,
        name: str,
        *,
        device: str = "auto",
        owner: str = "",
        force: bool = False,
    ) -> Started:
        """Start a run that merges `plan` into a new folder.

        If a run of the same `owner` (see `JobStore.start`) is merging the same plan into the same
        folder, return that run. With `force` the run merges even if the sibling check fails.

        Raises: CheckpointError if the folder is not empty, PlanError for a device that is not
            available, FolderInUseError or RunError if the folder cannot be used.
        """
        from ipmerge_core.merging.merge import iter_merge
        from ipmerge_core.methods import find_method
        from ipmerge_core.models.writer import check_output, check_unfinished

        device = self.device_for(device)
        out = check_output(self.output_folder(name))
        check_unfinished(out, plan.digest)
        arguments: dict[str, Any] = {"plan": plan, "out": str(out), "device": device}
        arguments |= {"force": True} if force else {}
        title = f"Merge plan {plan.hash} into {out.name}"
        claim = Claim(str(out), plan.digest)
        label = find_method(plan.method).label
        about = {"kind": "merge", "pair": plan.name, "method": label, "plan": plan.hash}
        try:
            return self.store.start(
                iter_merge,
                arguments,
                title=title,
                claim=claim,
                owner=owner,
                about=about,
                visitor=current_visitor(),
            )
        except FolderInUseError as error:
            key = self.store.key_of(error.job, owner)
            if error.same_work and self.store.holds_key(error.job, key):
                return Started(error.job, key)
            raise

    @property
    def calibrations_folder(self) -> Path:
        """The folder of calibrations made in the app."""
        return home_folder() / "calibrations"

    def start_calibration(
        self,
        pack_id: str,
        kind: Kind,
        seen: str,
        read: str,
        limit: int,
        *,
        device: str = "auto",
        owner: str = "",
    ) -> Started:
        """Start a run that calibrates a pair's models on samples.

        If a run of the same `owner` is measuring the same, return that run. Every other run gets a
        folder of its own.

        Raises: RunError for samples that cannot be read, or that are not demo samples on a Space,
            PlanError for a device that is not available.
        """
        from ipmerge_core.calibration.calibrate import iter_calibration_of
        from ipmerge_core.calibration.samples import check_source, is_demo

        if self.hosted and not (is_demo(seen) and is_demo(read)):
            raise RunError(
                "This Space accepts only demo samples. Run the app locally to use a file."
            )
        for source, takes_images in ((seen, True), (read, False)):
            check_source(source, limit, takes_images=takes_images)
        sources = analysis_of(pack_id).sources
        stem = f"{Path(sources.mllm.id).name}-{kind}"
        arguments = {
            **sources.locations()._asdict(),
            "kind": kind,
            "mllm_samples": seen,
            "math_samples": read,
            "limit": limit,
            "device": self.device_for(device, fp64=False),
        }
        about = {
            "kind": "calibration",
            "pack": pack_id,
            "pair": find_pack(pack_id).label,
            "method": MEASURED[kind],
            "samples": f"{limit} per model, {', '.join(dict.fromkeys((seen, read)))}",
        }
        with self.start_lock:
            if running := self.running_like(iter_calibration_of.__name__, arguments, owner):
                return running
            for name in _numbered(stem):
                out = self.calibrations_folder / name
                if out.exists() or self._is_kept_for_a_run(out):
                    continue
                with contextlib.suppress(FolderInUseError):
                    return self.store.start(
                        iter_calibration_of,
                        {**arguments, "out": str(out)},
                        title=f"Calibrate {name}",
                        claim=Claim(str(out)),
                        owner=owner,
                        about=about,
                        visitor=current_visitor(),
                    )
        raise RunError(f"There are {MOST_NAMES} calibrations named '{stem}'. Delete some of them.")

    def running_like(self, target: str, arguments: Mapping[str, Any], owner: str) -> Started | None:
        """Find a run of `owner` in progress that does the same: a second press of one button."""
        keys = keys_of_owner(self.store, owner)
        for status, request, key in jobs_with_keys(self.store, keys):
            same = {**status.arguments, **arguments} == status.arguments
            if status.is_running and same and request.target == target:
                return Started(status.id, key)
        return None

    def _is_kept_for_a_run(self, out: Path) -> bool:
        """Whether a run that has not finished writes, or would write when resumed, to a folder."""
        unfinished = (status for status in self.store.all() if status.state != "finished")
        return any(status.arguments.get("out") == str(out) for status in unfinished)

    def finished_calibrations(self, pack_id: str, kind: Kind) -> list[Path]:
        """List the calibrations of a kind for a pair, newest last."""
        from ipmerge_core.calibration.store import find_finished

        sources = analysis_of(pack_id).sources
        found = find_finished(self.calibrations_folder, sources.merged(), kind)
        return sorted(found, key=lambda folder: folder.stat().st_mtime)

    def calibration_cost(self, pack_id: str, kind: Kind) -> CalibrationCost:
        """Estimate the cost of a calibration. Raises: IPMergeError if a model is missing."""
        from ipmerge_core.calibration.calibrate import estimate_calibration
        from ipmerge_core.calibration.passes import CalibrationSettings
        from ipmerge_core.planning.plan import open_sources

        pair = open_sources(analysis_of(pack_id).sources)
        folder, settings = self.calibrations_folder, CalibrationSettings(kind)
        return estimate_calibration(pair, folder, settings, 1, 1)

    def output_folder(self, name: str) -> Path:
        """Return the folder of a merged model; a plain name is placed in the models folder.

        Raises: RunError for an empty name, or on a Space for anything but a plain name.
        """
        name = name.strip()
        if _NAME.fullmatch(name):
            return self.models_folder / name
        if not name:
            raise RunError("The output folder has no name. Enter one, such as 'merged'.")
        if self.hosted:
            raise RunError(
                f"The output folder is '{name[:80]}'; expected a name of A-Z, a-z, 0-9, "
                f"'.', '-' and '_'."
            )
        path = expand_path(name)
        if not path.is_absolute():
            raise RunError(
                f"The output folder '{name[:80]}' is neither a name of A-Z, a-z, 0-9, '.', '-' "
                f"and '_' nor an absolute path. Use a name such as 'merged' or an absolute path."
            )
        if not resolve_path(path).name:
            raise RunError(f"The output folder is '{name[:80]}', the root. Enter a folder in it.")
        return resolve_path(path)

    def free_name(self, plan: MergePlan) -> str:
        """Suggest an unused folder name: the model's name, the plan's hash, perhaps a number."""
        return self.free_name_like(f"{Path(plan.sources.mllm.id).name}-{plan.hash}")

    def free_name_like(self, name: str) -> str:
        """Suggest an unused folder name: this one, perhaps with a number; "" if it is invalid."""
        stem = _NUMBER.sub("", name.strip())
        with contextlib.suppress(RunError):
            return next(filter(self._is_free, _numbered(stem)), "")
        return ""

    def folder_problem(self, name: str) -> str:
        """Explain why a merge cannot write to the folder of this name; "" if it can."""
        from ipmerge_core.models.writer import check_output

        try:
            out = check_output(self.output_folder(name))
        except IPMergeError as error:
            return str(error)
        job = self.store.writer_of(out)
        return str(FolderInUseError(str(out), job, same_work=False)) if job else ""

    def _is_free(self, name: str) -> bool:
        from ipmerge_core.finetuning.settings import training_folder
        from ipmerge_core.models.writer import run_folders

        place = run_folders(self.output_folder(name))
        training = training_folder(place.out)
        taken = any(path.exists() for path in (place.out, place.run, training))
        return not taken and self.store.writer_of(place.out) is None

    def base_folder(self, pack_id: str) -> Path:
        """Return the folder of the pair's vision-language model. Raises: CheckpointError."""
        source = analysis_of(pack_id).sources.mllm
        if source.revision is None:
            return Path(source.id)
        return local_copy(source.id, source.revision)  # a folder of that name is another model

    def merged_folder(self, plan: MergePlan, progress: Progress) -> Path:
        """Return the merged model of a plan: a finished one, or a new one if the model is small.

        Raises: RunError if the model is too large to be merged on demand.
        """
        found = self.finished_merge(plan)
        if found is not None:
            return found
        size = plan.totals.model_bytes
        if size > SMALL_MODEL:
            raise RunError(
                f"Plan {plan.hash} has not been merged yet, and a model of {size / 1e9:.1f} GB is "
                f"too large to merge on demand. Merge it in the Merge tab, then ask again."
            )
        with self._preview_lock:
            return self._merge_preview(plan, progress)

    def finished_merge(self, plan: MergePlan) -> Path | None:
        """Return the folder of a finished run of this plan if it still exists.

        A merge whose tokenizer, config or templates differ from the MLLM's of today is another one.
        """
        for status in self.store.all():
            folder = Path(str(status.arguments.get("out", "")))
            if status.state == "finished" and _is_merge_of(folder, plan):
                return folder
        return None

    def _merge_preview(self, plan: MergePlan, progress: Progress) -> Path:
        from ipmerge_core.merging.merge import iter_merge

        previews = home_folder() / "previews"
        out = previews / plan.digest[:32]
        if not _is_merge_of(out, plan):
            shutil.rmtree(out, ignore_errors=True)
            check_home(previews).mkdir(parents=True, exist_ok=True)
            _remove_oldest(previews, keep=KEPT_PREVIEWS - 1)
            for step in iter_merge(plan, out, device=self.device_for()):
                progress(f"merging plan {plan.hash[:4]}: {step.index} of {step.total} tensors")
        out.touch()
        return out


def _numbered(stem: str) -> Iterator[str]:
    """Yield a name without and with a number: `a`, `a-2`, `a-3`, ..."""
    yield stem
    yield from (f"{stem}-{number}" for number in range(2, MOST_NAMES + 1))


def _is_merge_of(folder: Path, plan: MergePlan) -> bool:
    """Whether a folder is the merge of a plan, with the other files that the MLLM has now."""
    made = read_provenance(folder)
    if made is None or made.plan != plan.hash:
        return False
    if made.files is None or plan.sources.mllm.revision is not None:
        return True  # an older manifest, or files that cannot change
    from ipmerge_core.models.opening import open_model
    from ipmerge_core.models.writer import files_to_copy

    try:
        mllm = open_model(plan.sources.mllm.location)
        names = files_to_copy(mllm)
        now = {name: hashlib.sha256(mllm.files.read(name)).hexdigest() for name in names}
        return dict(made.files) == now
    except IPMergeError:
        return True  # the MLLM is no longer there to differ


def _remove_oldest(folder: Path, *, keep: int) -> None:
    models = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime)
    for model in models[keep:]:
        shutil.rmtree(model, ignore_errors=True)
