"""Addresses of matrices inside stored tensors.

A decoder stores some matrices as parts of larger tensors: q, k and v as rows of one, the experts of
a mixture as slices of a stack, in some layouts transposed. An address names such a part, and
`Checkpoint` accepts it like the name of a tensor:

    name[64:96]         rows 64 to 95 of a matrix
    name[3]             slice 3 of a stack of matrices
    name[3].T[0:16]     rows 0 to 15 of the transpose of slice 3
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ADDRESS = re.compile(
    r"(?P<name>.+?)(?:\[(?P<number>[0-9]{1,6})\](?P<transposed>\.T)?)?"
    r"(?:\[(?P<start>[0-9]{1,12}):(?P<stop>[0-9]{1,12})\])?",
    re.DOTALL,
)


class Address(NamedTuple):
    """A part of a stored tensor. `number` is the slice of a stack; `rows` are None for all rows."""

    name: str
    number: int | None = None
    transposed: bool = False
    rows: range | None = None

    def __str__(self) -> str:
        """Return the text that `split_address` reads."""
        part = "" if self.number is None else f"[{self.number}]{'.T' * self.transposed}"
        rows = "" if self.rows is None else f"[{self.rows.start}:{self.rows.stop}]"
        return f"{self.name}{part}{rows}"

    def within(self, first: int, last: int) -> Address:
        """Return the address of the rows [first, last) of this part.

        >>> str(split_address("qkv.weight[64:96]").within(0, 8))
        'qkv.weight[64:72]'
        """
        above = self.rows.start if self.rows else 0
        return self._replace(rows=range(above + first, above + last))


def split_address(address: str) -> Address:
    """Read an address; the name of a stored tensor is the address of all of it.

    >>> split_address("model.layers.0.self_attn.qkv_proj.weight[64:96]").rows
    range(64, 96)
    >>> split_address("experts.gate_up_proj[3].T[0:16]")
    Address(name='experts.gate_up_proj', number=3, transposed=True, rows=range(0, 16))
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:  # an empty name
        return Address(address)
    number, start = found["number"], found["start"]
    return Address(
        found["name"],
        None if number is None else int(number),
        found["transposed"] is not None,
        None if start is None else range(int(start), int(found["stop"])),
    )
