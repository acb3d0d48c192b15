"""Find the decoder of each model that corresponds to the base's, tensor by tensor.

In: a model and the decoder of the base. Out: the model's `Decoder`. Every matrix of the base needs
a counterpart of equal shape in every model; an MLLM may have more matrices, which are kept. Tensors
other than matrices may differ: they are listed by `without_counterpart`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ipmerge_core.errors import PairingError, ShapeError
from ipmerge_core.models.checkpoint import Checkpoint, TensorSpec
from ipmerge_core.models.decoders import Decoder, find_decoders, refuse_unsupported
from ipmerge_core.models.matrix_kinds import expert_of, is_router, module_of

MLLM = "mllm"  # the role that may have matrices of its own


def align(role: str, model: Checkpoint, base: Checkpoint, wanted: Decoder) -> Decoder:
    """Return the model's decoder that matches the base's matrix by matrix.

    Raises:
        PairingError: the model has no such decoder, several, or one with other matrices.
        ShapeError: a matrix has another shape than the base's.
    """
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
    _refuse_other_matrices(role, (model, decoder), (base, wanted))
    for key, spec in _required(wanted).items():
        if decoder.matrices[key].shape != spec.shape:
            raise ShapeError(
                f"'{decoder.matrices[key].name}' has shape {decoder.matrices[key].shape} in the "
                f"{role} '{model.id}' but {spec.shape} in the base '{base.id}'. Task vectors need "
                f"equal shapes: are both fine-tuned from the same base?"
            )
    return decoder


def _required(decoder: Decoder) -> dict[tuple[int, str], TensorSpec]:
    """Return the matrices that need a counterpart: all but routers, which are kept by default."""
    return {key: spec for key, spec in decoder.matrices.items() if not is_router(module_of(key[1]))}


def _fit(decoder: Decoder, wanted: Decoder) -> tuple[int, int]:
    """Count the tensors that match in name and shape, and those that match in name."""
    shared = [key for key in wanted.tensors if key in decoder.tensors]
    equal = [key for key in shared if decoder.tensors[key].shape == wanted.tensors[key].shape]
    return len(equal), len(shared)


def _refuse_other_matrices(
    role: str, ours: tuple[Checkpoint, Decoder], theirs: tuple[Checkpoint, Decoder]
) -> None:
    """Raise PairingError where one model has matrices that the other lacks.

    The MLLM may have more than the base, except for experts of a mixture that both have.
    """
    (model, decoder), (base, wanted) = ours, theirs
    extra = _required(decoder).keys() - _required(wanted).keys()
    lacking = _required(wanted).keys() - _required(decoder).keys()
    for layer, rest in sorted(extra | lacking):
        place = expert_of(rest)
        counts = [_experts(each, layer, place[0]) for each in (decoder, wanted)] if place else [0]
        if all(counts):
            raise PairingError(
                f"Layer {layer} of the {role} '{model.id}' has {counts[0]} experts and that of the "
                f"base '{base.id}' has {counts[1]}. A mixture can only be merged with one of as "
                f"many experts: do both share one base?"
            )
    unwanted = lacking if role == MLLM else extra | lacking
    if not unwanted:
        return
    layer, rest = min(unwanted)
    has, lacks, others = base, model, extra
    if (layer, rest) in extra:
        has, lacks, others = model, base, lacking
    own = next((f", which has '{name}' there" for at, name in sorted(others) if at == layer), "")
    raise PairingError(
        f"Layer {layer} of '{has.id}' has '{rest}' but '{lacks.id}' does not{own}. Every matrix of "
        f"the base needs a counterpart in every model: do both share one base?"
    )


def _experts(decoder: Decoder, layer: int, place: str) -> int:
    """Count the experts of a mixture in one layer."""
    found = (expert_of(rest) for number, rest in decoder.matrices if number == layer)
    return len({expert[1] for expert in found if expert and expert[0] == place})


def without_counterpart(
    sides: Sequence[tuple[Checkpoint, Decoder]],
) -> dict[tuple[int, str], tuple[str, str]]:
    """List the tensors that not all models have with one shape, by (text layer, name).

    Each is given with the ids of a model that has it and of one that does not, or has another
    shape.
    """
    found: dict[tuple[int, str], tuple[str, str]] = {}
    for key in dict.fromkeys(key for _, decoder in sides for key in decoder.tensors):
        shapes = [(model.id, decoder.tensors.get(key)) for model, decoder in sides]
        has, spec = next((model, spec) for model, spec in shapes if spec is not None)
        for model, other in shapes:
            if other is None or other.shape != spec.shape:
                found[key] = (has, model)
                break
    return found
