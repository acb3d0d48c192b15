"""Replace the matrices of one module in one block, which knocks that module out.

In: the decoder matrices of a model (of an opened pair, or of a folder alone), and a `Cut`: a block,
a module and what replaces its weights. Out: the stored tensors with the replacement, in the dtype
of the model. Depends on no model family: a block's modules are found by tensor names in the common
layout. Loads and runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ipmerge_core.errors import PlanError
from ipmerge_core.models.addresses import split_address
from ipmerge_core.models.checkpoint import DTYPES, Checkpoint, arranged, part_of
from ipmerge_core.models.decoders import find_decoders, text_config
from ipmerge_core.models.matrix_kinds import is_router, module_of, module_order
from ipmerge_core.models.pairing import ModelPair

CutValue: TypeAlias = Literal["constant", "zero", "base", "math", "update"]
VALUES: tuple[CutValue, ...] = get_args(CutValue)
OF_A_PAIR = ("base", "math", "update")  # these need the models that a merge was made from
VALUE_LABELS: Mapping[CutValue, str] = {
    "constant": "every weight 1/N, N the number of output features",
    "zero": "zeros",
    "base": "the weights of the base",
    "math": "the weights of the math model",
    "update": "the weights of the unmerged model, which removes the update alone",
}
ATTENTION, MLP = "attention", "mlp"
BLOCKS = (ATTENTION, MLP)


@dataclass(frozen=True)
class CutMatrix:
    """One decoder matrix: its layer and module, and its address in each model.

    `base` and `math` are empty if the model was opened without the models of a merge.
    """

    layer: int
    module: str
    address: str
    base: str = ""
    math: str = ""


class Cut(NamedTuple):
    """A module of one block, and what replaces its weights.

    `module` is "attention" or "mlp" for all matrices of that kind, or a single module such as "q".
    """

    layer: int
    module: str
    value: CutValue = "constant"

    @property
    def key(self) -> str:
        """A short text that identifies the cut."""
        return f"cut:{self.layer}:{self.module}:{self.value}"

    def covers(self, matrix: CutMatrix) -> bool:
        """Return whether a matrix is replaced."""
        own = self.module in (matrix.module, block_module(matrix.module))
        return matrix.layer == self.layer and own


def block_module(module: str) -> str:
    """Return the part of a block that a module belongs to: attention or MLP.

    >>> block_module("q"), block_module("down"), block_module("linear_attn.in_proj_qkv")
    ('attention', 'mlp', 'attention')
    >>> block_module("mlp.experts.up_proj")
    'mlp'
    """
    first = module.partition(".")[0]
    return ATTENTION if module in ("q", "k", "v", "o") or "att" in first else MLP


def matrices_of_pair(pair: ModelPair) -> tuple[CutMatrix, ...]:
    """List the matrices of a pair's MLLM that a cut can replace; routers are kept."""
    return tuple(
        CutMatrix(matrix.layer, matrix.module, matrix.mllm, matrix.name, matrix.math[0])
        for matrix in pair.matrices
        if not is_router(matrix.module)
    )


def matrices_of_model(model: Checkpoint) -> tuple[CutMatrix, ...]:
    """List the matrices of a model's language decoder that a cut can replace; routers are kept.

    The decoder is the group of layers that has as many as the config of the language model states,
    or otherwise the one with the most tensors. Raises: PairingError if there is none.
    """
    decoders = find_decoders("model", model)
    stated = text_config(model).get("num_hidden_layers")
    fitting = [decoder for decoder in decoders if len(decoder.layers) == stated]
    decoder = (fitting or decoders)[0]
    return tuple(
        CutMatrix(layer, module_of(rest), spec.name)
        for (layer, rest), spec in decoder.matrices.items()
        if not is_router(module_of(rest))
    )


def list_cuts(
    matrices: Iterable[CutMatrix],
    value: CutValue = "constant",
    *,
    layers: Iterable[int] | None = None,
    modules: Sequence[str] = BLOCKS,
) -> list[Cut]:
    """List the cuts of a model, layer by layer.

    Args:
        matrices: its matrices.
        value: what replaces the weights.
        layers: only these layers; by default all.
        modules: "attention", "mlp", or single modules such as "q" and "down".

    Raises: PlanError for a layer or a module that the model does not have.
    """
    matrices = list(matrices)
    known = sorted({matrix.layer for matrix in matrices})
    chosen = known if layers is None else sorted(set(layers))
    if unknown := sorted(set(chosen) - set(known)):
        raise PlanError(
            f"The model has no layer {unknown[0]}. Its {len(known)} layers are {known[0]} to "
            f"{known[-1]}."
        )
    found = [Cut(layer, module, value) for layer in chosen for module in modules]
    cuts = [cut for cut in found if any(map(cut.covers, matrices))]
    _check_modules(matrices, modules, cuts)
    return cuts


def _check_modules(
    matrices: Sequence[CutMatrix], modules: Sequence[str], cuts: Sequence[Cut]
) -> None:
    missing = [module for module in modules if module not in {cut.module for cut in cuts}]
    if missing or not modules:
        kinds = sorted({matrix.module for matrix in matrices}, key=module_order)
        raise PlanError(
            f"No chosen layer has the module '{missing[0][:80] if missing else ''}'. Available: "
            f"{', '.join((*BLOCKS, *kinds))}."
        )


def strided(layers: Sequence[int], stride: int) -> list[int]:
    """Return every `stride`-th layer, the first one included. Raises: PlanError below 1.

    >>> strided(range(8), 3)
    [0, 3, 6]
    """
    if stride < 1:
        raise PlanError(f"The stride is {stride}; expected 1 (every layer) or more.")
    return list(layers)[::stride]


def cut_tensors(
    cut: Cut,
    matrices: Iterable[CutMatrix],
    model: Checkpoint,
    *,
    pair: ModelPair | None = None,
    merged: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors that a cut changes, by name, with the replacement in place.

    Math:   constant: W_ij = 1/N with N the number of rows of the matrix (output features);
            zero: 0; base: W0; math: W_e; update: W_v, so that only the update is removed.
    Source: the constant is that of Chen et al., arXiv 2505.05464 (their code sets every weight of
            the module to 1 / weight.size(0)). There the cut precedes the loading of merged weights,
            which undoes it; here it follows.

    Args:
        cut: the module of a block, and what replaces it.
        matrices: the matrices of the model.
        model: the model as stored.
        pair: the models of the merge, for replacements by their weights.
        merged: tensors that a merge in memory has changed, by stored name.

    Raises: PlanError if the replacement needs the models of a merge and there are none.
    """
    if cut.value in OF_A_PAIR and pair is None:
        raise PlanError(
            f"Replacing weights by {VALUE_LABELS[cut.value]} requires the models of a merge. "
            f"Specify a plan or a merged folder, or replace them by constant or zero."
        )
    stored: dict[str, list[CutMatrix]] = {}
    for matrix in filter(cut.covers, matrices):
        stored.setdefault(split_address(matrix.address).name, []).append(matrix)
    for name, members in stored.items():
        changed = (merged or {}).get(name)
        data = (model.read(name) if changed is None else changed.detach().cpu()).clone()
        for matrix in members:
            place = place_of(data, matrix.address, model)
            place.copy_(_replacement(cut.value, matrix, place, pair))
        yield name, data


def place_of(data: Tensor, address: str, model: Checkpoint) -> Tensor:
    """View a matrix inside the tensor that stores it; the result shares the memory of `data`.

    Shapes: data as stored; the result is that of the matrix, (m, n).
    """
    whole = model.spec(split_address(address).name)
    part = part_of(whole, address)
    assert part is not None, "it has been matched"
    if address == whole.name:
        return data
    size = DTYPES[whole.dtype].itemsize
    start, stop = ((edge - whole.start) // size for edge in (part.start, part.stop))
    return arranged(data.view(-1)[start:stop], part)


def _replacement(
    value: CutValue, matrix: CutMatrix, place: Tensor, pair: ModelPair | None
) -> Tensor:
    if pair is None or value in ("constant", "zero"):
        filled = 1 / place.shape[0] if value == "constant" else 0.0
        return torch.full_like(place, filled)
    read: Mapping[str, Callable[[], Tensor]] = {
        "base": lambda: pair.base.read_matrix(matrix.base),
        "math": lambda: pair.math[0].read_matrix(matrix.math),
        "update": lambda: pair.mllm.read_matrix(matrix.address),
    }
    return read[value]()
