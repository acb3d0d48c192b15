"""Read the models of a new analysis from a form, check them by their headers, start the analysis.

In: the form's fields. Out: a `Trio` of names, a `Checked` trio with the findings of the check and
the cost of its analysis, and a run. A check reads headers, configs and a few rows, and reports its
progress. On a Space only hub ids are accepted; `iter_pack` checks this again.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipmerge_core.analysis.partial import journal_of
from ipmerge_core.analysis.records import Sources
from ipmerge_core.errors import IPMergeError, PlanError
from ipmerge_core.models.files import as_hub_id
from ipmerge_core.ui.backend import Backend
from ipmerge_core.ui.errors import public_finding, sentence_of
from ipmerge_core.ui.pairs import id_of, list_packs, path_of, read_pack_file, reserve_name

if TYPE_CHECKING:
    from ipmerge_core.merging.estimates import AnalysisEstimate
    from ipmerge_core.models.checkpoint import Checkpoint
    from ipmerge_core.models.pairing import Finding, ModelPair

MOST_EXPERTS = 8
LONGEST_ADDRESS = 300  # characters of a folder or hub id


class Trio(NamedTuple):
    """The models to compare, by folder or hub id, and the options of the analysis."""

    mllm: str
    math: tuple[str, ...]
    base: str
    base_mllm: str = ""
    quick: bool = False
    rank: int | None = None

    def addresses(self) -> Iterator[tuple[str, str]]:
        """Yield the role and the address of each model."""
        yield "vision-language model", self.mllm
        yield "base", self.base
        if self.base_mllm:
            yield "base of the vision-language model", self.base_mllm
        for number, expert in enumerate(self.math):
            yield "math model" if len(self.math) == 1 else f"math model {number + 1}", expert


class Checked(NamedTuple):
    """The result of a check. `pinned` names the models at the commits that were checked."""

    asked: Trio | None
    findings: list[Finding]
    pinned: Trio | None = None
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


def read_trio(
    mllm: str, math: str, base: str, base_mllm: str, quick: bool, rank: float | None
) -> Trio:
    r"""Read the form: one math model per line, or separated by commas. Raises: PlanError.

    >>> read_trio(" a/v ", "b/m\nc/m", "d/b", "d/b", False, 0)
    Trio(mllm='a/v', math=('b/m', 'c/m'), base='d/b', base_mllm='', quick=False, rank=None)
    """
    mllm, base, base_mllm = mllm.strip(), base.strip(), base_mllm.strip()
    experts = tuple(filter(None, (part.strip() for part in re.split(r"[\n,]", math))))
    if rank and rank != int(rank):
        raise PlanError(f"The rank is {rank:g}; expected a whole number, or 0 for all directions.")
    own = "" if base_mllm == base else base_mllm
    return validate_trio(Trio(mllm, experts, base, own, bool(quick), int(rank or 0) or None))


def validate_trio(trio: Trio) -> Trio:
    """Return the trio if it is complete. Raises: PlanError."""
    if not all(isinstance(address, str) for _, address in trio.addresses()):
        raise PlanError("The name of a model is not a string; expected a hub id.")
    if not isinstance(trio.rank, int | None) or not isinstance(trio.quick, bool):
        raise PlanError(f"The rank is {str(trio.rank)[:40]!r}; expected an integer or null.")
    missing = [role for role, address in trio.addresses() if not address]
    if missing or not trio.math:
        words = [*missing, *([] if trio.math else ["math model"])]
        raise PlanError(f"Missing: {', '.join(words)}.")
    if len(trio.math) > MOST_EXPERTS:
        raise PlanError(f"Got {len(trio.math)} math models; expected at most {MOST_EXPERTS}.")
    for role, address in trio.addresses():
        if len(address) > LONGEST_ADDRESS:
            raise PlanError(
                f"The name of the {role} has {len(address)} characters; expected a folder or a hub "
                f"id of at most {LONGEST_ADDRESS}."
            )
    return trio


def check_trio(trio: Trio, *, hub_only: bool, device: str = "auto") -> Iterator[str | Checked]:
    """Check models by headers, configs and a few rows; yield progress messages, then the result.

    The cost of the analysis is estimated for `device`.
    """
    try:
        yield from _check(trio, hub_only, device)
    except IPMergeError as error:
        yield failed_check(error)


def failed_check(error: IPMergeError) -> Checked:
    """Return the result of a check that failed."""
    from ipmerge_core.models.pairing import Finding

    refusal = Finding("refusal", "These models cannot be compared.", sentence_of(error))
    return Checked(None, [refusal])


def _check(trio: Trio, hub_only: bool, device: str) -> Iterator[str | Checked]:
    mllm, base, *rest = yield from _open_all(trio, hub_only)  # before torch is loaded
    from ipmerge_core.analysis.comparison import Options
    from ipmerge_core.merging.estimates import estimate_analysis
    from ipmerge_core.models.pairing import open_pair
    from ipmerge_core.runtime.devices import resolve_device

    options = Options(trio.rank, quick=trio.quick).check()
    own = rest.pop(0) if trio.base_mllm else None
    pair = open_pair(mllm, rest, base, base_mllm=own)
    yield "Comparing a few rows of each model"
    findings = [public_finding(finding) for finding in pair.check()]
    need = estimate_analysis(pair, options, resolve_device(device))
    findings += [*_memory(need), *_known(pair, options._asdict())]
    yield Checked(trio, findings, _pinned(trio, pair), need)


def _open_all(trio: Trio, hub_only: bool) -> Generator[str, None, list[Checkpoint]]:
    """Open every model and report progress; return them in the order of `Trio.addresses`."""
    models = []
    addresses = list(trio.addresses())
    for number, (role, address) in enumerate(addresses, 1):
        yield f"Reading headers, {number} of {len(addresses)}: {role} {address}"
        from ipmerge_core.models.checkpoint import Checkpoint

        models.append(Checkpoint.open(address, hub_only=hub_only))
    return models


def _pinned(trio: Trio, pair: ModelPair) -> Trio:
    """Return the trio with each model pinned to the commit that was checked."""
    from ipmerge_core.analysis.analyse import describe

    found = describe(pair)[0].locations()
    return trio._replace(
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


def start_analysis(backend: Backend, trio: Trio, device: str = "auto") -> StartedAnalysis:
    """Start a run that analyses a trio into a new pack in the user's folder.

    Raises: PlanError or, on a Space, CheckpointError for invalid names, PlanError for a device that
        is not available, RunError if too many runs are in progress.
    """
    from ipmerge_core.analysis.analyse import iter_pack
    from ipmerge_core.analysis.comparison import Options

    validate_trio(trio)
    if backend.hosted:
        for _, address in trio.addresses():
            as_hub_id(address)
    Options(trio.rank, quick=trio.quick).check()
    device = backend.device_for(device)
    names = [Path(address.partition("@")[0]).name for address in (trio.mllm, *trio.math)]
    depth = "quick" if trio.quick else f"rank{trio.rank}" if trio.rank else ""
    out = reserve_name(*names, depth)
    arguments = {
        "mllm": trio.mllm,
        "math": list(trio.math),
        "base": trio.base,
        "base_mllm": trio.base_mllm or None,
        "out": str(out),
        "rank": trio.rank,
        "quick": trio.quick,
        "device": device,
        "hub_only": backend.hosted,
    }
    try:
        started = backend.store.start(iter_pack, arguments, title=f"Analyse {' + '.join(names)}")
    except IPMergeError:
        journal_of(out).unlink()  # the name is free again
        raise
    return StartedAnalysis(started.id, started.key, id_of(out))


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
