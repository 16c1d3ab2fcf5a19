"""Constructor arguments for tests that run with both critics."""

from typing import Any

from sb3_trpo import TRPO
from sb3_trpo.saving.sb3_contrib import MINIBATCH_ARGUMENTS
from sb3_trpo.validation import GAUSS_NEWTON_ARGUMENTS


def effective(arguments: dict[str, Any], algorithm: type[Any] = TRPO) -> dict[str, Any]:
    """Leave out the arguments that have no effect with their critic: the constructor warns of them."""
    if not issubclass(algorithm, TRPO):
        return arguments
    unused = GAUSS_NEWTON_ARGUMENTS if arguments.get("critic_method") == "minibatch" else MINIBATCH_ARGUMENTS
    return {name: value for name, value in arguments.items() if name not in unused}
