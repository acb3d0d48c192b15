"""Records of an analysis, and the pack file that stores them.

In and out: one JSON file, the "pack", gzipped if its name ends in .gz, read by both Python and the
browser. No tensors and no torch, so that the app can show a pack before torch is loaded.
`comparison` creates the records, `planning` and `plots` use them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ipmerge_core.analysis.singular_values import Spectra
from ipmerge_core.errors import PlanError
from ipmerge_core.models.task_vectors import NOTHING, TaskVectorProducts
from ipmerge_core.runtime.atomic import write_whole
from ipmerge_core.runtime.input_files import (
    CLOSED,
    MEGABYTE,
    Count,
    FileKind,
    InvalidContentError,
    Location,
    Magnitude,
    Name,
    Number,
    Schema,
    requiring,
    versioned,
)
from ipmerge_core.spectral.kinds import SIMILARITIES

_FORMAT, VERSION = "ipmerge-pack", 5
_FIRST = 1  # version of packs in which all directions were used, existing or not
# Before 3, packs had only samples of the spectra; before 4, no updates off the MLLM's directions;
# before 5, no truncated ones.
_VERSIONS = (_FIRST, 2, 3, 4, VERSION)
UPDATES = ("sum", "max", "rescale_only", "select_only")  # of `LayerRecord.updates`
Index = Annotated[int, Field(ge=0, lt=100_000)]  # a layer or an expert
Ranks = Annotated[Mapping[str, Number], requiring("stable", "effective")]
PACK = FileKind(
    "a pack", "Create it again with `ipmerge analyse`.", PlanError, largest=128 * MEGABYTE
)


@dataclass(frozen=True)
class Source:
    """Location of a model and the fingerprint of its weights.

    `content` is a second hash of more of the weights, see `Checkpoint.content`; None for models on
    the hub, and in packs and plans of older versions.
    """

    __pydantic_config__ = CLOSED

    id: Location
    revision: Name | None
    fingerprint: Name
    content: Name | None = None

    def differs_from(self, fingerprint: str, content: str | None) -> bool:
        """Whether weights with these hashes are other weights; unknown contents do not differ."""
        if self.content is not None and content is not None and self.content != content:
            return True
        return self.fingerprint != fingerprint

    @property
    def location(self) -> str:
        """Path or pinned hub id that opens this model again."""
        return f"{self.id}@{self.revision}" if self.revision else self.id

    def relative_to(self, folder: Path) -> Source:
        """Return a copy whose path is relative to `folder`, if it is inside."""
        if self.revision or not Path(self.id).is_relative_to(folder):
            return self
        return replace(self, id=f"./{Path(self.id).relative_to(folder)}")

    def resolved_in(self, folder: Path) -> Source:
        """Return a copy with the relative path resolved in `folder`."""
        return replace(self, id=str(folder / self.id)) if self.id.startswith("./") else self


class Locations(NamedTuple):
    """The models of a pair by folder or hub id."""

    mllm: str
    math: list[str]
    base: str
    base_mllm: str | None


@dataclass(frozen=True)
class Sources:
    """The models of a pair. `base_mllm` is None where the MLLM shares the experts' base."""

    __pydantic_config__ = CLOSED

    mllm: Source
    base: Source
    base_mllm: Source | None
    math: Annotated[tuple[Source, ...], Field(min_length=1)]

    def all(self) -> list[Source]:
        """List the sources in the order of `ModelPair.roles`."""
        own = [self.base_mllm] if self.base_mllm else []
        return [self.mllm, self.base, *own, *self.math]

    def merged(self) -> list[Source]:
        """List the models that a merge puts together: the MLLM and the experts."""
        return [self.mllm, *self.math]

    def locations(self) -> Locations:
        """Return what opens exactly these models again, by the arguments of `open_pair`."""
        return Locations(
            mllm=self.mllm.location,
            math=[expert.location for expert in self.math],
            base=self.base.location,
            base_mllm=self.base_mllm.location if self.base_mllm else None,
        )

    def relative_to(self, folder: Path) -> Sources:
        """Return a copy whose paths are relative to `folder`, if they are inside."""
        return self._each(lambda source: source.relative_to(folder))

    def resolved_in(self, folder: Path) -> Sources:
        """Return a copy with the relative path resolved in `folder`."""
        return self._each(lambda source: source.resolved_in(folder))

    def _each(self, change: Callable[[Source], Source]) -> Sources:
        root = self.base_mllm
        return Sources(
            mllm=change(self.mllm),
            base=change(self.base),
            base_mllm=change(root) if root else None,
            math=tuple(change(expert) for expert in self.math),
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Sources:
        """Rebuild from JSON content. Raises: InvalidContentError."""
        return _SOURCES.validate(content)


class Totals(NamedTuple):
    """Sizes of the MLLM: parameters in total, of the language model, of the matched matrices."""

    model_parameters: Count
    llm_parameters: Count
    decoder_parameters: Count
    decoder_itemsize: Count  # bytes per stored element
    model_bytes: Count


class UpdateNorms(NamedTuple):
    """Inner products of one named update X of one expert.

    norm2 = ||X||^2, inner = <dV, X>, cross = <X, X_j> for the experts j before this one.
    """

    norm2: Number
    inner: Number
    cross: tuple[Number, ...]


@dataclass(frozen=True)
class LayerRecord:
    """Results for one matrix and one expert. Norms are Frobenius norms, squared where named so.

    `similarity` contains first, max and weighted; `updates` contains the inner products of four
    updates per unit gain: "sum" and "max" (IP-Merging with gamma normalized to sum 1, or to maximum
    1), "rescale_only" (rho dM) and "select_only" (dM); from version 4 also "protect" and, except
    for experts of mixtures, the complement for each of `ENERGY_SHARES` (dM without the MLLM's
    leading directions), of which `left_out` is the number of directions; from version 5 also dM
    truncated to each of `KEPT_SHARES`, of which `kept_directions` is the number. `principal` is the
    mean cosine of the principal angles between the leading k right directions of both, for k = "1",
    "4", "16", "64".
    `index` (from 1) are the ranks of the sampled singular values and angles, with six digits;
    `spectra` contains all singular values, None for experts of mixtures and in packs before
    version 3. `noise_floor` and `math_noise_floor` are the singular values of dV and dM that
    rounding of the stored dtypes can cause; `mllm_directions` and `math_directions` are the numbers
    of existing directions above it (`spectrum.existing`). Only these contribute to similarities,
    nuclear norms, ranks and updates, unless the analysis used all. None in packs of version 1.
    """

    __pydantic_config__ = CLOSED

    name: Name
    mllm_name: Name
    layer: Index
    module: Name
    expert: Index
    shape: tuple[Count, Count]
    similarity: Annotated[Mapping[str, Number], requiring(*SIMILARITIES)]
    best_index: Count
    gap: Number
    principal: Mapping[Annotated[str, Field(pattern="^[0-9]{1,6}$")], Number]
    rho: Number
    weight_norm2: Magnitude
    base_norm2: Magnitude
    mllm_norm2: Magnitude
    math_norm2: Magnitude
    inner: Number
    mllm_nuclear: Magnitude
    math_nuclear: Magnitude
    updates: Annotated[Mapping[str, UpdateNorms], requiring(*UPDATES)]
    chance: Annotated[Mapping[str, Number], requiring("first", "max")]
    noise_floor: Magnitude | None
    mllm_ranks: Ranks
    math_ranks: Ranks
    index: tuple[Count, ...]
    mllm_sigma: tuple[Number, ...]
    math_sigma: tuple[Number, ...]
    angles: tuple[Number, ...]
    math_noise_floor: Magnitude | None = None
    mllm_directions: Count | None = None
    math_directions: Count | None = None
    left_out: tuple[Count, ...] = ()
    kept_directions: tuple[Count, ...] = ()
    spectra: Spectra | None = None

    @property
    def products(self) -> TaskVectorProducts:
        """Norms and inner product of the two task vectors, for their cosine and norm ratio."""
        return TaskVectorProducts(self.mllm_norm2, self.math_norm2, self.inner)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON content."""
        return {
            **asdict(self),
            "updates": {name: norms._asdict() for name, norms in self.updates.items()},
        }


@dataclass(frozen=True)
class Analysis:
    """All records of a pair, with their sources."""

    __pydantic_config__ = CLOSED

    name: Name
    created: Name
    engine: Name
    sources: Sources
    parameters: Mapping[str, float | int | bool | str | None]
    totals: Totals
    records: tuple[LayerRecord, ...]

    @property
    def approximate(self) -> bool:
        """Whether the records are from a quick analysis of the leading directions."""
        return bool(self.parameters.get("quick"))

    def products(self, expert: int) -> TaskVectorProducts:
        """Norms and inner product of the task vectors over all matrices, for one expert."""
        total = NOTHING
        for record in self.records:
            if record.expert == expert:
                total = total.plus(record.products)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return the pack's JSON content."""
        return {
            "format": _FORMAT,
            "version": VERSION,
            "engine": self.engine,
            "created": self.created,
            "name": self.name,
            "sources": asdict(self.sources),
            "parameters": dict(self.parameters),
            "totals": self.totals._asdict(),
            "records": [record.to_dict() for record in self.records],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Analysis:
        """Rebuild an analysis from a pack's JSON content. Raises: InvalidContentError."""
        version, fields = versioned(content, _FORMAT, _VERSIONS)
        if version == _FIRST and isinstance(made := fields.get("parameters"), dict):
            fields["parameters"] = {"directions": "all", **made}
        analysis = _ANALYSIS.validate(fields)
        check_records(analysis.records, len(analysis.sources.math))
        return analysis

    def save(self, path: str | Path) -> None:
        """Write the pack, gzipped if the name ends in .gz; the bytes are reproducible.

        Paths of model folders below the pack's folder are stored relative to it (`./mllm`), so that
        pack and models can be moved together.
        """
        folder = Path(path).absolute().parent
        content = {**self.to_dict(), "sources": asdict(self.sources.relative_to(folder))}
        text = json.dumps(content, separators=(",", ":")) + "\n"
        data = text.encode()
        write_whole(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)

    @classmethod
    def load(cls, path: str | Path) -> Analysis:
        """Read a pack written by `save`. Raises: PlanError if it is not a pack."""
        analysis, folder = read_pack(path)[1], Path(path).absolute().parent
        return replace(analysis, sources=analysis.sources.resolved_in(folder))


def read_pack(path: str | Path) -> tuple[dict[str, Any], Analysis]:
    """Read a pack's file: its JSON content, and the analysis in it, with sources as written.

    Raises: PlanError if it is not a pack.
    """
    content = PACK.content(path)
    try:
        analysis = Analysis.from_dict(content)
        if not analysis.records or not all(record.index for record in analysis.records):
            raise InvalidContentError("it has no records, or a record without singular values")
    except InvalidContentError as error:
        raise PACK.refusal(path, error) from error
    return content, analysis


_SOURCES, _ANALYSIS = Schema[Sources](Sources), Schema[Analysis](Analysis)


def check_records(records: Sequence[LayerRecord], n_experts: int) -> None:
    """Check that records have one entry per matrix and expert, in order.

    Raises: InvalidContentError naming the first record that is out of place.
    """
    for number, record in enumerate(records):
        first = records[number - number % n_experts]
        if record.expert != number % n_experts or record.name != first.name:
            raise InvalidContentError(
                f"'records[{number}]' is of expert {record.expert} and '{record.name[:80]}'; "
                f"expected expert {number % n_experts} of '{first.name[:80]}'"
            )
        lengths = {len(each) for each in (record.index, record.mllm_sigma, record.math_sigma,
                                          record.angles)}  # fmt: skip
        products = {len(norms.cross) for norms in record.updates.values()}
        if len(lengths) > 1 or products != {record.expert}:
            raise InvalidContentError(
                f"'records[{number}]' has lists of different lengths; expected one value per index "
                f"and one product per earlier expert"
            )
    if len(records) % n_experts:
        raise InvalidContentError(f"it has {len(records)} records of {n_experts} experts each")
    names = [record.name for record in records[::n_experts]]
    if len(set(names)) != len(names):
        raise InvalidContentError("it has several records of one matrix and expert")
