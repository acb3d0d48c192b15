"""The sibling check: do these models descend from one base? Asked before any work is done.

In: the models, each with its role and its names for the matched matrices. Out: findings, each ok,
warning or refusal, with the numbers and a remedy: configs, dtypes, and the relative distance to the
base over a few rows. For a base that cannot be the true one, the catalogue's is named if it knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from ipmerge_core.catalogue import likely_base
from ipmerge_core.checkpoint import Checkpoint, split_address
from ipmerge_core.decoders import text_config
from ipmerge_core.weight_files import ADAPTER_CONFIG

SIBLING_DISTANCE = 0.1  # fine-tunes of one base usually lie closer than this
REFUSED_DISTANCE = 0.3  # unrelated models lie near sqrt(2)
_ROWS = 256  # of each sampled matrix: a few megabytes in all, also where they come from the hub

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
_LEFT_OUT = {  # what a config means when it does not say
    "llama": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "mistral": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "qwen2": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6},
}

Level = Literal["ok", "warning", "refusal"]


class Finding(NamedTuple):
    """One line of the sibling check."""

    level: Level
    subject: str
    message: str
    remedy: str = ""


class Member(NamedTuple):
    """A model with its role, its name for each matched matrix, and the role of its base."""

    role: str
    model: Checkpoint
    names: Sequence[str]
    root: str | None


def check_siblings(members: Sequence[Member], sample: Sequence[int]) -> list[Finding]:
    """Compare configs, dtypes and, for the matrices of `sample`, distances to the base."""
    return [
        *_check_files(members),
        *_check_configs(members),
        *_check_dtypes(members),
        *_check_distances(members, sample),
    ]


def _check_files(members: Sequence[Member]) -> Iterator[Finding]:
    """Name what lies beside a model's weights and could be taken for them."""
    for member in members:
        model, weights = member.model, member.model.weights
        if weights.unused:
            first, *more = weights.unused
            read = weights.index or weights.shards[0]
            yield Finding(
                "warning",
                f"{member.role}: weight files",
                f"'{model.id}' is read from '{read}', as transformers loads it. Also in the "
                f"folder, and not read: '{first}'{f' and {len(more)} more' if more else ''}.",
                "If that is the model you mean, give it in a folder of its own; else delete it, as "
                "other programs may load it.",
            )
        if weights.has_adapter:
            yield Finding(
                "warning",
                f"{member.role}: adapter",
                f"'{model.id}' holds a PEFT adapter ('{ADAPTER_CONFIG}') beside its weights. Only "
                f"the weights are read and merged; transformers with PEFT adds the adapter.",
                "If it belongs to the model, merge it into the weights first (merge_and_unload), "
                "else delete it.",
            )


def _check_configs(members: Sequence[Member]) -> Iterator[Finding]:
    base = _settings(next(member.model for member in members if member.role == "base"))
    for member in members:
        if member.role == "base":
            continue
        config = _settings(member.model)
        for keys, level in ((_MUST_AGREE, "refusal"), (_SHOULD_AGREE, "warning")):
            for key, words in keys.items():
                ours, theirs = config.get(key), base.get(key)
                if ours is None or theirs is None or ours == theirs:
                    continue
                yield _difference(level, f"{member.role}: {words}", key, ours, theirs)  # type: ignore[arg-type]


def _settings(model: Checkpoint) -> dict[str, object]:
    """Return the text config, with the family's own defaults for what it leaves out."""
    config = text_config(model)
    defaults = (
        _LEFT_OUT.get(str(config.get("model_type")), {}) if "text_config" not in config else {}
    )
    return defaults | {key: value for key, value in config.items() if value is not None}


def _difference(level: Level, subject: str, key: str, ours: object, theirs: object) -> Finding:
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


def _check_dtypes(members: Sequence[Member]) -> Iterator[Finding]:
    found = {
        member.role: sorted({member.model.spec(name).dtype for name in member.names})
        for member in members
    }
    text = ", ".join(f"{role} {'/'.join(dtypes)}" for role, dtypes in found.items())
    if len({tuple(dtypes) for dtypes in found.values()}) == 1:
        dtypes = next(iter(found.values()))
        yield Finding("ok", "dtype", f"All decoders are stored as {'/'.join(dtypes)}.")
    else:
        yield Finding(
            "warning",
            "dtype",
            f"The decoders are stored in different dtypes: {text}.",
            "Differences then hold the coarser dtype's rounding; the noise floor shows how much.",
        )


def _check_distances(members: Sequence[Member], sample: Sequence[int]) -> Iterator[Finding]:
    by_role = {member.role: member for member in members}
    for member in members:
        if member.role == "base":
            continue
        root = by_role[member.root or "base"]
        distance = max(
            _relative_distance(member.model, member.names[i], root.model, root.names[i])
            for i in sample
        )
        yield _judge_distance(member, root, distance)


def _relative_distance(model: Checkpoint, name: str, root: Checkpoint, root_name: str) -> float:
    """||W - W0||_F / ||W0||_F in fp64, over the matrix' first rows."""
    tuned = model.read(_first_rows(model, name)).to(torch.float64)
    base = root.read(_first_rows(root, root_name)).to(torch.float64)
    norm = float(base.norm())
    return float((tuned - base).norm()) / norm if norm else float("inf")


def _first_rows(model: Checkpoint, name: str) -> str:
    stored, rows = split_address(name)
    start = rows.start if rows else 0
    return f"{stored}[{start}:{start + min(_ROWS, model.spec(name).shape[0])}]"


def _judge_distance(member: Member, root: Member, distance: float) -> Finding:
    model = member.model
    subject = f"{member.role}: distance to {'the base' if member.root is None else 'its base'}"
    if distance == 0 and member.root is not None:
        return Finding(
            "refusal",
            subject,
            f"'{model.id}' equals the base '{root.model.id}' in every sampled matrix: its task "
            f"vector is zero.",
            f"Give the fine-tuned model as {member.role}, or its true parent as base.",
        )
    if not distance <= REFUSED_DISTANCE:  # also catches NaN
        return Finding(
            "refusal",
            subject,
            f"{distance:.3g} of the weights' norm; fine-tunes lie below {SIBLING_DISTANCE}, "
            f"unrelated models near 1.4.",
            f"'{root.model.id}' is probably not the {root.role} of '{model.id}': "
            f"{_true_parent(model)}.",
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


def _true_parent(model: Checkpoint) -> str:
    known = likely_base(model)
    if known is None:
        return "give its true parent"
    return f"give its true parent, which is likely '{known}'"
