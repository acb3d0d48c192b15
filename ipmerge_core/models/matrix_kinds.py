"""Name the kinds of matrices of a decoder block, and recognise projections and routers.

In: a name inside a layer, in the common layout of `layouts`. Out: its module, a short name shared
by all matrices of one kind: `q`, `mlp.experts.up_proj`, `linear_attn.in_proj_qkv`. No torch, so
that plans and the app can use it.
"""

from __future__ import annotations

import re

MODULES = ("q", "k", "v", "o", "gate", "up", "down")
MATRICES = {
    **{f"self_attn.{module}_proj.weight": module for module in MODULES[:4]},
    **{f"mlp.{module}_proj.weight": module for module in MODULES[4:]},
}
_PROJECTIONS = frozenset((*(f"{module}_proj" for module in MODULES), "gate_up_proj"))
_ROUTERS = frozenset(("gate", "router", "shared_expert_gate"))
_EXPERT = re.compile(
    r"(?P<place>(?:.+\.)?experts)\.(?P<expert>[0-9]{1,6})\.(?P<rest>.+)", re.DOTALL
)


def module_of(rest: str) -> str:
    """Return the module of a matrix: one of the seven, or its path inside the layer.

    All experts of a mixture share one module per kind.

    >>> module_of("self_attn.q_proj.weight"), module_of("mlp.experts.3.up_proj.weight")
    ('q', 'mlp.experts.up_proj')
    """
    found = _EXPERT.fullmatch(rest)
    path = rest if found is None else f"{found['place']}.{found['rest']}"
    return MATRICES.get(rest, path.removesuffix(".weight"))


def expert_of(rest: str) -> tuple[str, int] | None:
    """Return the mixture that a matrix belongs to and the number of its expert; None for others.

    >>> expert_of("mlp.experts.3.up_proj.weight"), expert_of("mlp.up_proj.weight")
    (('mlp.experts', 3), None)
    """
    found = _EXPERT.fullmatch(rest)
    return None if found is None else (found["place"], int(found["expert"]))


def is_expert(module: str) -> bool:
    """Return whether a module is that of the experts of a mixture; shared experts are not meant.

    >>> is_expert("mlp.experts.up_proj"), is_expert("mlp.shared_experts.up_proj")
    (True, False)
    """
    return "experts" in module.split(".")


def is_router(module: str) -> bool:
    """Return whether a module selects experts; `gate` alone is the gate projection of an MLP.

    >>> is_router("mlp.gate"), is_router("router.proj"), is_router("gate")
    (True, True, False)
    """
    *path, last = module.split(".")
    return bool(path) and (last in _ROUTERS or "router" in path)


def is_projection(module: str) -> bool:
    """Return whether a module is one of the seven projections, also those of experts.

    >>> is_projection("mlp.experts.up_proj"), is_projection("linear_attn.in_proj_qkv")
    (True, False)
    """
    last = module.rpartition(".")[2]
    return module in MODULES or (last in _PROJECTIONS and not is_router(module))


def module_order(module: str) -> tuple[int, str, int, str]:
    """Return a sort key: the seven in the order of `MODULES`, then the others by block and name.

    >>> sorted(("mlp.experts.down_proj", "mlp.experts.up_proj", "down", "o"), key=module_order)
    ['o', 'down', 'mlp.experts.up_proj', 'mlp.experts.down_proj']
    """
    block, _, last = module.rpartition(".")
    kind = last.removesuffix("_proj")
    place = MODULES.index(kind) if kind in MODULES else len(MODULES)
    return min(len(block), 1), block, place, last
