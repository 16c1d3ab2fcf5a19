"""The memory layout of arrays, which pickling changes and on which the last bits of a convolution depend."""

from typing import Any

import numpy as np


def strides_of(value: Any) -> Any:
    """
    Return the strides of an array.

    :param value: an array, a dictionary of arrays, or None
    :return: its strides where its elements fill their memory without gaps; those of a dictionary by key; else None
    """
    if isinstance(value, dict):
        return {key: strides_of(array) for key, array in value.items()}
    if not isinstance(value, np.ndarray) or _is_canonical(value):
        return None
    return value.strides if min(value.strides, default=0) > 0 else None


def _is_canonical(array: np.ndarray) -> bool:
    """Return True if the strides of axes of length 1 are those of a new array too; convolutions look at them."""
    return array.strides == np.empty(array.shape, array.dtype).strides


def with_strides(value: Any, strides: Any) -> Any:
    """
    Copy an array into another memory layout.

    :param value: an array, a dictionary of arrays, or None
    :param strides: as :func:`strides_of` returns them
    :return: equal arrays, with those strides where they are possible
    """
    if isinstance(value, dict):
        return {
            key: with_strides(array, strides.get(key) if isinstance(strides, dict) else None) for key, array in value.items()
        }
    if not isinstance(value, np.ndarray) or not isinstance(strides, tuple):
        return value
    try:
        copy = np.ndarray(value.shape, value.dtype, buffer=bytearray(value.nbytes), strides=strides)
    except (TypeError, ValueError):  # beyond the buffer
        return value
    copy[...] = value
    return copy if copy.tobytes() == value.tobytes() else value  # strides of a file may overlap
