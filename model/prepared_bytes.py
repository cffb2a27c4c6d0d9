"""The arrays of ``Prepared`` as bytes, so that they fit a binary column or a message. Safetensors, never pickle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors.numpy import load, save


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Named arrays of any shape and dtype to one byte string; ``unpack_arrays`` restores them exactly."""
    # The format stores plain memory: an array in another order would come back scrambled.
    packed: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return packed


def unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays that ``pack_arrays`` was given."""
    arrays: dict[str, np.ndarray] = load(data)
    return arrays
