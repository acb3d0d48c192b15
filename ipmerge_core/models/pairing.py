"""Match the decoder tensors of an MLLM, its experts and their base.

In: an MLLM, one or several math LLMs, their common base (or one base per role). Out: a `ModelPair`
with one `MatrixMatch` per decoder matrix, a reason for every tensor of the MLLM that is kept, and
the findings of the sibling check. Names differ between layouts, so each model's decoder is the one
whose tensors and shapes equal the base's. A matrix of the base without a counterpart raises an
error that names it; other tensors without one are kept. Only the sibling check reads weights, and
only a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.errors import PairingError, RunError
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorSpec,
    as_tensor,
    count_non_finite,
)
from ipmerge_core.models.coverage import Kept, Matched, describe_kept, describe_matrices, listed
from ipmerge_core.models.decoders import (
    Decoder,
    find_decoders,
    is_in_layer,
    refuse_unsupported,
    text_config,
)
from ipmerge_core.models.files import FROM_DISK, OVER_NETWORK, Pace, Stamp
from ipmerge_core.models.low_rank import Factors
from ipmerge_core.models.matching import MLLM, align, without_counterpart
from ipmerge_core.models.matrix_kinds import MODULES, expert_of, is_router, module_of, module_order
from ipmerge_core.models.opening import Source, named_base, open_model
from ipmerge_core.models.quantised import refuse_quantised
from ipmerge_core.models.siblings import Finding, Member, check_siblings
from ipmerge_core.models.writer import files_to_copy

Stamps: TypeAlias = dict[tuple[str, str], Stamp | None]  # by the model's id and the file's name

__all__ = [
    "MODULES",
    "Finding",
    "MatrixMatch",
    "MatrixWeights",
    "ModelPair",
    "open_pair",
    "text_config",
]

TO_FORCE = "Use force=True (--force on the command line) to merge anyway."
UNMATCHED = "no counterpart: not in every model with one shape"
NO_MATRIX = "no matrix: only matrices are merged"
VOCABULARY = "vocabulary: rows correspond to the MLLM's tokens"
OUTSIDE = "outside the language model"
BIAS = "bias: only matrices are merged"
NORM = "norm: only matrices are merged"


@dataclass(frozen=True)
class MatrixMatch:
    """One decoder matrix with its name in each model; `name` is its name in the base.

    A matrix stored as part of a fused one is addressed by its rows, such as
    `model.layers.0.self_attn.qkv_proj.weight[0:4096]`; `Checkpoint` accepts such names.
    """

    name: str
    layer: int
    module: str
    shape: tuple[int, int]
    mllm: str
    base_mllm: str
    math: tuple[str, ...]


class MatrixWeights(NamedTuple):
    """One matrix of every participating model, in the stored dtypes.

    `root` is the MLLM's own base: the same tensor as `base` if both share one base. `factors` are
    those of the changes that are known to be of low rank: of the MLLM relative to `root`, then of
    every expert relative to `base`; None for the others.
    """

    base: Tensor
    root: Tensor
    mllm: Tensor
    math: tuple[Tensor, ...]
    factors: tuple[Factors | None, ...]

    def to(self, device: str | torch.device) -> MatrixWeights:
        """Return a copy on another device."""
        base = self.base.to(device)
        root = base if self.root is self.base else self.root.to(device)
        experts = tuple(expert.to(device) for expert in self.math)
        factors = tuple(found and found.to(device) for found in self.factors)
        return MatrixWeights(base, root, self.mllm.to(device), experts, factors)


class ModelPair:
    """An MLLM, its math experts and their base with matched matrices; holds no weights."""

    def __init__(
        self, mllm: Checkpoint, math: Sequence[Checkpoint], base: Checkpoint, base_mllm: Checkpoint
    ) -> None:
        self.mllm, self.math, self.base, self.base_mllm = mllm, tuple(math), base, base_mllm
        for model in dict.fromkeys((mllm, *self.math, base, base_mllm)):
            refuse_quantised(model.id, model.config, model.tensors)
        root = find_decoders("base", base)[0]
        refuse_unsupported(base, root)
        _refuse_other_layout(mllm)
        self._decoder = align(MLLM, mllm, base, root)
        own = root if base_mllm is base else align("mllm's base", base_mllm, base, root)
        experts = [align("math model", expert, base, root) for expert in self.math]
        self.sides: tuple[tuple[Checkpoint, Decoder], ...] = (
            (base, root),
            (mllm, self._decoder),
            (base_mllm, own),
            *zip(self.math, experts, strict=True),
        )
        self.matrices = _match(root, self._decoder, own, experts)

    @cached_property
    def vectors(self) -> tuple[MatrixMatch, ...]:
        """Norms and biases of the text layers and the final norm, as one-row matrices."""
        root = self.sides[0][1]
        found = [
            (layer, [decoder.tensors[layer, rest] for _, decoder in self.sides])
            for (layer, rest), spec in root.tensors.items()
            if _is_norm_or_bias(rest, spec) and (layer, rest) not in self._unmatched
        ]
        last = [f"{decoder.prefix}norm.weight" for _, decoder in self.sides]
        stored = [
            model.tensors.get(name) for (model, _), name in zip(self.sides, last, strict=True)
        ]
        specs = [spec for spec in stored if spec is not None]
        if len({spec.shape for spec in specs}) == 1 and len(specs) == len(stored):
            found.append((len(root.layers) - 1, specs))
        return tuple(_vector(layer, specs) for layer, specs in found)

    @cached_property
    def _unmatched(self) -> dict[tuple[int, str], tuple[str, str]]:
        """See `matching.without_counterpart`."""
        return without_counterpart(self.sides)

    @cached_property
    def _between(self) -> frozenset[str]:
        """The tensors of the MLLM's language model that belong to no layer, as in the base."""
        root = self.sides[0][1].prefix
        own = (n for n in self.base.tensors if n.startswith(root) and not is_in_layer(n))
        return frozenset(self._decoder.prefix + name.removeprefix(root) for name in own)

    @cached_property
    def kept(self) -> dict[str, str]:
        """The tensors of the MLLM that merging matrices leaves unchanged, each with the reason."""
        matched = {split_address(matrix.mllm).name for matrix in self.matrices}
        decoder = self._decoder
        inside = {split_address(spec.name).name: key for key, spec in decoder.tensors.items()}
        return {
            name: UNMATCHED
            if inside.get(name) in self._unmatched
            else _reason_to_keep(spec, decoder, inside.get(name), name in self._between)
            for name, spec in self.mllm.tensors.items()
            if name not in matched
        }

    @property
    def name(self) -> str:
        """A short label: the folder or repository names of the MLLM and the experts."""
        return " + ".join(Path(model.id).name for model in (self.mllm, *self.math))

    def check(self, *, exact: bool = False) -> list[Finding]:
        """Run the sibling check on headers, configs and a few rows of every kind of matrix.

        With `exact` the norm ratio and the cosine of the task vectors are computed from all weights
        of the decoder, which are read once.

        More is read only if a model seems to equal its base. Returns findings, each ok, warning
        or refusal, with the numbers and a remedy. A pair with a refusal can only be merged with
        force.
        """
        places = [(matrix.module, matrix.layer) for matrix in self._compared]
        return [
            *self._tensor_findings(),
            *check_siblings(list(self._members()), places, exact=exact),
        ]

    def require_common_base(self, hint: str = "", *, force: bool = False) -> list[Finding]:
        """Run the sibling check and return its findings.

        Raises: PairingError for the first refusal, followed by `hint`, unless `force` is set.
        """
        findings = self.check()
        for finding in findings:
            if finding.level == "refusal" and not force:
                message = (f"{finding.subject}: {finding.message}", finding.remedy, hint)
                raise PairingError(" ".join(filter(None, message)))
        return findings

    def read(
        self, matrix: MatrixMatch, experts: Sequence[int] | None = None, *, check: bool = True
    ) -> MatrixWeights:
        """Read one matrix of every model, or only of the experts with the given indices.

        Raises: CheckpointError if a matrix contains NaN or infinity, unless `check` is false.
        """
        chosen = range(len(self.math)) if experts is None else experts

        def read(model: Checkpoint, name: str) -> Tensor:
            found = model.read_matrix(name, check=check)
            return found.reshape(matrix.shape)  # a vector is a one-row matrix

        base = read(self.base, matrix.name)
        shared = self.base_mllm is self.base
        return MatrixWeights(
            base=base,
            root=base if shared else read(self.base_mllm, matrix.base_mllm),
            mllm=read(self.mllm, matrix.mllm),
            math=tuple(read(self.math[k], matrix.math[k]) for k in chosen),
            factors=(
                self.mllm.factors(matrix.mllm, self.base_mllm),
                *(self.math[k].factors(matrix.math[k], self.base) for k in chosen),
            ),
        )

    @property
    def pace(self) -> Pace:
        """How to read the whole models."""
        remote = any(model.files.remote for _, model in self.roles())
        return OVER_NETWORK if remote else FROM_DISK

    def refuse_non_finite(self, matrix: MatrixMatch, experts: Sequence[int]) -> None:
        """Check the stored tensors that contain a matrix, in every model.

        Raises: CheckpointError naming the first with NaN or infinity, and their number.
        """
        names = [(self.mllm, matrix.mllm), (self.base, matrix.name)]
        names += [(self.base_mllm, matrix.base_mllm)]
        names += [(self.math[k], matrix.math[k]) for k in experts]
        for model, name in names:
            stored = split_address(name).name
            dtype = model.spec(stored).dtype
            bad = sum(
                count_non_finite(as_tensor(piece, dtype)) for piece in model.iter_bytes(stored)
            )
            model.refuse_non_finite(stored, bad)

    def stamps(self) -> Stamps:
        """Return the stamps of the models' files, to find changes with `check_unchanged`."""
        found: Stamps = {}
        for model in dict.fromkeys(model for _, model in self.roles()):
            found |= model.stamps()
            found |= {(model.id, name): model.files.stamp(name) for name in files_to_copy(model)}
        return found

    def check_unchanged(self, before: Stamps) -> None:
        """Check that no file of the models has been written, added or removed since `before`.

        Raises:
            PairingError: weights have changed, so that finished work is invalid; names the file.
            RunError: another file has changed; the same work can be finished with the new one.
        """
        now = self.stamps()
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        shards = {key for _, model in self.roles() for key in model.stamps()}
        for key in sorted(changed, key=lambda key: key not in shards):
            kind = PairingError if key in shards else RunError
            raise kind(
                f"'{key[1]}' of '{key[0]}' was written while it was in use, so that the result "
                f"could contain parts of two versions. Run the same command again when the model "
                f"no longer changes."
            )

    def roles(self) -> Iterator[tuple[str, Checkpoint]]:
        """Yield the models by role: mllm, base, math (or math 1, ...), base of the mllm."""
        yield MLLM, self.mllm
        yield "base", self.base
        if self.base_mllm is not self.base:
            yield "base of the mllm", self.base_mllm
        for k, expert in enumerate(self.math):
            yield ("math" if len(self.math) == 1 else f"math {k + 1}"), expert

    @property
    def _compared(self) -> list[MatrixMatch]:
        """The matrices that a fine-tune changes: routers are compared with the other tensors."""
        return [matrix for matrix in self.matrices if not is_router(matrix.module)]

    def _members(self) -> Iterator[Member]:
        compared = self._compared
        names = [
            [matrix.mllm for matrix in compared],
            [matrix.name for matrix in compared],
            [matrix.base_mllm for matrix in compared],
            *([matrix.math[k] for matrix in compared] for k in range(len(self.math))),
        ]
        own_base = self.base_mllm is not self.base
        if not own_base:
            del names[2]
        others = {model: decoder.other_tensors(model) for model, decoder in self.sides}
        roots = {MLLM: "base of the mllm" if own_base else "base"}
        for (role, model), own in zip(self.roles(), names, strict=True):
            root = "base" if role.startswith("math") else roots.get(role)
            yield Member(role, model, own, root, others[model])

    def _tensor_findings(self) -> Iterator[Finding]:
        """Summarize which tensors of the MLLM match, and why the others are kept."""
        sizes = {name: self.mllm.spec(name).numel for name in self.kept}
        outside = sum(sizes[name] for name, reason in self.kept.items() if reason == OUTSIDE)
        parameters = self.mllm.numel - outside
        prefix, tensors = self._decoder.prefix, self._decoder.tensors
        names = {split_address(spec.name).name: key for key, spec in tensors.items()}
        kept = [
            Kept(
                "" if reason in (UNMATCHED, NO_MATRIX) else reason.partition(":")[0],
                module_of(names[name][1] if name in names else name.removeprefix(prefix)),
                sizes[name],
            )
            for name, reason in self.kept.items()
        ]
        matched = [Matched(m.module, m.shape[0] * m.shape[1]) for m in self.matrices]
        yield Finding(
            "ok",
            "shapes",
            f"{len(self.matrices)} decoder matrices of {len(self._decoder.layers)} layers match by "
            f"name and shape: of the language model, {describe_matrices(matched, parameters)}. "
            f"Kept: {describe_kept(kept, parameters)}.",
        )
        if self._unmatched:
            kinds = list(dict.fromkeys(module_of(rest) for _, rest in self._unmatched))
            (layer, rest), (has, lacks) = next(iter(self._unmatched.items()))
            yield Finding(
                "warning",
                "counterparts",
                f"Not in every model with one shape, and not merged: {listed(kinds)}. '{rest}' of "
                f"layer {layer} of '{has}' has no counterpart in '{lacks}'.",
                "Check that the models share one base.",
            )


def open_pair(
    mllm: Source,
    math: Source | Sequence[Source],
    base: Source | None = None,
    *,
    base_mllm: Source | None = None,
) -> ModelPair:
    """Open the models by their headers and match their decoder matrices, without reading weights.

    Args:
        mllm: the multimodal model: a folder, a hub id `org/name[@revision]`, or a Checkpoint. A
            LoRA adapter is applied to the base that it names.
        math: the expert, or a list of experts; LoRA adapters are applied to `base`.
        base: the text model that the experts (and the MLLM) were fine-tuned from. By default the
            one that the first adapter among the experts names.
        base_mllm: the text model that the MLLM was built on, if it differs from `base`.

    Raises:
        CheckpointError: a model cannot be opened.
        PairingError: the decoders do not match (ShapeError: differing shapes).
    """
    experts = [math] if isinstance(math, str | Path | Checkpoint) else list(math)
    if not experts:
        raise PairingError("No math model given; expected at least one expert.")
    root = open_model(base) if base is not None else named_base(experts)
    return ModelPair(
        open_model(mllm),
        [open_model(expert, base=root) for expert in experts],
        root,
        root if base_mllm is None else open_model(base_mllm),
    )


def _refuse_other_layout(mllm: Checkpoint) -> None:
    """Refuse an MLLM with tensors that the files of its layout do not have."""
    for spec in mllm.tensors.values():
        if spec.shard not in mllm.shards:
            raise PairingError(
                f"'{spec.name}' of the mllm '{mllm.id}' has the shape {spec.shape}, with which its "
                f"base does not store it; a merged model keeps the layout of its files. Merge the "
                f"adapter into its base with PEFT first (merge_and_unload)."
            )


def _match(
    base: Decoder, mllm: Decoder, root: Decoder, experts: Sequence[Decoder]
) -> tuple[MatrixMatch, ...]:
    matrices = base.matrices
    others = [decoder.matrices for decoder in (mllm, root, *experts)]
    return tuple(
        MatrixMatch(
            name=matrices[key].name,
            layer=key[0],
            module=module_of(key[1]),
            shape=(matrices[key].shape[0], matrices[key].shape[1]),
            mllm=others[0][key].name,
            base_mllm=others[1][key].name,
            math=tuple(expert[key].name for expert in others[2:]),
        )
        for key in sorted(matrices, key=_place)
        if all(key in other and other[key].shape == matrices[key].shape for other in others)
    )


def _place(key: tuple[int, str]) -> tuple[int, tuple[int, str, int, str], int]:
    """Return the sort key of a matrix: its layer, its module, and its expert."""
    layer, rest = key
    expert = expert_of(rest)
    return layer, module_order(module_of(rest)), expert[1] if expert else 0


def _is_norm_or_bias(rest: str, spec: TensorSpec) -> bool:
    """Return whether a tensor of a layer is a vector that is added or scales a normed input."""
    if len(spec.shape) != 1 or spec.dtype not in FLOAT_DTYPES or is_router(module_of(rest)):
        return False
    return rest.endswith(".bias") or "norm" in rest


def _vector(layer: int, specs: Sequence[TensorSpec]) -> MatrixMatch:
    base, mllm, own, *math = (spec.name for spec in specs)
    module = "bias" if split_address(base)[0].endswith(".bias") else "norm"
    shape = (1, specs[0].shape[0])
    return MatrixMatch(base, layer, module, shape, mllm, own, tuple(math))


def _reason_to_keep(
    spec: TensorSpec, decoder: Decoder, key: tuple[int, str] | None, between: bool
) -> str:
    """Return why a tensor is kept. `key` is its place in a layer; `between`, that it has none."""
    if key is None and ("embed_tokens" in spec.name or "lm_head" in spec.name):
        return VOCABULARY
    if spec.name in decoder.apart:
        return decoder.apart[spec.name]
    if key is None and not between:
        return OUTSIDE
    if spec.name.endswith(".bias"):
        return BIAS
    return NORM if len(spec.shape) == 1 and "norm" in spec.name else NO_MATRIX
