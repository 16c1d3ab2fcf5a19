"""Random generators for callbacks, separate from those of the training, so that callbacks do not change it."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from torch.overrides import TorchFunctionMode

from sb3_trpo.saving.random_state import random_state, set_random_state

#: SB3's callbacks that draw no random numbers.
DETERMINISTIC = (
    CheckpointCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)


class CallbackStream:
    """
    States of the global random generators as the callbacks find them.

    While callbacks run, the global generators are in these states. Afterwards the training finds them as it left them,
    whatever the callbacks have drawn.
    """

    def __init__(self) -> None:
        self._callbacks: dict[str, Any] | None = None  # None until the first callback runs
        self._training: dict[str, Any] | None = None  # None unless callbacks are running

    def reset(self, states: dict[str, Any] | None = None) -> None:
        """
        Start anew.

        :param states: states for the callbacks; None to derive them from those of the training
        """
        self._callbacks = states

    def states(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """
        Return the states of all generators.

        :return: those of the training, and those of the callbacks, if any has run
        """
        present = random_state()
        if self._training is None:
            return present, self._callbacks
        return {**present, **self._training}, {**(self._callbacks or {}), **{name: present[name] for name in self._training}}

    @contextmanager
    def active(self, everything: bool) -> Iterator[None]:
        """
        Switch to the generators of the callbacks.

        :param everything: switch those of Python and NumPy too, which takes half a millisecond. The training itself draws
            from torch's alone, so the others matter where environments draw from them
        :return: context manager
        """
        if self._training is not None:
            yield
            return
        self._training = random_state() if everything else _torch_state()
        if self._callbacks is None:
            self._callbacks = _derived(self._training["torch"])
        _set_state({name: self._callbacks[name] for name in self._training})
        try:
            yield
        finally:
            training, self._training = self._training, None
            self._callbacks.update(random_state() if everything else _torch_state())
            _set_state(training)


class TorchCalls(TorchFunctionMode):
    """
    Notice when something inside this context calls torch, and switch to the callbacks' generator before it does.

    To switch at every step would take ten microseconds; callbacks that do not call torch are spared half of them.

    :param stream: the generators
    """

    def __init__(self, stream: CallbackStream) -> None:
        super().__init__()
        #: Whether there was a call; never set to False here.
        self.seen = True
        self._stream = stream
        self._training = th.empty(0)
        self._switched: ExitStack | None = None

    def __enter__(self) -> "TorchCalls":
        self._training = th.default_generator.get_state()
        if th.cuda.is_initialized():
            self._switch()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call."""
        if self._switched is None:
            self._switch()
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._switched is None:
            th.default_generator.set_state(self._training)  # it may have been seeded
        else:
            switched, self._switched = self._switched, None
            switched.close()

    def _switch(self) -> None:
        self.seen, self._switched = True, ExitStack()
        present = th.default_generator.get_state()
        th.default_generator.set_state(self._training)
        self._switched.enter_context(self._stream.active(everything=False))
        if not th.equal(present, self._training):  # the callback has seeded it
            th.default_generator.set_state(present)


def _torch_state() -> dict[str, Any]:
    cards = [state.numpy() for state in th.cuda.get_rng_state_all()] if th.cuda.is_initialized() else []
    return {"torch": th.get_rng_state().numpy(), "cuda": cards}


def _set_state(states: dict[str, Any]) -> None:
    if "python" in states:
        set_random_state(states)
        return
    th.set_rng_state(th.as_tensor(states["torch"], device="cpu"))
    for device, card in enumerate(states["cuda"][: th.cuda.device_count()]):
        th.cuda.set_rng_state(th.as_tensor(card, device="cpu"), device)


def _derived(state: np.ndarray) -> dict[str, Any]:
    """Seed new generators from the state of another, without drawing from it."""
    seed = int.from_bytes(hashlib.blake2b(state.tobytes(), digest_size=4).digest(), "big")
    n_cards = th.cuda.device_count() if th.cuda.is_initialized() else 0
    return {
        "python": random.Random(seed).getstate(),
        "numpy": np.random.RandomState(seed).get_state(),
        "torch": th.Generator().manual_seed(seed).get_state().numpy(),
        "cuda": [th.Generator(f"cuda:{card}").manual_seed(seed).get_state().numpy() for card in range(n_cards)],
    }


class IsolatedCallback(CallbackList):
    """
    Run a callback with the random generators of a :class:`CallbackStream`.

    :param callback: an initialized callback
    :param stream: the generators
    """

    def __init__(self, callback: BaseCallback, stream: CallbackStream) -> None:
        super().__init__([callback])
        self.model = callback.model
        self._stream = stream
        self.torch_calls = TorchCalls(stream)
        drawing = [each for each in _leaves(callback) if _may_draw(each)]
        self._evaluating = [each for each in drawing if isinstance(each, EvalCallback)]
        self._overridden = {
            name
            for name in ("_on_rollout_start", "_on_rollout_end")
            if any(getattr(type(each), name) is not getattr(BaseCallback, name) for each in drawing)
        }

    def update_locals(self, locals_: dict[str, Any]) -> None:
        """Let the callback have the local variables; nobody reads those of this object."""
        self.callbacks[0].update_locals(locals_)

    def _on_training_start(self) -> None:
        with self._stream.active(everything=True):
            super()._on_training_start()

    def _on_rollout_start(self) -> None:
        with self._stream.active("_on_rollout_start" in self._overridden):
            super()._on_rollout_start()

    def _on_step(self) -> bool:
        if self._evaluating and any(
            each.eval_freq > 0 and (each.n_calls + 1) % each.eval_freq == 0 for each in self._evaluating
        ):
            self.torch_calls.seen = True
            with self._stream.active(everything=True):
                return self.callbacks[0].on_step()
        with self.torch_calls:
            return self.callbacks[0].on_step()

    def _on_rollout_end(self) -> None:
        with self._stream.active("_on_rollout_end" in self._overridden):
            super()._on_rollout_end()

    def _on_training_end(self) -> None:
        with self._stream.active(everything=True):
            super()._on_training_end()


def isolated(callback: BaseCallback, stream: CallbackStream) -> BaseCallback:
    """
    Isolate a callback if it may draw random numbers.

    :param callback: an initialized callback
    :param stream: random generators for it
    :return: the callback that the training calls
    """
    return IsolatedCallback(callback, stream) if any(map(_may_draw, _leaves(callback))) else callback


def _leaves(callback: BaseCallback) -> list[BaseCallback]:
    """Return all callbacks that lists and events hold, and those events that do more than call others."""
    if isinstance(callback, CallbackList):
        return [leaf for each in callback.callbacks for leaf in _leaves(each)]
    children = [callback.callback] if isinstance(callback, EventCallback) and callback.callback is not None else []
    return [callback, *(leaf for each in children for leaf in _leaves(each))]


def _may_draw(callback: BaseCallback) -> bool:
    if isinstance(callback, ConvertCallback):
        return callback.callback is not None and not isinstance(callback.parent, LogEveryNTimesteps)
    return type(callback) not in DETERMINISTIC and getattr(callback, "draws_random_numbers", True)
