"""From what a model's file holds to a model: compare with what is to be made, then make it.

Networks are made on torch's ``meta`` device first, where they take no memory, and compared with the parameters in the file.
"""

import math
import warnings
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch.overrides import TorchFunctionMode

from sb3_trpo.errors import CorruptCheckpointError, UntrustedFileError, short, warn_user
from sb3_trpo.saving.attribute_rules import allowed_attributes, is_plain_name, is_users_data
from sb3_trpo.saving.model_file import ModelFile
from sb3_trpo.saving.optimizer_state import check_optimizer

#: A rollout buffer of more bytes than this needs ``trust``, or an ``n_steps`` of the user's.
MAX_BUFFER_BYTES = 2**32
#: Most calls of torch while the networks are made on the meta device: this, and so many for each parameter of the file.
MAX_CALLS, MAX_CALLS_PER_PARAMETER = 10_000, 200


def check_buffer(file: ModelFile, values: dict[str, Any]) -> None:
    """
    See that a file does not ask for a huge rollout buffer.

    :param file: the file
    :param values: the attributes of the model
    :raises UntrustedFileError: it does
    """
    if file.trust or "n_steps" in file.given:
        return
    n_steps, n_envs = values["n_steps"], values["n_envs"]
    size = 8 * int(n_steps) * int(n_envs) * (_bytes(values["observation_space"]) + _bytes(values["action_space"]) + 32)
    if size > 8 * MAX_BUFFER_BYTES:
        raise UntrustedFileError(
            file.path,
            "n_steps",
            f"a rollout buffer of {size >> 33} GiB",
            "If you know where the file is from, trust=True makes it; n_steps=... makes another",
        )


def _bytes(space: Any) -> int:
    """Bytes of a value of a space in the rollout buffer."""
    if isinstance(space, spaces.Dict):
        return sum(map(_bytes, space.spaces.values()))
    if isinstance(space, spaces.Box):
        return math.prod(space.shape) * max(space.dtype.itemsize, 4)
    return 8 * math.prod(map(int, space.shape or ()))


# ---- build


class _StayOnMeta(TorchFunctionMode):
    """
    Keep tensors on the meta device, where they take no memory, and end what makes too many of them.

    :param limit: most calls of torch
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._left = limit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`TorchFunctionMode`."""
        self._left -= 1
        if self._left < 0:
            raise ValueError("its networks have far more layers than the file has parameters")
        if func in (th.Tensor.to, th.Tensor.cpu, th.Tensor.cuda) and args[0].is_meta:
            return args[0]
        if func is th.Tensor.__bool__ and args[0].is_meta:
            return True  # torch's checks of arguments, such as that of a standard deviation
        return func(*args, **(kwargs or {}))


def _own_values(model: OnPolicyAlgorithm, file: ModelFile) -> dict[str, Any]:
    """The attributes of a file that a model takes over."""
    own = allowed_attributes(model)
    allowed = own | file.given
    values, unknown = {}, []
    for name, value in file.values.items():
        if name in file.given and name not in own | file.names:
            continue  # as SB3, which replaces only what there is
        if file.trust or name in allowed:
            values[name] = value
        elif hasattr(type(model), name) or name in model._excluded_save_params() or not is_plain_name(name):
            remedy = "If you know where the file is from, trust=True loads it as SB3 does"
            raise UntrustedFileError(file.path, name, "an attribute that no file may set", remedy)
        elif name != "tensorboard_log":
            if is_users_data(model, name, value):
                values[name] = value
            else:
                unknown.append(name[:50])
        elif value is not None and model.env is not None:
            warn_user(
                f"tensorboard_log={short(value)} in the file is not used, because a file may not choose where to write: pass "
                "tensorboard_log=... to log there, or trust=True to use the file's"
            )
    if unknown:
        warn_user(
            f"the attributes {unknown[:10]} in the file are left out, because {type(model).__name__} does not have them and "
            "they are not plain data under public names; trust=True sets them"
        )
    return values


def build_model(cls: Any, file: ModelFile, env: VecEnv | None, device: Any, force_reset: bool, kwargs: dict[str, Any]) -> Any:
    """
    Make a model from a file.

    :param cls: its class
    :param file: the file
    :param env: the environment to go on with
    :param device: device of the networks
    :param force_reset: reset the environment before training goes on
    :param kwargs: attributes to change
    :return: the model
    :raises UntrustedFileError: it asks for attributes that a model does not have, or for a huge buffer
    :raises CorruptCheckpointError: its parameters are not those of its networks
    """
    for name in ("policy_class", "observation_space", "action_space", "policy_kwargs", "n_steps", "n_envs"):
        if name not in file.values:
            raise CorruptCheckpointError(file.path, "data", f"{name} is missing")
    model = cls(policy=file.values["policy_class"], env=env, device=device, _init_setup_model=False)
    values = _own_values(model, file)
    values["policy_kwargs"] = _policy_kwargs(values["policy_kwargs"], file.given)
    if env is not None:
        values["n_envs"] = env.num_envs
        if force_reset:
            values["_last_obs"] = None
    values.update(kwargs)
    _complete_parameters(file, values["policy_kwargs"])
    if not file.trust:
        check_buffer(file, values)
        _check_networks(cls, file, values)
    vars(model).update(values)
    model._setup_model()
    needed, variables = model._get_torch_save_params()
    if file.parameters.keys() != set(needed):
        what = f"it has parameters of {[short(name, 50) for name in file.parameters][:10]}, and the model has {needed}"
        raise CorruptCheckpointError(file.path, None, what)
    model.set_parameters(file.parameters, exact_match=True, device=device)
    check_optimizer(model.policy.optimizer, file.path, "policy.optimizer.pth")
    for name, tensor in file.variables.items():
        if name in variables:
            getattr(model, name).data = tensor.to(model.device)
    if model.use_sde:
        model.policy.reset_noise()
    return model


def _complete_parameters(file: ModelFile, policy_kwargs: dict[str, Any]) -> None:
    """Give the shared extractor the names that it has since SB3 1.7 beside its first one."""
    saved = file.parameters.get("policy")
    if not isinstance(saved, dict) or not policy_kwargs.get("share_features_extractor", True):
        return
    extractor = {str(name): tensor for name, tensor in saved.items() if str(name).startswith("features_extractor.")}
    names = {f"{user}_{name}": tensor for user in ("pi", "vf") for name, tensor in extractor.items()}
    if not names.keys() <= saved.keys():
        warn_user("the policy was saved by SB3 < 1.7: save the model again to convert it to the current format")
        file.parameters["policy"] = {**names, **saved}


def _policy_kwargs(kwargs: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Arguments of the policy in the present format, as ``BaseAlgorithm.load`` makes them."""
    if "policy_kwargs" in given:
        return kwargs
    arch = kwargs.get("net_arch")
    if isinstance(arch, list) and arch and isinstance(arch[0], dict):
        kwargs = {**kwargs, "net_arch": arch[0]}
    return {name: value for name, value in kwargs.items() if name != "device"}


def _check_networks(cls: Any, file: ModelFile, values: dict[str, Any]) -> None:
    """Compare the parameters of the file with networks that take no memory."""
    saved = file.parameters["policy"]
    probe = cls(policy=values["policy_class"], env=None, device="cpu", _init_setup_model=False)
    vars(probe).update({**values, "verbose": 0})
    try:
        # The model itself warns, later.
        with warnings.catch_warnings(), th.device("meta"), _StayOnMeta(MAX_CALLS + MAX_CALLS_PER_PARAMETER * len(saved)):
            warnings.simplefilter("ignore")
            probe._setup_model()
    except Exception:
        if file.given & {"policy_class", "policy_kwargs", "rollout_buffer_class"}:
            return  # classes of the user's own, which decide themselves what they make
        raise
    expected = {name: tuple(tensor.shape) for name, tensor in probe.policy.state_dict().items()}
    found = {name: tuple(tensor.shape) if isinstance(tensor, th.Tensor) else None for name, tensor in saved.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            what = f"{str(name)[:100]!r} has shape {found.get(name)}, and that of its networks is {expected.get(name)}"
            raise CorruptCheckpointError(file.path, "policy.pth", what)
