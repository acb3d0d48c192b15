"""Read the models of a new analysis from a form, check them by their headers, start the analysis.

In: the form's fields. Out: an `AnalysisRequest`, a `Checked` request with the findings of the
check and the cost of its analysis, and a run. A check reads headers, configs and a few rows, and
reports its progress. On a Space only hub ids are accepted; `iter_pack` checks this again.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipmerge_core.analysis.partial import journal_of
from ipmerge_core.analysis.records import Sources
from ipmerge_core.errors import IPMergeError, PlanError
from ipmerge_core.models.files import as_hub_id
from ipmerge_core.spectral.kinds import TEMPERATURE
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import public_finding, sentence_of
from ipmerge_core.ui.pairs import id_of, list_packs, path_of, read_pack_file, reserve_name
from ipmerge_core.ui.serving import current_visitor

if TYPE_CHECKING:
    from ipmerge_core.merging.estimates import AnalysisEstimate
    from ipmerge_core.models.checkpoint import Checkpoint
    from ipmerge_core.models.pairing import Finding, ModelPair

MOST_EXPERTS = 8
BASE = "base"  # its role in messages
LONGEST_ADDRESS = 300  # characters of a folder or hub id


class AnalysisRequest(NamedTuple):
    """The models to compare, by folder or hub id, and the options of the analysis."""

    mllm: str
    math: tuple[str, ...]
    base: str
    base_mllm: str = ""
    quick: bool = False
    rank: int | None = None
    temperature: float = TEMPERATURE
    directions: str = "existing"
    device: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """The options of the analysis by name, see `comparison.Options`."""
        names = ("rank", "temperature", "quick", "directions")
        return {name: getattr(self, name) for name in names}

    def addresses(self) -> Iterator[tuple[str, str]]:
        """Yield the role and the address of each model."""
        yield "vision-language model", self.mllm
        yield BASE, self.base
        if self.base_mllm:
            yield "base of the vision-language model", self.base_mllm
        for number, expert in enumerate(self.math):
            yield "math model" if len(self.math) == 1 else f"math model {number + 1}", expert


class Checked(NamedTuple):
    """The result of a check. `pinned` names the models at the commits that were checked."""

    asked: AnalysisRequest | None
    findings: list[Finding]
    pinned: AnalysisRequest | None = None
    need: AnalysisEstimate | None = None

    @property
    def ready(self) -> bool:
        """Whether the analysis can start."""
        return self.pinned is not None and all(f.level != "refusal" for f in self.findings)


class StartedAnalysis(NamedTuple):
    """The id and key of a run, and the id of the pair that it makes."""

    id: str
    key: str
    pack: str


def read_request(
    mllm: str,
    math: str,
    base: str,
    base_mllm: str,
    quick: bool,
    rank: float | None,
    temperature: float | None = None,
    directions: str = "existing",
) -> AnalysisRequest:
    r"""Read the form: one math model per line, or separated by commas. Raises: PlanError.

    The base may be omitted for a check, which takes the one that an adapter names.

    >>> read_request(" a/v ", "b/m\nc/m", "d/b", "d/b", False, 0).math
    ('b/m', 'c/m')
    """
    mllm, base, base_mllm = mllm.strip(), base.strip(), base_mllm.strip()
    experts = tuple(filter(None, (part.strip() for part in re.split(r"[\n,]", math))))
    if rank and rank != int(rank):
        raise PlanError(f"The rank is {rank:g}; expected an integer, or 0 for all directions.")
    own = "" if base_mllm == base else base_mllm
    return validate_request(
        AnalysisRequest(
            mllm,
            experts,
            base,
            own,
            bool(quick),
            int(rank or 0) or None,
            TEMPERATURE if temperature is None else temperature,
            directions,
        ),
        needs_base=False,
    )


def validate_request(request: AnalysisRequest, *, needs_base: bool = True) -> AnalysisRequest:
    """Return the request if it is complete. Raises: PlanError."""
    if not all(isinstance(address, str) for _, address in request.addresses()):
        raise PlanError("The name of a model is not a string; expected a hub id.")
    if not isinstance(request.rank, int | None) or not isinstance(request.quick, bool):
        raise PlanError(f"The rank is {str(request.rank)[:40]!r}; expected an integer or null.")
    if not isinstance(request.temperature, int | float) or isinstance(request.temperature, bool):
        raise PlanError(f"The temperature is {str(request.temperature)[:40]!r}; expected a number.")
    optional = () if needs_base else (BASE,)
    missing = [
        role for role, address in request.addresses() if not address and role not in optional
    ]
    if missing or not request.math:
        words = [*missing, *([] if request.math else ["math model"])]
        raise PlanError(f"Missing: {', '.join(words)}.")
    if len(request.math) > MOST_EXPERTS:
        raise PlanError(f"Got {len(request.math)} math models; expected at most {MOST_EXPERTS}.")
    for role, address in request.addresses():
        if len(address) > LONGEST_ADDRESS:
            raise PlanError(
                f"The name of the {role} has {len(address)} characters; expected a folder or a hub "
                f"id of at most {LONGEST_ADDRESS}."
            )
    return request


def check_request(
    request: AnalysisRequest, *, hub_only: bool, device: str = "auto"
) -> Iterator[str | Checked]:
    """Check models by headers, configs and a few rows; yield progress messages, then the result.

    The cost of the analysis is estimated for `device`.
    """
    try:
        yield from _check(request, hub_only, device)
    except IPMergeError as error:
        yield failed_check(error)


def failed_check(error: IPMergeError) -> Checked:
    """Return the result of a check that failed."""
    from ipmerge_core.models.pairing import Finding

    refusal = Finding("refusal", "These models cannot be compared.", sentence_of(error))
    return Checked(None, [refusal])


def _check(request: AnalysisRequest, hub_only: bool, device: str) -> Iterator[str | Checked]:
    mllm, base, *rest = yield from _open_all(request, hub_only)  # before torch is loaded
    from ipmerge_core.analysis.comparison import Options
    from ipmerge_core.merging.estimates import estimate_analysis
    from ipmerge_core.models.pairing import open_pair
    from ipmerge_core.runtime.devices import resolve_device

    options = Options(**request.options).check()
    own = rest.pop(0) if request.base_mllm else None
    pair = open_pair(mllm, rest, base, base_mllm=own)
    yield "Comparing a few rows of each model"
    findings = [public_finding(finding) for finding in pair.check()]
    need = estimate_analysis(pair, options, resolve_device(device))
    findings += [*_memory(need), *_known(pair, options._asdict())]
    yield Checked(request, findings, _pinned(request, pair), need)


def _open_all(request: AnalysisRequest, hub_only: bool) -> Generator[str, None, list[Checkpoint]]:
    """Open every model and report progress; return them in the order of their addresses."""
    models: list[Checkpoint] = []
    addresses = list(request.addresses())
    for number, (role, address) in enumerate(addresses, 1):
        yield f"Reading headers, {number} of {len(addresses)}: {role} {address}"
        from ipmerge_core.models.opening import named_base, open_model

        if not address:
            models.append(named_base(request.math, hub_only=hub_only))
            continue
        base = models[1] if len(models) > 1 else None  # of an adapter
        models.append(open_model(address, base=base, hub_only=hub_only))
    return models


def _pinned(request: AnalysisRequest, pair: ModelPair) -> AnalysisRequest:
    """Return the request with each model pinned to the commit that was checked."""
    from ipmerge_core.analysis.analyse import describe

    found = describe(pair)[0].locations()
    return request._replace(
        mllm=found.mllm, math=tuple(found.math), base=found.base, base_mllm=found.base_mllm or ""
    )


def _memory(need: AnalysisEstimate) -> Iterator[Finding]:
    from ipmerge_core.models.pairing import Finding

    if need.nbytes_memory > need.nbytes_memory_free:
        yield Finding(
            "refusal",
            "memory",
            f"The largest matrix needs about {need.nbytes_memory / 1e9:.1f} GB of memory; "
            f"{need.nbytes_memory_free / 1e9:.1f} GB are free.",
            "Choose the depth 'quick', which needs less, or use a machine with more memory.",
        )


def _known(pair: ModelPair, options: dict[str, object]) -> Iterator[Finding]:
    """Warn if the same weights have been analysed with the same options before."""
    from ipmerge_core.models.pairing import Finding
    from ipmerge_core.version import __version__

    weights = [model.fingerprint for _, model in pair.roles()]
    for entry in list_packs():
        try:
            pack = read_pack_file(entry.path)
        except IPMergeError:
            continue
        how = (pack["parameters"], pack["engine"])
        models = Sources.from_dict(pack["sources"]).all()
        same = weights == [model.fingerprint for model in models]
        if same and how == (options, __version__):
            yield Finding(
                "warning",
                "already analysed",
                f"The same weights were analysed with the same options as '{entry.label}'.",
                "Select it under Pair; a new analysis gives the same numbers.",
            )
            return


# --- the run ---------------------------------------------------------------------------------


def start_analysis(
    backend: Backend, request: AnalysisRequest, *, owner: str = ""
) -> StartedAnalysis:
    """Start a run that analyses the models into a new pack in the user's folder.

    If a run of the same `owner` (see `JobStore.start`) is doing the same analysis, return that run.

    Raises: PlanError or, on a Space, CheckpointError for invalid names, PlanError for a device that
        is not available, RunError if too many runs are in progress.
    """
    from ipmerge_core.analysis.comparison import Options

    validate_request(request)
    if backend.hosted:
        for _, address in request.addresses():
            as_hub_id(address)
    Options(**request.options).check()
    device = backend.device_for(request.device)
    names = [Path(address.partition("@")[0]).name for address in (request.mllm, *request.math)]
    arguments = {
        "mllm": request.mllm,
        "math": list(request.math),
        "base": request.base,
        "base_mllm": request.base_mllm or None,
        **request.options,
        "device": device,
        "hub_only": backend.hosted,
        "updates": str(backend.updates_folder),
    }
    return _start_once(backend, arguments, names, owner)


def _start_once(
    backend: Backend, arguments: Mapping[str, Any], names: Sequence[str], owner: str
) -> StartedAnalysis:
    """Start the analysis under a free name, or find the owner's run that is doing the same."""
    from ipmerge_core.analysis.analyse import iter_pack

    rank = arguments["rank"]
    depth = "quick" if arguments["quick"] else f"rank{rank}" if rank else ""
    what = "quick, approximate" if arguments["quick"] else f"rank {rank}" if rank else "exact"
    title = " + ".join(names)
    with backend.start_lock:
        if running := backend.running_like(iter_pack.__name__, arguments, owner):
            out = Path(str(backend.store.status(running.id).arguments["out"]))
            return StartedAnalysis(*running, id_of(out))
        out = reserve_name(*names, depth)
        try:
            started = backend.store.start(
                iter_pack,
                {**arguments, "out": str(out)},
                title=f"Analyse {title}",
                owner=owner,
                about={"kind": "analysis", "pair": title, "method": what},
                visitor=current_visitor(),
            )
        except IPMergeError:
            journal_of(out).unlink()  # the name is free again
            raise
    return StartedAnalysis(*started, id_of(out))


def is_running(backend: Backend, pack_id: str) -> bool:
    """Whether a pair is being analysed now."""
    out = str(path_of(pack_id))
    return any(s.is_running and s.arguments.get("out") == out for s in backend.store.all())


def discard(backend: Backend, job: str, key: str) -> None:
    """Delete the results of a stopped analysis. Raises: RunError without the run's key."""
    status = backend.store.cancel(job, key)  # raises without the key
    out = Path(str(status.arguments.get("out", "")))
    if status.can_resume and out.parent == path_of("packs-x").parent:
        journal_of(out).unlink(missing_ok=True)
