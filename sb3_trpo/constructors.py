"""Constructors whose signatures declare each argument once: name, type, rule and default."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from sb3_trpo.arguments import Rule
from sb3_trpo.errors import did_you_mean

#: Arguments of other algorithms and libraries, and their counterparts here.
FOREIGN_ARGUMENTS = {
    **dict.fromkeys(("max_kl", "kl_target", "max_kl_step", "max_kl_div", "delta"), "use target_kl"),
    **dict.fromkeys(
        ("clip_range", "clip_ratio", "clip_coef", "eps_clip"), "there is no clipping; target_kl bounds each update"
    ),
    "clip_range_vf": "the value function is not clipped",
    **dict.fromkeys(
        ("vf_coef", "value_coef"), "policy and critic are fitted one after the other, so no weight between them is needed"
    ),
    "n_epochs": "use n_critic_updates (passes of the minibatch critic) or n_policy_updates (policy steps per rollout)",
    "max_grad_norm": "gradients are not clipped; target_kl bounds each update",
    "damping": "use cg_damping",
    **dict.fromkeys(("cg_iters", "cg_iterations", "max_cg_iters"), "use cg_max_steps"),
    **dict.fromkeys(("backtrack_coeff", "backtrack_ratio"), "use line_search_shrinking_factor"),
    **dict.fromkeys(("backtrack_iters", "max_backtracks"), "use line_search_max_iter"),
    **dict.fromkeys(("lam", "lambda_", "gae_tau"), "use gae_lambda"),
    **dict.fromkeys(("lr", "vf_lr"), "use learning_rate"),
    "vf_iters": "use n_critic_updates with critic_method='minibatch', or n_critic_steps",
    "cg_warm_start": "conjugate gradients always start at zero",
    "critic_cg_max_steps": "the critic's conjugate gradient iterations are fixed",
    "critic_cg_residual_tol": "the critic's conjugate gradient tolerance is fixed",
    "distributed": "set the class attribute, for example TRPO.distributed = False",
}

#: Arguments that are not the algorithm's own.
SB3_ARGUMENTS = (
    "policy",
    "env",
    "rollout_buffer_class",
    "rollout_buffer_kwargs",
    "stats_window_size",
    "tensorboard_log",
    "policy_kwargs",
    "verbose",
    "seed",
    "device",
)

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def rules_of(function: Callable[..., Any]) -> dict[str, Rule]:
    """
    Read the rules from a signature: ``n_steps: Annotated[int, POSITIVE_INTEGER] = 2048``.

    :param function: a constructor
    :return: rule of each argument that has one, by name
    """
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        for item in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(item, Rule):
                found[name] = item
    return found


def own_rules_of(function: Callable[..., Any]) -> dict[str, Rule]:
    """
    Read the rules of the algorithm's own arguments, by which files, hyperparameters and other processes are checked.

    :param function: a constructor
    :return: rule of each argument that has one and is not one of :data:`SB3_ARGUMENTS`, by name
    """
    return {name: rule for name, rule in rules_of(function).items() if name not in SB3_ARGUMENTS}


def checked(constructor: Constructor) -> Constructor:
    """
    Make a constructor check and convert its arguments by the rules in its signature, before its body runs.

    The names of the arguments that the caller gave are kept in the attribute ``_given_arguments``.

    :param constructor: the ``__init__`` of an algorithm
    :return: the same, with checks
    """
    signature, rules = inspect.signature(constructor), rules_of(constructor)

    @functools.wraps(constructor)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for name in () if takes_all else kwargs:
            if name not in signature.parameters:
                hint = argument_hint(name, {*inspect.signature(type(self)).parameters, *signature.parameters})
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}{hint}")
        try:
            given = signature.bind(self, *args, **kwargs)
            complete = inspect.signature(method)
            known = {name: value for name, value in kwargs.items() if name in complete.parameters}
            names = complete.bind_partial(self, *args, **known).arguments.keys() - {"self"}
        except TypeError as error:  # a missing argument, or too many
            raise TypeError(f"{type(self).__name__}(): {error}") from None
        # The outermost constructor of a subclass runs first: its arguments are the caller's.
        vars(self).setdefault("_given_arguments", frozenset(names))
        for name, value in given.arguments.items():
            if name in rules:
                given.arguments[name] = rules[name].check(name, value)
        constructor(*given.args, **given.kwargs)

    return method  # type: ignore[return-value]


def takes_arguments_of(base: Callable[..., None], *, without: Iterable[str] = ()) -> Callable[[Constructor], Constructor]:
    """
    Show the full signature of a constructor that passes its ``**kwargs`` to another one.

    :param base: the constructor that receives them
    :param without: arguments that it does not receive
    :return: decorator that completes the signature for ``help()`` and ``inspect``
    """
    without = frozenset(without)

    def decorate(constructor: Constructor) -> Constructor:
        own = inspect.signature(constructor)
        kinds = {p.kind for p in own.parameters.values()}
        parameters = [p for p in own.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for name, parameter in inspect.signature(base).parameters.items():
            if name in own.parameters or name in without:
                continue
            is_positional = inspect.Parameter.VAR_POSITIONAL in kinds
            parameters.append(parameter if is_positional else parameter.replace(kind=parameter.KEYWORD_ONLY))
        parameters.sort(key=lambda parameter: parameter.kind)  # stable
        constructor.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return constructor

    return decorate


def argument_hint(name: str, names: Iterable[str]) -> str:
    """
    Suggest what an unknown argument may have meant.

    :param name: the unknown name
    :param names: the known names
    :return: ``"; did you mean 'this'?"``, its counterpart here, or an empty string
    """
    if name.lower() in FOREIGN_ARGUMENTS:
        return f": {FOREIGN_ARGUMENTS[name.lower()]}"
    return did_you_mean(name, names)
