"""The state of random generators: of those that all of a process shares, and of those in a file."""

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
#: The arrays and whole numbers in the ``"state"`` of each: length and type, or the numbers that are allowed.
INNER_STATES: dict[str, dict[str, Any]] = {
    "PCG64": {"state": range(2**128), "inc": range(2**128)},
    "PCG64DXSM": {"state": range(2**128), "inc": range(2**128)},
    "MT19937": {"key": (N_WORDS, np.uint32), "pos": range(N_WORDS + 1)},
    "Philox": {"counter": (4, np.uint64), "key": (2, np.uint64)},
    "SFC64": {"state": (4, np.uint64)},
}
BUFFERED = {"has_uint32": range(2), "uinteger": range(2**32)}
#: What stands beside it.
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
    Put a checked state into one of NumPy's bit generators, which index outside their buffers with others.

    :param generator: the bit generator
    :param state: as its ``state`` gives it, and possibly more
    :raises UnpicklingError: it is the state of another one, or out of range
    """
    name = type(generator).__name__
    _check(isinstance(state, dict) and state.get("bit_generator") == name, "it is that of another generator")
    inner = _checked(state.get("state"), INNER_STATES[name])
    generator.state = {"bit_generator": name, "state": inner, **_checked(state, OUTER_STATES[name])}


def set_python_state(generator: Any, state: Any) -> None:
    """
    Put a checked state into one of Python's generators.

    :param generator: a ``random.Random``, or the module
    :param state: as ``getstate`` gives it
    :raises UnpicklingError: it is damaged
    """
    _check(isinstance(state, tuple) and len(state) == 3 and state[0] == 3, "it is of another version")
    _, words, gauss = state
    _check(isinstance(words, tuple) and len(words) == N_WORDS + 1, "words are missing")
    _check(all(type(word) is int and 0 <= word < 2**32 for word in words) and words[-1] <= N_WORDS, "a word is too large")
    _check(gauss is None or type(gauss) is float, "the next number")
    generator.setstate(state)


def random_state() -> dict[str, Any]:
    """
    The states of Python's, NumPy's and torch's global generators, CUDA's included.

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
    Put states back, after checking all of them.

    :param state: as :func:`random_state` gives it; states of graphics cards that are not there are left out
    :raises UnpicklingError: one of them is damaged
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
    Leave the global generators as they are, whatever is drawn from them inside.

    :return: context manager
    """
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
