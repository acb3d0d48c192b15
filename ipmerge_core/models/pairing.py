"""Match the decoder tensors of an MLLM, its experts and their base.

In: an MLLM, one or several math LLMs, their common base (or one base per role). Out: a `ModelPair`
with one `MatrixMatch` per decoder matrix, a reason for every tensor of the MLLM that is kept, and
the findings of the sibling check. Names differ between layouts, so each model's decoder is the one
whose tensors and shapes equal the base's. A decoder tensor without a counterpart raises an error
that names it. Only the sibling check reads weights, and only a few rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ipmerge_core.errors import PairingError, RunError, ShapeError
from ipmerge_core.models.checkpoint import (
    FLOAT_DTYPES,
    Checkpoint,
    TensorSpec,
    as_tensor,
    count_non_finite,
    split_address,
)
from ipmerge_core.models.decoders import (
    MODULES,
    Decoder,
    find_decoders,
    refuse_unsupported,
    text_config,
)
from ipmerge_core.models.files import FROM_DISK, OVER_NETWORK, Pace, Stamp
from ipmerge_core.models.low_rank import Factors
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
        self._decoder = _align("mllm", mllm, base, root)
        own = root if base_mllm is base else _align("mllm's base", base_mllm, base, root)
        experts = [_align("math model", expert, base, root) for expert in self.math]
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
            if len(spec.shape) == 1 and spec.dtype in FLOAT_DTYPES
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
    def kept(self) -> dict[str, str]:
        """The tensors of the MLLM that merging matrices leaves unchanged, each with the reason."""
        matched = {split_address(matrix.mllm)[0] for matrix in self.matrices}
        return {
            name: _reason_to_keep(spec, self._decoder)
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
        places = [(matrix.module, matrix.layer) for matrix in self.matrices]
        return [self._tensor_finding(), *check_siblings(list(self._members()), places, exact=exact)]

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
            stored, _ = split_address(name)
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
        for member in self._members():
            yield member.role, member.model

    def _members(self) -> Iterator[Member]:
        own_base = self.base_mllm is not self.base
        root = "base of the mllm" if own_base else "base"
        others = [decoder.other_tensors(model) for model, decoder in self.sides]
        yield Member("mllm", self.mllm, [m.mllm for m in self.matrices], root, others[1])
        yield Member("base", self.base, [m.name for m in self.matrices], None, others[0])
        if own_base:
            names = [m.base_mllm for m in self.matrices]
            yield Member("base of the mllm", self.base_mllm, names, None, others[2])
        for k, expert in enumerate(self.math):
            role = "math" if len(self.math) == 1 else f"math {k + 1}"
            yield Member(role, expert, [m.math[k] for m in self.matrices], "base", others[3 + k])

    def _tensor_finding(self) -> Finding:
        """Summarize which tensors of the MLLM match, and why the others are kept."""
        reasons = Counter(reason.partition(":")[0] for reason in self.kept.values())
        kept = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        message = (
            f"{len(self.matrices)} decoder matrices of {len(self._decoder.layers)} layers match by "
            f"name and shape. Kept: {kept or 'nothing'}."
        )
        experts = [name for name, reason in self.kept.items() if reason.startswith("mixture")]
        if not experts:
            return Finding("ok", "shapes", message)
        share = sum(self.mllm.spec(name).numel for name in experts) / self.mllm.numel
        return Finding(
            "warning",
            "shapes",
            message,
            f"The experts of this mixture are {share:.0%} of its parameters and are kept: only "
            f"attention is merged.",
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


def _align(role: str, model: Checkpoint, base: Checkpoint, wanted: Decoder) -> Decoder:
    """Return the model's decoder that matches the base's tensor by tensor."""
    fits = [(_fit(decoder, wanted), decoder) for decoder in find_decoders(role, model)]
    best, decoder = max(fits, key=lambda fit: fit[0])
    twins = [other.prefix for fit, other in fits if fit == best]
    if len(twins) > 1 and best[0]:
        raise PairingError(
            f"The {role} '{model.id}' has {len(twins)} decoders that match the base '{base.id}' "
            f"equally well, under {', '.join(repr(twin) for twin in twins)}: the choice is "
            f"ambiguous."
        )
    layers, expected = len(decoder.layers), len(wanted.layers)
    if layers != expected:
        raise PairingError(
            f"The {role} '{model.id}' has {layers} decoder layers and the base '{base.id}' has "
            f"{expected}. Both must share one base."
        )
    refuse_unsupported(model, decoder)
    holes = sorted(wanted.tensors.keys() ^ decoder.tensors.keys())
    if holes:
        layer, rest = holes[0]
        has, lacks = (base, model) if holes[0] in wanted.tensors else (model, base)
        raise PairingError(
            f"Layer {layer} of '{has.id}' has '{rest}' but '{lacks.id}' does not. Every tensor of "
            f"the decoder needs a counterpart: do both share one base?"
        )
    for key, spec in wanted.tensors.items():
        if decoder.tensors[key].shape != spec.shape:
            raise ShapeError(
                f"'{decoder.tensors[key].name}' has shape {decoder.tensors[key].shape} in the "
                f"{role} '{model.id}' but {spec.shape} in the base '{base.id}'. Task vectors need "
                f"equal shapes: are both fine-tuned from the same base?"
            )
    return decoder


def _fit(decoder: Decoder, wanted: Decoder) -> tuple[int, int]:
    """Count the tensors that match in name and shape, and those that match in name."""
    shared = [key for key in wanted.tensors if key in decoder.tensors]
    equal = [key for key in shared if decoder.tensors[key].shape == wanted.tensors[key].shape]
    return len(equal), len(shared)


def _match(
    base: Decoder, mllm: Decoder, root: Decoder, experts: Sequence[Decoder]
) -> tuple[MatrixMatch, ...]:
    matrices = base.matrices
    others = [decoder.matrices for decoder in (mllm, root, *experts)]
    order = sorted(matrices, key=lambda key: (key[0], MODULES.index(key[1])))
    return tuple(
        MatrixMatch(
            name=matrices[key].name,
            layer=key[0],
            module=key[1],
            shape=(matrices[key].shape[0], matrices[key].shape[1]),
            mllm=others[0][key].name,
            base_mllm=others[1][key].name,
            math=tuple(expert[key].name for expert in others[2:]),
        )
        for key in order
    )


def _vector(layer: int, specs: Sequence[TensorSpec]) -> MatrixMatch:
    base, mllm, own, *math = (spec.name for spec in specs)
    module = "bias" if split_address(base)[0].endswith(".bias") else "norm"
    shape = (1, specs[0].shape[0])
    return MatrixMatch(base, layer, module, shape, mllm, own, tuple(math))


def _reason_to_keep(spec: TensorSpec, decoder: Decoder) -> str:
    if "embed_tokens" in spec.name or "lm_head" in spec.name:
        return VOCABULARY
    if spec.name in decoder.apart:
        return decoder.apart[spec.name]
    if not spec.name.startswith(f"{decoder.prefix}layers.") and spec.name != (
        f"{decoder.prefix}norm.weight"
    ):
        return OUTSIDE
    return BIAS if spec.name.endswith(".bias") else NORM
