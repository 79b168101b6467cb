"""Units: whole numbers of a modality other than text, such as speech units or image codes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from tokenize import TokenError

import numpy as np

UNITS_EXTENSION = "units.npy"
LARGEST = 2**31 - 1
# What numpy raises on headers that are none; it reads them as Python literals, token by token.
HEADER_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    SyntaxError,
    TokenError,
    RecursionError,
    MemoryError,
)


class NotUnitsError(ValueError):
    """Bytes that are no .npy file of one row of whole numbers from 0 on."""


@dataclass(frozen=True)
class Units:
    """A run of units, `values` int64[n] with n > 0."""

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


def read_units(data: bytes) -> Units:
    """The units of a .npy file; raises NotUnitsError.

    The header is judged before a number is read: it may claim any size, and pickled objects.
    """
    file = BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, kind = read_header(file)
    except HEADER_ERRORS:
        raise NotUnitsError("no .npy header") from None
    size = math.prod(shape) * kind.itemsize
    if len(shape) != 1 or kind.kind not in "iu" or size == 0 or size != len(data) - file.tell():
        raise NotUnitsError(f"{kind} {shape} in {len(data)} bytes")
    values = np.frombuffer(data, kind, offset=file.tell())
    if values.min() < 0 or values.max() > LARGEST:
        raise NotUnitsError("a number outside of 0 .. 2**31 - 1")
    return Units(values.astype(np.int64))


def npy(values: Sequence[int] | np.ndarray) -> bytes:
    """The .npy file of a run of units."""
    buffer = BytesIO()
    np.save(buffer, np.asarray(values), allow_pickle=False)
    return buffer.getvalue()
