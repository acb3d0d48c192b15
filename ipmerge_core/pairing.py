"""Which tensors of the models correspond, why others do not, and whether the models are siblings.

In: an MLLM, one or several math LLMs, their common base (or one base per role). Out: a `ModelPair`
with one `MatrixMatch` per decoder matrix, a reason for every tensor of the MLLM that is kept, and
the findings of the sibling check. Names differ between layouts (`model.layers.0...`,
`language_model.model.layers.0...`, `model.language_model.layers.0...`), so the match is learned
from names and shapes in the headers: the decoder is the prefix under which the base's matrices are
found. Weights are read only by the check, and only a few small matrices.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ipmerge_core.checkpoint import FLOAT_DTYPES, Checkpoint, TensorSpec
from ipmerge_core.errors import PairingError, ShapeError

Source = str | Path | Checkpoint

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
_MATRIX = re.compile(
    r"(?P<prefix>.*?)layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?P<attention>[qkvo])|mlp\.(?P<mlp>gate|up|down))_proj\.weight"
)
SIBLING_DISTANCE = 0.1  # fine-tunes of one base usually lie closer than this
REFUSED_DISTANCE = 0.3  # unrelated models lie near sqrt(2)


@dataclass(frozen=True)
class MatrixMatch:
    """One decoder matrix under its name in each model. `name` is the base's name for it."""

    name: str
    layer: int
    module: str
    shape: tuple[int, int]
    mllm: str
    base_mllm: str
    math: tuple[str, ...]


class Finding(NamedTuple):
    """One line of the sibling check."""

    level: Literal["ok", "warning", "refusal"]
    subject: str
    message: str
    remedy: str = ""


class ModelPair:
    """An MLLM with its math experts and base, matched matrix by matrix; no weights in memory."""

    def __init__(
        self, mllm: Checkpoint, math: Sequence[Checkpoint], base: Checkpoint, base_mllm: Checkpoint
    ) -> None:
        self.mllm, self.math, self.base, self.base_mllm = mllm, tuple(math), base, base_mllm
        self.matrices = _match(self)

    @cached_property
    def kept(self) -> dict[str, str]:
        """Every tensor of the MLLM that no merge of matrices touches, with the reason."""
        matched = {matrix.mllm for matrix in self.matrices}
        prefix = _MATRIX.fullmatch(self.matrices[0].mllm)
        assert prefix is not None
        decoder = prefix["prefix"]
        return {
            name: _reason_to_keep(spec, decoder)
            for name, spec in self.mllm.tensors.items()
            if name not in matched
        }

    @property
    def name(self) -> str:
        """A short label: the folder or repository names of the MLLM and the experts."""
        return " + ".join(Path(model.id).name for model in (self.mllm, *self.math))

    def check(self) -> list[Finding]:
        """Compare the models from headers, configs and a few small matrices.

        Returns findings, each ok, warning or refusal, with the numbers and a remedy. A merge of a
        pair with a refusal is possible only when it is forced.
        """
        return [*_check_configs(self), *_check_dtypes(self), *_check_distances(self)]

    def roles(self) -> Iterator[tuple[str, Checkpoint]]:
        """Name each model: mllm, base, math (or math 1, math 2, ...), and base of the mllm."""
        yield "mllm", self.mllm
        yield "base", self.base
        if self.base_mllm is not self.base:
            yield "base of the mllm", self.base_mllm
        for number, expert in enumerate(self.math, 1):
            yield ("math" if len(self.math) == 1 else f"math {number}"), expert


def open_pair(
    mllm: Source,
    math: Source | Sequence[Source],
    base: Source,
    *,
    base_mllm: Source | None = None,
) -> ModelPair:
    """Open the models by their headers and match their decoder matrices; no weight is read.

    Args:
        mllm: the multimodal model: a folder, a hub id `org/name[@revision]`, or a Checkpoint.
        math: the expert, or a list of experts.
        base: the text model that the experts (and the MLLM) were fine-tuned from.
        base_mllm: the text model the MLLM was built on, where it is another one.

    Raises:
        CheckpointError: a model cannot be opened.
        PairingError: the models' decoders do not correspond (ShapeError: in a shape).
    """
    experts = [math] if isinstance(math, str | Path | Checkpoint) else list(math)
    if not experts:
        raise PairingError("No math model was given; expected at least one expert to merge.")
    root = _open(base)
    return ModelPair(
        _open(mllm),
        [_open(expert) for expert in experts],
        root,
        root if base_mllm is None else _open(base_mllm),
    )


def _open(source: Source) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else Checkpoint.open(source)


# --- matching ---


def _decoders(model: Checkpoint) -> dict[str, dict[tuple[int, str], TensorSpec]]:
    """Group the model's projection matrices by the prefix before `layers.`."""
    groups: dict[str, dict[tuple[int, str], TensorSpec]] = defaultdict(dict)
    for spec in model.tensors.values():
        found = _MATRIX.fullmatch(spec.name)
        if found and len(spec.shape) == 2 and spec.dtype in FLOAT_DTYPES:
            module = found["attention"] or found["mlp"]
            groups[found["prefix"]][int(found["layer"]), module] = spec
    return groups


def _base_decoder(base: Checkpoint) -> dict[tuple[int, str], TensorSpec]:
    groups = _decoders(base)
    if not groups:
        raise PairingError(
            f"The base '{base.id}' has no decoder matrices named like "
            f"'model.layers.0.self_attn.q_proj.weight' in a float dtype. Is it a text LLM?"
        )
    return max(groups.values(), key=len)


def _align(role: str, model: Checkpoint, base: Checkpoint) -> dict[tuple[int, str], TensorSpec]:
    """Return the model's matrix for each matrix of the base, under the prefix that fits best."""
    wanted = _base_decoder(base)
    groups = _decoders(model)
    if not groups:
        raise PairingError(
            f"The {role} model '{model.id}' has no decoder matrices named like "
            f"'...layers.0.self_attn.q_proj.weight'. Is its architecture a Llama-like decoder?"
        )
    best = max(groups.values(), key=lambda group: len(_same_shape(group, wanted)))
    if not _same_shape(best, wanted):
        best = max(groups.values(), key=lambda group: len(group.keys() & wanted.keys()))
    layers, expected = len({key[0] for key in best}), len({key[0] for key in wanted})
    if layers != expected:
        raise PairingError(
            f"The {role} model '{model.id}' has {layers} decoder layers and the base "
            f"'{base.id}' has {expected}. Both must descend from one base."
        )
    missing = sorted(wanted.keys() - best.keys())
    extra = sorted(best.keys() - wanted.keys())
    if missing or extra:
        layer, module = (missing or extra)[0]
        lacks, has = (model, base) if missing else (base, model)
        raise PairingError(
            f"Layer {layer} of '{has.id}' has a {module}_proj matrix and '{lacks.id}' has none. "
            f"Every decoder matrix needs its counterpart: do both descend from one base?"
        )
    for key, spec in wanted.items():
        if best[key].shape != spec.shape:
            raise ShapeError(
                f"'{best[key].name}' has shape {best[key].shape} in the {role} model "
                f"'{model.id}' but {spec.shape} in the base '{base.id}'. Task vectors need equal "
                f"shapes: are both fine-tuned from the same base?"
            )
    return best


def _same_shape(
    group: dict[tuple[int, str], TensorSpec], wanted: dict[tuple[int, str], TensorSpec]
) -> list[tuple[int, str]]:
    return [key for key, spec in wanted.items() if key in group and group[key].shape == spec.shape]


def _match(pair: ModelPair) -> tuple[MatrixMatch, ...]:
    base = _base_decoder(pair.base)
    mllm = _align("mllm", pair.mllm, pair.base)
    root = _align("mllm's base", pair.base_mllm, pair.base)
    experts = [_align("math", expert, pair.base) for expert in pair.math]
    order = sorted(base, key=lambda key: (key[0], MODULES.index(key[1])))
    return tuple(
        MatrixMatch(
            name=base[key].name,
            layer=key[0],
            module=key[1],
            shape=(base[key].shape[0], base[key].shape[1]),
            mllm=mllm[key].name,
            base_mllm=root[key].name,
            math=tuple(expert[key].name for expert in experts),
        )
        for key in order
    )


def _reason_to_keep(spec: TensorSpec, decoder: str) -> str:
    if "embed_tokens" in spec.name or "lm_head" in spec.name:
        return "vocabulary: rows belong to the MLLM's own tokens"
    if not spec.name.startswith(f"{decoder}layers.") and spec.name != f"{decoder}norm.weight":
        return "outside the language model"
    if spec.name.endswith(".bias"):
        return "bias: only matrices are merged"
    return "norm: only matrices are merged"


# --- the sibling check ---

_MUST_AGREE = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head dimension",
    "hidden_act": "activation",
}
_SHOULD_AGREE = {
    "rope_theta": "RoPE base frequency",
    "rms_norm_eps": "norm epsilon",
    "sliding_window": "sliding window",
    "tie_word_embeddings": "tied embeddings",
    "vocab_size": "vocabulary size",
}


def text_config(model: Checkpoint) -> dict[str, Any]:
    """Return the config of the model's language part, with the outer config's values below it."""
    inner = model.config.get("text_config") or model.config.get("llm_config") or {}
    merged = {**model.config, **inner}
    rope = merged.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        merged["rope_theta"] = rope["rope_theta"]
    return merged


def _check_configs(pair: ModelPair) -> Iterator[Finding]:
    base = text_config(pair.base)
    shapes = len(pair.matrices)
    yield Finding("ok", "shapes", f"{shapes} of {shapes} decoder matrices have equal shapes.")
    for role, model in pair.roles():
        if model is pair.base:
            continue
        config = text_config(model)
        for keys, level in ((_MUST_AGREE, "refusal"), (_SHOULD_AGREE, "warning")):
            for key, words in keys.items():
                ours, theirs = config.get(key), base.get(key)
                if ours is None or theirs is None or ours == theirs:
                    continue
                yield _difference(level, f"{role}: {words}", key, ours, theirs)  # type: ignore[arg-type]


def _difference(
    level: Literal["warning", "refusal"], subject: str, key: str, ours: object, theirs: object
) -> Finding:
    if key == "vocab_size":
        return Finding(
            "ok", subject, f"{ours} rows, {theirs} in the base: the MLLM's embeddings are kept."
        )
    return Finding(
        level,
        subject,
        f"{ours}, but {theirs} in the base.",
        "Models trained with different values rarely merge: is this the true base?",
    )


def _check_dtypes(pair: ModelPair) -> Iterator[Finding]:
    found = {
        role: sorted({model.spec(name).dtype for name in _names(pair, role)})
        for role, model in pair.roles()
    }
    text = ", ".join(f"{role} {'/'.join(dtypes)}" for role, dtypes in found.items())
    if len({tuple(dtypes) for dtypes in found.values()}) == 1:
        yield Finding("ok", "dtype", f"All decoders are stored as {next(iter(found.values()))[0]}.")
    else:
        yield Finding(
            "warning",
            "dtype",
            f"The decoders are stored in different dtypes: {text}.",
            "Differences then hold the coarser dtype's rounding; the noise floor shows how much.",
        )


def _names(pair: ModelPair, role: str) -> list[str]:
    if role == "mllm":
        return [matrix.mllm for matrix in pair.matrices]
    if role == "base":
        return [matrix.name for matrix in pair.matrices]
    if role == "base of the mllm":
        return [matrix.base_mllm for matrix in pair.matrices]
    number = int(role.removeprefix("math").strip() or 1) - 1
    return [matrix.math[number] for matrix in pair.matrices]


def sampled_matrices(pair: ModelPair) -> list[int]:
    """Choose three matrices, the smallest of the first, the middle and the last layer."""
    last = max(matrix.layer for matrix in pair.matrices)
    return [
        min(
            (index for index, matrix in enumerate(pair.matrices) if matrix.layer == layer),
            key=lambda index: pair.matrices[index].shape[0] * pair.matrices[index].shape[1],
        )
        for layer in sorted({0, last // 2, last})
    ]


def _check_distances(pair: ModelPair) -> Iterator[Finding]:
    sample = sampled_matrices(pair)
    for role, model in pair.roles():
        if model is pair.base or role == "base of the mllm":
            continue
        root_role = "base of the mllm" if role == "mllm" else "base"
        root = pair.base_mllm if role == "mllm" else pair.base
        names, root_names = _names(pair, role), _names(pair, "base")
        if root is not pair.base:
            root_names = _names(pair, "base of the mllm")
        distances = [
            _relative_distance(model, names[index], root, root_names[index]) for index in sample
        ]
        yield _judge_distance(role, root_role, model, root, max(distances))


def _relative_distance(model: Checkpoint, name: str, root: Checkpoint, root_name: str) -> float:
    """||W - W0||_F / ||W0||_F in fp64."""
    tuned, base = model.read(name).to(torch.float64), root.read(root_name).to(torch.float64)
    norm = float(base.norm())
    return float((tuned - base).norm()) / norm if norm else float("inf")


def _judge_distance(
    role: str, root_role: str, model: Checkpoint, root: Checkpoint, distance: float
) -> Finding:
    subject = f"{role}: distance to its base"
    if distance == 0:
        return Finding(
            "refusal",
            subject,
            f"'{model.id}' equals the base '{root.id}' in every sampled matrix: its task vector "
            f"is zero.",
            f"Give the fine-tuned model as {role}, or its true parent as base.",
        )
    if not distance <= REFUSED_DISTANCE:  # also catches NaN
        return Finding(
            "refusal",
            subject,
            f"{distance:.3g} of the weights' norm; fine-tunes lie below {SIBLING_DISTANCE}, "
            f"unrelated models near 1.4.",
            f"'{root.id}' is probably not the {root_role} of '{model.id}': give its true parent.",
        )
    if distance > SIBLING_DISTANCE:
        return Finding(
            "warning",
            subject,
            f"{distance:.3g} of the weights' norm, more than the {SIBLING_DISTANCE} usual for "
            f"fine-tunes.",
            "Large task vectors often merge badly: check that the base is the true parent.",
        )
    return Finding("ok", subject, f"{distance:.3g} of the weights' norm.")
