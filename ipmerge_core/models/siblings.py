"""The sibling check: verify that the models were fine-tuned from one base.

In: the models, each with its role and its names of the matched matrices. Out: findings, each ok,
warning or refusal, with the numbers and a remedy, about files, configs, dtypes, and how far and in
which parts a model differs from its base. If a base is probably wrong, the remedy names the
catalogued one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ipmerge_core.errors import CheckpointError
from ipmerge_core.models.catalogue import likely_base
from ipmerge_core.models.checkpoint import Checkpoint, split_address
from ipmerge_core.models.decoders import BIASES, EMBEDDINGS, HEAD, NORMS
from ipmerge_core.models.differences import (
    Differences,
    Measured,
    Part,
    find_differences,
    sample_differences,
    task_vector_products,
)
from ipmerge_core.models.forward_settings import forward_differences
from ipmerge_core.models.task_vectors import UNEQUAL
from ipmerge_core.models.weight_files import ADAPTER_CONFIG
from ipmerge_core.runtime.input_files import one_line

SIBLING_DISTANCE = 0.1  # typical upper limit for fine-tunes of one base
REFUSED_DISTANCE = 0.3  # unrelated models have a distance near sqrt(2)
_LISTED = 4  # maximum number of layers that a finding lists
_LONGEST_VALUE = 60  # characters of a setting that a finding shows

_MUST_AGREE = frozenset({"num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"})
_LABELS = {  # of settings whose key is not how one speaks of them
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "head dimension",
    "hidden_act": "activation",
    "rope_theta": "RoPE base frequency",
    "rope_type": "RoPE scaling",
    "rms_norm_eps": "norm epsilon",
    "sliding_window": "sliding window",
    "tie_word_embeddings": "tied embeddings",
    "vocab_size": "vocabulary size",
}

Level = Literal["ok", "warning", "refusal"]


class Finding(NamedTuple):
    """One result of the sibling check."""

    level: Level
    subject: str
    message: str
    remedy: str = ""


class Member(NamedTuple):
    """A model with its role, its names of the matched matrices, and the role of its base.

    `others` are the other tensors of its language model by (kind, layer, name inside the layer).
    """

    role: str
    model: Checkpoint
    names: Sequence[str]
    root: str | None
    others: Mapping[tuple[str, int, str], str]


def check_siblings(
    members: Sequence[Member], places: Sequence[tuple[str, int]], *, exact: bool = False
) -> list[Finding]:
    """Check files, configs, dtypes and weights; `places` are the matrices' modules and layers.

    With `exact` the task vectors are compared over all weights instead of samples.
    """
    return [
        *_check_files(members),
        *_check_repeated(members),
        *_check_configs(members),
        *_check_dtypes(members),
        *_check_distances(members, places),
        *_compare_task_vectors(members, places, exact=exact),
    ]


def _check_files(members: Sequence[Member]) -> Iterator[Finding]:
    """Report computed values, and other files that could be mistaken for the model's weights."""
    for member in members:
        model, weights = member.model, member.model.weights
        if (remark := model.remark) is not None:
            yield Finding(
                "warning" if remark.remedy else "ok",
                f"{member.role}: {remark.subject}",
                remark.message,
                remark.remedy,
            )
        if weights.unused:
            first, *more = weights.unused
            read = weights.index or weights.shards[0]
            yield Finding(
                "warning",
                f"{member.role}: weight files",
                f"'{model.id}' is read from '{read}', as in transformers. Ignored in the same "
                f"folder: '{first}'{f' and {len(more)} more' if more else ''}.",
                "If that is the intended model, move it to a separate folder; otherwise delete it, "
                "as other programs may load it.",
            )
        if weights.has_adapter:
            yield Finding(
                "warning",
                f"{member.role}: adapter",
                f"'{model.id}' contains both weights and a PEFT adapter ('{ADAPTER_CONFIG}'). Only "
                f"the weights are merged; transformers with PEFT would apply the adapter.",
                "If it belongs to the model, merge it into the weights first (merge_and_unload); "
                "otherwise delete it.",
            )


def _check_repeated(members: Sequence[Member]) -> Iterator[Finding]:
    """Refuse an expert that is given more than once: the same weights, under any name."""
    first: dict[str, Member] = {}
    for member in members:
        if member.root is None or not member.role.startswith("math"):
            continue
        twin = first.setdefault(member.model.fingerprint, member)
        if twin is not member:
            yield Finding(
                "refusal",
                f"{member.role}: repeated",
                f"'{member.model.id}' has the same weights as {twin.role}, '{twin.model.id}': its "
                f"update would be merged twice.",
                "List every expert once; to count one more, raise its weight or lambda.",
            )


def _check_configs(members: Sequence[Member]) -> Iterator[Finding]:
    """Report every setting of a forward pass that differs from the base's."""
    base = next(member.model for member in members if member.role == "base")
    for member in members:
        if member.role == "base":
            continue
        try:
            differences = forward_differences(member.model, base)
        except CheckpointError as error:
            yield Finding(
                "warning", f"{member.role}: config", str(error), "Its settings were not compared."
            )
            continue
        for key, ours, theirs in differences:
            yield _difference(f"{member.role}: {_LABELS.get(key, key)}", key, ours, theirs)


def _difference(subject: str, key: str, ours: object, theirs: object) -> Finding:
    if key == "vocab_size":
        return Finding(
            "ok",
            subject,
            f"{one_line(ours)} rows, {one_line(theirs)} in the base: the MLLM's embeddings are "
            f"kept.",
        )
    if key == "tie_word_embeddings":
        return Finding(
            "ok",
            subject,
            f"{one_line(ours)}, {one_line(theirs)} in the base: the MLLM's embeddings and output "
            f"head are kept by default.",
        )
    return Finding(
        "refusal" if key in _MUST_AGREE else "warning",
        subject,
        f"{one_line(ours)}, but {one_line(theirs)} in the base.",
        "Models trained with different values rarely merge well: is this the right base?",
    )


def _check_dtypes(members: Sequence[Member]) -> Iterator[Finding]:
    found = {
        member.role: sorted({_stored_dtype(member.model, name) for name in member.names})
        for member in members
    }
    text = ", ".join(f"{role} {'/'.join(dtypes)}" for role, dtypes in found.items())
    if len({tuple(dtypes) for dtypes in found.values()}) == 1:
        dtypes = next(iter(found.values()))
        yield Finding("ok", "dtype", f"All decoders are stored as {'/'.join(dtypes)}.")
        return
    fp8 = any(member.model.dequantised for member in members)  # its rounding has a finding
    yield Finding(
        "warning",
        "dtype",
        f"The decoders are stored in different dtypes: {text}.",
        "Task vectors then include the rounding of the coarser dtype"
        f"{'.' if fp8 else '; see the noise floor.'}",
    )


def _stored_dtype(model: Checkpoint, name: str) -> str:
    files = model.dequantised
    return files.stored_dtype(split_address(name)[0]) if files else model.spec(name).dtype


def _check_distances(
    members: Sequence[Member], places: Sequence[tuple[str, int]]
) -> Iterator[Finding]:
    by_role = {member.role: member for member in members}
    for member in members:
        if member.role == "base":
            continue
        root = by_role[member.root or "base"]
        matrices = _matrices(member, root, places)
        if member.root is None:  # a base, which may equal the other one
            found = sample_differences(member.model, root.model, matrices)
        else:
            found = find_differences(member.model, root.model, matrices, _others(member, root))
        yield _judge(member, root, found)


def _compare_task_vectors(
    members: Sequence[Member], places: Sequence[tuple[str, int]], *, exact: bool
) -> Iterator[Finding]:
    """Report the norm ratio and the cosine of the MLLM's task vector and of each expert's."""
    by_role = {member.role: member for member in members}

    def compared(member: Member) -> tuple[Checkpoint, Checkpoint, list[Part]]:
        root = by_role[member.root or "base"]
        return member.model, root.model, _matrices(member, root, places)

    mllm, *rest = members
    for member in rest:
        if not member.role.startswith("math"):
            continue
        found = task_vector_products([compared(mllm), compared(member)], exact=exact)
        if not found.describe():
            continue  # a zero task vector or damaged weights, which other findings report
        where = "over all decoder matrices" if exact else "in the sampled rows"
        subject, message = f"{member.role}: task vector", f"{found.describe()} {where}."
        if not found.is_unequal:
            yield Finding("ok", subject, message)
            continue
        yield Finding(
            "warning",
            subject,
            f"{message} One task vector is more than {UNEQUAL:g} times as large as the other.",
            "Plain averages and sums of such models tend to lose quality (DRIFT, arXiv "
            "2510.15050): lower the weight of the larger one, or use a method that rescales, such "
            "as ip_merging.",
        )


def _matrices(member: Member, root: Member, places: Sequence[tuple[str, int]]) -> list[Part]:
    return [
        Part(f"{module}_proj", layer, name, base)
        for (module, layer), name, base in zip(places, member.names, root.names, strict=True)
    ]


def _others(member: Member, root: Member) -> list[Part]:
    """Match the other tensors; a tensor that only one model stores is skipped."""
    return [
        Part(kind, layer, name, root.others[kind, layer, rest])
        for (kind, layer, rest), name in member.others.items()
        if (kind, layer, rest) in root.others
    ]


def _judge(member: Member, root: Member, found: Differences) -> Finding:
    subject = f"{member.role}: distance to {'the base' if member.root is None else 'its base'}"
    if not found.changed and member.root is not None:
        return _judge_equal(member, root, found, subject)
    if found.damaged is not None:
        return _judge_damaged(member, root, found.damaged, subject)
    kind, distance = found.largest
    if distance > REFUSED_DISTANCE:
        return Finding(
            "refusal",
            subject,
            f"{distance:.3g} of the weights' norm in {kind}; typically below "
            f"{SIBLING_DISTANCE} for fine-tunes, near 1.4 for unrelated models.",
            f"'{root.model.id}' is probably not the {root.role} of '{member.model.id}': "
            f"{_true_parent(member.model)}.",
        )
    message = f"{distance:.3g} of the weights' norm{_where(found)}."
    if distance > SIBLING_DISTANCE:
        return Finding(
            "warning",
            subject,
            f"{message} Fine-tunes are typically below {SIBLING_DISTANCE}.",
            "Large task vectors often merge badly: check that the base is the right one.",
        )
    return Finding("ok", subject, message)


def _judge_damaged(member: Member, root: Member, found: Measured, subject: str) -> Finding:
    ours, theirs = found.bad
    name, model = (found.part.name, member.model) if ours else (found.part.root, root.model)
    return Finding(
        "refusal",
        subject,
        f"'{name}' of '{model.id}' has {ours or theirs} NaN or infinite values in the compared "
        f"rows.",
        "The file is damaged or the training diverged: use another copy.",
    )


def _judge_equal(member: Member, root: Member, found: Differences, subject: str) -> Finding:
    """Return the finding for a model whose compared matrices all equal its base's."""
    equal = f"'{member.model.id}' equals the base '{root.model.id}' in"
    remedy = f"Use the fine-tuned model as {member.role}, or the model it was trained from as base."
    if found.unread:
        seen = f", and differs in its {_join(found.extras)}" if found.extras else ""
        return Finding(
            "warning",
            subject,
            f"{equal} the first rows of every decoder matrix{seen}. Not compared: {found.unread}. "
            f"Its task vector is probably zero.",
            remedy,
        )
    uncompared = sorted({key[0] for key in member.others.keys() ^ root.others.keys()} - {HEAD})
    if not found.extras and not uncompared:
        return Finding(
            "refusal",
            subject,
            f"{equal} every tensor of the language model: its task vector is zero.",
            remedy,
        )
    differs = f" It differs in its {_join(found.extras)}." if found.extras else ""
    apart = f" Not compared, as stored differently: {_join(uncompared)}." if uncompared else ""
    return Finding(
        "warning",
        subject,
        f"{equal} every decoder matrix, so that nothing is merged by default.{differs}{apart}",
        " ".join(filter(None, (_way_to_merge(found.extras), remedy))),
    )


def _way_to_merge(kinds: Sequence[str]) -> str:
    """Return the plan options that include tensors of these kinds."""
    options = ["norms=merge"] * bool({NORMS, BIASES} & set(kinds))
    options += ["embeddings=merge-shared"] * bool({EMBEDDINGS, HEAD} & set(kinds))
    return f"Plan with {' and '.join(options)} to merge them." if options else ""


def _where(found: Differences) -> str:
    """Describe which matrices differ; empty if all sampled ones do."""
    changed = {found.part for found in found.changed}
    if not found.sampled:
        (part,) = changed
        return (
            f" in rows of {part.kind} of layer {part.layer}; the first rows of every matrix equal "
            f"the base's"
        )
    all_parts = {found.part for found in found.compared}
    if changed in (all_parts, set()):
        return ""
    kinds = {part.kind: sorted(p.layer for p in changed if p.kind == part.kind) for part in changed}
    layers = next(iter(kinds.values()))
    alike = all(other == layers for other in kinds.values())
    sampled = sorted({part.layer for part in all_parts})
    in_order = list(dict.fromkeys(found.part.kind for found in found.compared))
    names = _name_kinds([kind for kind in in_order if kind in kinds])
    rest = _name_kinds([kind for kind in in_order if kind not in kinds])
    place = (
        f"{_join(names)} of {_name_layers(layers, sampled)}"
        if alike
        else f"{len(changed)} of {len(all_parts)} matrices sampled, of {_join(names)}"
    )
    others = _join(rest) or "all others"
    verb = "equals" if len(rest) == 1 else "equal"
    return f" in {place}; {others} {verb} the base's"


def _name_kinds(kinds: Sequence[str]) -> list[str]:
    """Name kinds of matrices, combined to "the attention" and "the MLP" where complete."""
    names = list(kinds)
    for whole, parts in (("the attention", "qkvo"), ("the MLP", ("gate", "up", "down"))):
        of_whole = [f"{part}_proj" for part in parts]
        if set(of_whole) <= set(names):
            names[names.index(of_whole[0])] = whole
            names = [name for name in names if name not in of_whole]
    return names


def _name_layers(layers: Sequence[int], sampled: Sequence[int]) -> str:
    if list(layers) == list(sampled):
        return "all layers sampled"
    if len(layers) > _LISTED:
        return f"{len(layers)} of {len(sampled)} layers"
    return f"layer{'s' * (len(layers) > 1)} {_join([str(layer) for layer in layers])}"


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _true_parent(model: Checkpoint) -> str:
    known = likely_base(model)
    if known is None:
        return "specify the model it was trained from"
    return f"specify the model it was trained from, probably '{known}'"
