"""Capture and restore the state of random generators: the global ones of the process, and those in a file."""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

#: NumPy's generators of random bits, by name.
BIT_GENERATORS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}
N_WORDS = 624  # of the Mersenne twister
#: The arrays and integers in the ``"state"`` of each: length and dtype, or the allowed range.
INNER_STATES: dict[str, dict[str, Any]] = {
    "PCG64": {"state": range(2**128), "inc": range(2**128)},
    "PCG64DXSM": {"state": range(2**128), "inc": range(2**128)},
    "MT19937": {"key": (N_WORDS, np.uint32), "pos": range(N_WORDS + 1)},
    "Philox": {"counter": (4, np.uint64), "key": (2, np.uint64)},
    "SFC64": {"state": (4, np.uint64)},
}
BUFFERED = {"has_uint32": range(2), "uinteger": range(2**32)}
#: The other entries of a state.
OUTER_STATES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(BIT_GENERATORS, BUFFERED),
    "MT19937": {},
    "Philox": {**BUFFERED, "buffer": (4, np.uint64), "buffer_pos": range(5)},
}


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise pickle.UnpicklingError(f"the state of a random generator is damaged: {what}")


def _checked(values: Any, allowed: dict[str, Any]) -> dict[str, Any]:
    _check(isinstance(values, dict) and values.keys() >= allowed.keys(), "a part is missing")
    for name, rule in allowed.items():
        value = values[name]
        if isinstance(rule, range):
            _check(isinstance(value, (int, np.integer)) and int(value) in rule, name)
        else:
            _check(isinstance(value, np.ndarray) and value.dtype == rule[1] and value.shape == (rule[0],), name)
    return {name: values[name] for name in allowed}


def set_bit_generator_state(generator: Any, state: Any) -> None:
    """
    Set the state of a NumPy bit generator after checking it: NumPy would index outside its buffers with a damaged one.

    :param generator: the bit generator
    :param state: a value of its ``state``; further entries are ignored
    :raises UnpicklingError: the state is of another generator, or out of range
    """
    name = type(generator).__name__
    _check(isinstance(state, dict) and state.get("bit_generator") == name, "it is that of another generator")
    inner = _checked(state.get("state"), INNER_STATES[name])
    generator.state = {"bit_generator": name, "state": inner, **_checked(state, OUTER_STATES[name])}


def set_python_state(generator: Any, state: Any) -> None:
    """
    Set the state of a Python generator after checking it.

    :param generator: a ``random.Random``, or the module
    :param state: a value of ``getstate``
    :raises UnpicklingError: the state is damaged
    """
    _check(isinstance(state, tuple) and len(state) == 3 and state[0] == 3, "it is of another version")
    _, words, gauss = state
    _check(isinstance(words, tuple) and len(words) == N_WORDS + 1, "words are missing")
    _check(all(type(word) is int and 0 <= word < 2**32 for word in words) and words[-1] <= N_WORDS, "a word is too large")
    _check(gauss is None or type(gauss) is float, "the next number")
    generator.setstate(state)


def random_state() -> dict[str, Any]:
    """
    Return the states of the global generators of Python, NumPy and torch, including CUDA.

    :return: states, by library
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the legacy generator is what SB3 seeds
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in th.cuda.get_rng_state_all()] if th.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """
    Restore the states of the global generators after checking all of them.

    :param state: a value of :func:`random_state`; states of absent GPUs are ignored
    :raises UnpicklingError: a state is damaged
    """
    _check(isinstance(state, dict) and state.keys() >= {"python", "numpy", "torch", "cuda"}, "a library's is missing")
    _check_numpy(state["numpy"])
    present = th.get_rng_state()
    _check(_is_bytes(state["torch"]) and len(state["torch"]) == len(present), "torch's has another size")
    _check(isinstance(state["cuda"], list) and all(map(_is_bytes, state["cuda"])), "CUDA's is damaged")
    set_python_state(random, state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 - as above
    th.set_rng_state(th.as_tensor(state["torch"], device="cpu"))
    for device, card in enumerate(state["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(th.as_tensor(card, device="cpu"), device)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1


def _check_numpy(state: Any) -> None:
    _check(isinstance(state, tuple) and len(state) == 5 and state[0] == "MT19937", "NumPy's is of another generator")
    _checked({"key": state[1], "pos": state[2]}, INNER_STATES["MT19937"])
    _check(type(state[3]) is int and state[3] in (0, 1) and isinstance(state[4], float), "NumPy's next number")


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """
    Restore the global generators at the end of the block.

    :return: context manager
    """
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
