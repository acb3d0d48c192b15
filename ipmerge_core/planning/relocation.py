"""Use a plan or an analysis with models that have moved: other places, the same weights.

In: the sources of a plan, and where its models are now. Out: sources with the new places, after
their fingerprints have been compared. The hash of a plan does not depend on places.
"""

from __future__ import annotations

from collections.abc import Sequence

from ipmerge_core.analysis.analyse import source_of
from ipmerge_core.analysis.records import Source, Sources
from ipmerge_core.errors import PairingError, PlanError
from ipmerge_core.models.opening import open_model


def relocate(
    sources: Sources,
    *,
    mllm: str | None = None,
    math: Sequence[str | None] = (),
    base: str | None = None,
    base_mllm: str | None = None,
) -> Sources:
    """Return the sources with the given models at their new places; the others stay.

    Args:
        sources: of a plan or an analysis.
        mllm: the folder or hub id of the vision-language model.
        math: the folders or hub ids of all experts, in the order of the plan.
        base: the folder or hub id of the common base.
        base_mllm: the folder or hub id of the vision-language model's own base.

    Raises:
        PlanError: another number of experts, or a base that the plan does not have.
        CheckpointError: a model cannot be opened.
        PairingError: the weights of a model are not those of the plan.
    """
    if math and len(math) != len(sources.math):
        raise PlanError(
            f"The plan has {len(sources.math)} experts and {len(math)} are given with --math. "
            f"Specify all of them, in order, or none."
        )
    if base_mllm is not None and sources.base_mllm is None:
        raise PlanError("The plan has one base for all models. Omit --base-mllm.")
    own, experts = sources.base_mllm, math or [None] * len(sources.math)
    root = _moved("base", sources.base, base)
    return Sources(
        mllm=_moved("mllm", sources.mllm, mllm),
        base=root,
        base_mllm=_moved("base of the mllm", own, base_mllm) if own else None,
        math=tuple(
            _moved("math", source, place, root.location)
            for source, place in zip(sources.math, experts, strict=True)
        ),
    )


def _moved(role: str, source: Source, place: str | None, base: str | None = None) -> Source:
    if place is None:
        return source
    found = source_of(open_model(place, base=base))
    if found.fingerprint == source.fingerprint:
        return found
    if (found.revision is None) != (source.revision is None):
        known = "a commit on the hub" if source.revision else "the weights in a folder"
        raise PairingError(
            f"The plan identifies the {role} '{source.location}' by {known}, which cannot be "
            f"compared with '{place}'. Specify {'a hub id' if source.revision else 'a folder'}."
        )
    raise PairingError(
        f"The weights of '{place}' are not those of the {role} '{source.id}' in the plan "
        f"(fingerprint {found.fingerprint[:8]} instead of {source.fingerprint[:8]}). Specify a "
        f"copy of that model."
    )
