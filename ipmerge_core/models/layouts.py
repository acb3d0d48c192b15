"""Give the tensors of a decoder block the names of one common layout.

In: the tensors of one layer by their stored names. Out: the same tensors by names as in Llama and
Qwen: fused projections are split by rows, stacked experts are split into one matrix each, and
`block_sparse_moe`, `feed_forward` and `w1` have the names that other families use. The parts are
addresses (see `addresses`); nothing is read. Names without a counterpart in that layout stay as
stored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ipmerge_core.errors import PairingError, ShapeError
from ipmerge_core.models.addresses import Address
from ipmerge_core.models.checkpoint import Checkpoint, TensorSpec
from ipmerge_core.runtime.input_files import InvalidContentError, Schema

_RENAMED = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(block_sparse_moe|feed_forward|mlp\.text_moe)\.", "mlp."),
        (r"^mlp\.(gate|router\.layer)\.", "mlp.router."),
        (r"^self_attn\.out_proj\.", "self_attn.o_proj."),
        (r"^(mlp\.(?:experts\.[0-9]{1,6}\.)?)w1\.", r"\1gate_proj."),
        (r"^(mlp\.(?:experts\.[0-9]{1,6}\.)?)w2\.", r"\1down_proj."),
        (r"^(mlp\.(?:experts\.[0-9]{1,6}\.)?)w3\.", r"\1up_proj."),
        (r"^shared_mlp\.input_linear\.", "shared_mlp.gate_up_proj."),
        (r"^shared_mlp\.output_linear\.", "shared_mlp.down_proj."),
        (r"^mlp\.(experts\.fc1|input_linear)\.weight$", "mlp.experts.gate_up_proj"),
        (r"^mlp\.(experts\.fc2|output_linear)\.weight$", "mlp.experts.down_proj"),
    )
]
_STACKED = re.compile(
    r"(?P<place>(?:.+\.)?experts)\.(?P<kind>gate_up|gate|up|down)_proj(?:\.weight)?", re.DOTALL
)
_FUSED = re.compile(r"(?P<place>.+)\.(?P<kind>qkv|gate_up)_proj\.(?P<end>weight|bias)", re.DOTALL)
_MOST_EXPERTS = 4096
Size = Annotated[int, Field(gt=0, lt=2**31)]
Layer = Mapping[str, TensorSpec]


def in_common_layout(model: Checkpoint, config: Mapping[str, Any], layer: Layer) -> Layer:
    """Return the tensors of a layer by their names in the common layout.

    Args:
        model: the checkpoint of the tensors, which resolves addresses.
        config: the config of the language model.
        layer: header entries by the stored name inside the layer.

    Raises:
        PairingError, ShapeError: a fused projection cannot be split by the config.
    """
    named: dict[str, TensorSpec] = {}
    for stored, spec in layer.items():
        name = stored
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        named[stored if name in named else name] = spec
    stacks = _stacks(named)
    found: dict[str, TensorSpec] = {}
    for name, spec in named.items():
        if name in stacks:
            parts = _split_stack(stacks[name], config, named)
        else:
            parts = _split_rows(model, config, name, spec)
        entries = [(part, model.spec(str(address))) for part, address in parts] or [(name, spec)]
        found.update(entries)
    return found


# --- experts of a mixture, stacked in one tensor ---


class _Stack(NamedTuple):
    """A stack of matrices, one per expert, with the shapes of all stacks of its mixture."""

    place: str
    kind: str
    spec: TensorSpec
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def transposed(self) -> bool | None:
        """Whether (experts, in, out) is stored, or (experts, out, in); None if unknown.

        The inner size of the down projections is that of gate and up, which determines the
        orientation of a fused gate_up; without it the hidden size does.
        """
        fused, down = self.shapes.get("gate_up"), self.shapes.get("down")
        if fused is None or down is None:
            return None
        if fused[1:] == (2 * down[2], down[1]):
            return False
        return True if fused[1:] == (down[2], 2 * down[1]) else None

    def transposed_by(self, hidden: object) -> bool | None:
        """Whether the stack is transposed, judged by the hidden size if gate and up are apart."""
        if "gate_up" in self.shapes:
            return self.transposed
        _, rows, columns = self.spec.shape
        outer, inner = (columns, rows) if self.kind == "down" else (rows, columns)
        if hidden == inner:
            return False
        return True if hidden == outer else None


def _stacks(layer: Layer) -> dict[str, _Stack]:
    places: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    found: dict[str, _Stack] = {}
    for name, spec in layer.items():
        match = _STACKED.fullmatch(name)
        if match and len(spec.shape) == 3 and spec.numel and spec.shape[0] <= _MOST_EXPERTS:
            shapes = places[match["place"]]
            shapes[match["kind"]] = spec.shape
            found[name] = _Stack(match["place"], match["kind"], spec, shapes)
    return found


def _split_stack(
    stack: _Stack, config: Mapping[str, Any], layer: Layer
) -> Iterator[tuple[str, Address]]:
    """Yield the matrix of each expert; none if the orientation is unknown.

    gate_up with biases (gpt-oss) alternates rows of gate and up and is one matrix.
    """
    transposed = stack.transposed_by(config.get("hidden_size"))
    if transposed is None:
        return
    experts, first, second = stack.spec.shape
    rows = second if transposed else first
    halves: Mapping[str, range | None] = {stack.kind: None}
    if stack.kind == "gate_up" and f"{stack.place}.gate_up_proj_bias" not in layer:
        halves = {"gate": range(rows // 2), "up": range(rows // 2, rows)}
    for expert in range(experts):
        for kind, part in halves.items():
            address = Address(stack.spec.name, expert, transposed, part)
            yield f"{stack.place}.{expert}.{kind}_proj.weight", address


# --- projections that are rows of one matrix ---


def _split_rows(
    model: Checkpoint, config: Mapping[str, Any], name: str, spec: TensorSpec
) -> Iterator[tuple[str, Address]]:
    """Yield the parts of a fused `qkv_proj` or `gate_up_proj`; none for other tensors."""
    match = _FUSED.fullmatch(name)
    if match is None or not spec.shape:
        return
    if match["kind"] == "qkv" and match["place"] != "self_attn":
        return
    if match["kind"] == "qkv":
        sizes = dict(zip("qkv", _qkv_rows(model, config, spec), strict=True))
    else:
        sizes = dict.fromkeys(("gate", "up"), spec.shape[0] // 2)
    start = 0
    for kind, size in sizes.items():
        address = Address(spec.name, rows=range(start, start + size))
        yield f"{match['place']}.{kind}_proj.{match['end']}", address
        start += size


@dataclass(frozen=True)
class _Heads:
    """The fields of a config that determine the rows of q, k and v."""

    num_attention_heads: Size
    hidden_size: Size
    head_dim: Size | None
    num_key_value_heads: Size | None


_HEADS = Schema[_Heads](_Heads)


def _qkv_rows(model: Checkpoint, model_config: Mapping[str, Any], spec: TensorSpec) -> list[int]:
    """Compute the rows of q, k and v in a fused projection from the number of heads."""
    names = [each.name for each in fields(_Heads)]
    try:
        config = _HEADS.validate({key: model_config.get(key) for key in names})
    except InvalidContentError as error:
        raise PairingError(
            f"'{spec.name}' of '{model.id}' is a fused q, k and v projection, which cannot be "
            f"split by its config: {error}."
        ) from error
    heads = config.num_attention_heads
    head = config.head_dim or config.hidden_size // heads
    keys = (config.num_key_value_heads or heads) * head
    if heads * head + 2 * keys != spec.shape[0]:
        raise ShapeError(
            f"'{spec.name}' of '{model.id}' has {spec.shape[0]} rows; {heads} query heads and "
            f"{keys // head} key/value heads of {head} require {heads * head + 2 * keys}."
        )
    return [heads * head, keys, keys]
