"""From a model's file to a model: read, validate, build.

``BaseAlgorithm.load`` believes a file: it sets every attribute that stands there, and makes networks and buffers as large as
it says. Here an attribute is set only if the class has it, networks are made on torch's ``meta`` device first, where they
take no memory, and compared with the parameters that are there.
"""

import base64
import inspect
import math
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import (
    check_for_correct_spaces,
)
from stable_baselines3.common.vec_env import VecEnv
from torch.overrides import TorchFunctionMode

from sb3_trpo.arguments import Rule
from sb3_trpo.errors import CorruptCheckpointError, MismatchError, Source, UntrustedFileError, did_you_mean, name_of, short
from sb3_trpo.saving.archive import METADATA, Archive
from sb3_trpo.saving.attribute_rules import DERIVED, RULES, allowed_attributes, is_plain_name, is_users_data
from sb3_trpo.saving.tensors import PARAMETERS, check_finite, read_state
from sb3_trpo.saving.unpickling import RefusedError, restricted_loads

#: An attribute by which a file of SB3 or sb3-contrib can be told, for they do not say whose it is; the first that is there.
SIGNATURE_ATTRIBUTES = {
    "top_quantiles_to_drop_per_net": "TQC",
    "delta_std": "ARS",
    "exploration_fraction": "DQN",
    "target_policy_noise": "TD3",
    "target_entropy": "SAC",
    "clip_range": "PPO",
    "cg_max_steps": "TRPO",
    "gae_lambda": "A2C",
}
#: Attributes that earlier versions saved, and that nothing reads any more or that only the training state restores.
RETIRED = (
    "cg_warm_start",
    "critic_cg_max_steps",
    "critic_cg_residual_tol",
    "distributed",
    "_direction",
    "_iteration",
    "_iterations_before",
    "_pending_log",
)
VARIABLES = "pytorch_variables.pth"
#: A rollout buffer of more bytes than this needs ``trust``, or an ``n_steps`` of the user's.
MAX_BUFFER_BYTES = 2**32
#: Most calls of torch while the networks are made on the meta device: this, and so many for each parameter of the file.
MAX_CALLS, MAX_CALLS_PER_PARAMETER = 10_000, 200


@dataclass(frozen=True)
class ModelFile:
    """
    What is in a model's file.

    :param archive: the file
    :param path: what to call it
    :param about: what this package has written about it
    :param values: attributes, those that the user has given among them
    :param names: names of the attributes in the file
    :param given: names of those that are the user's
    :param parameters: state dictionaries, by name
    :param variables: further tensors, by name
    :param trust: whether the user knows where the file is from
    """

    archive: Archive
    path: Source
    about: dict[str, Any]
    values: dict[str, Any]
    names: set[str]
    given: set[str]
    parameters: dict[str, Any]
    variables: dict[str, th.Tensor]
    trust: bool


# ---- read


def read_model_file(
    archive: Archive, path: Source, caller: str, replaced: dict[str, Any], kwargs: Iterable[str], trust: bool
) -> ModelFile:
    """
    Read a file.

    :param archive: the file
    :param path: what to call it
    :param caller: name of the class that loads it
    :param replaced: attributes of the user's, which are not read from the file
    :param kwargs: names of attributes that are changed later
    :param trust: run what pickled attributes ask for
    :return: its parts
    :raises CorruptCheckpointError: a part is missing or damaged
    :raises UntrustedFileError: one of them asks for something that may run code
    """
    entries = archive.read_json("data")
    values = dict(replaced)
    for name, entry in entries.items():
        if name in replaced or name in RETIRED:
            continue
        if not (isinstance(entry, dict) and ":serialized:" in entry):
            values[name] = entry
        elif name not in DERIVED:
            values[name] = _read_entry(archive, path, caller, name, entry, trust)
    members = sorted({*PARAMETERS, *(name for name in archive.names if name.endswith(".pth"))})
    states = {member.removesuffix(".pth"): read_state(archive, member, trust) for member in members}
    variables = states.pop(VARIABLES.removesuffix(".pth"), None) or {}
    about = archive.read_json(METADATA) if METADATA in archive.names else {}
    return ModelFile(archive, path, about, values, set(entries), {*replaced, *kwargs}, states, variables, trust)


def _read_entry(archive: Archive, path: Source, caller: str, name: str, entry: dict[str, Any], trust: bool) -> Any:
    try:
        pickled = base64.b64decode(entry[":serialized:"])
        return pickle.loads(pickled) if trust else restricted_loads(pickled, archive.budget)
    except RefusedError as error:
        shape = _outline(entry) if name == "policy_kwargs" else "..."
        call = f"{caller}.load({name_of(path)!r}, custom_objects={{{short(name, 100)}: {shape}}})"
        remedy = (
            f"{call} puts an object of your own in the entry's place; "
            "if you know where the file is from, trust=True loads it as SB3 does"
        )
        code = "code, that is a function or a class that is not imported by name: " if "cloudpickle" in error.what else ""
        raise UntrustedFileError(path, name, code + error.what, remedy) from None
    except Exception as error:
        what = f"its entry {short(name, 100)} is damaged ({type(error).__name__}: {short(error)})"
        raise CorruptCheckpointError(path, "data", what) from error


def _outline(entry: dict[str, Any]) -> str:
    """The keys of a dictionary, which SB3 writes in plain text beside the pickle."""
    keys = [key for key in entry if key.isidentifier()][:10]
    return "{" + ", ".join(f"{key[:50]!r}: ..." for key in keys) + "}"


# ---- validate


def check_algorithm(file: ModelFile, algorithm: str) -> None:
    """
    See that a file is of the algorithm that loads it.

    :param file: the file
    :param algorithm: name of the algorithm
    :raises ValueError: it is of another one
    """
    guess = next((theirs for mark, theirs in SIGNATURE_ATTRIBUTES.items() if mark in file.names), "another algorithm")
    saved = file.about.get("algorithm") or guess
    if saved != algorithm:
        raise ValueError(f"{name_of(file.path)} holds a model of {str(saved)[:100]}, not of {algorithm}")


def check_keywords(cls: type, kwargs: Iterable[str], saved: set[str]) -> None:
    """
    See that there are attributes of the names that the user wants to change.

    :param cls: class of the model
    :param kwargs: the names
    :param saved: names of the attributes in the file
    :raises TypeError: there is none of a name
    """
    constructors = [base.__init__ for base in cls.__mro__ if issubclass(base, OnPolicyAlgorithm)]
    known = saved.union(*(inspect.signature(constructor).parameters for constructor in constructors))
    for name in kwargs:
        if name not in known:
            raise TypeError(f"load() got an unexpected keyword argument {name!r}{did_you_mean(name, known)}")


def check_values(file: ModelFile, rules: dict[str, Rule]) -> None:
    """
    See that the attributes in a file are what they can be.

    :param file: the file
    :param rules: rules for the arguments of the constructor, by name
    :raises CorruptCheckpointError: one is not
    """
    for name, value in file.values.items():
        if name in file.given:
            continue
        if not file.trust and name in RULES and not RULES[name](value):
            raise CorruptCheckpointError(file.path, "data", f"{name}={short(value)} is not allowed")
        if name in rules and not (isinstance(value, np.ndarray) or rules[name].holds(value)):
            what = f"{name}={short(value)} is not allowed: it must be {rules[name].allowed}"
            raise CorruptCheckpointError(file.path, "data", what)


def check_spaces(env: VecEnv, values: dict[str, Any]) -> None:
    """
    See that an environment has the spaces that a model has.

    :param env: the environment
    :param values: attributes of the model
    :raises MismatchError: it has others
    """
    observation, action = values.get("observation_space"), values.get("action_space")
    if not (isinstance(observation, spaces.Space) and isinstance(action, spaces.Space)):  # reported when the model is made
        return
    try:
        check_for_correct_spaces(env, observation, action)
    except ValueError as error:
        raise MismatchError(str(error)) from error


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
            warnings.warn(
                f"the log goes nowhere: tensorboard_log={short(value)} of the file is not used, since a file may not say "
                "where to write; tensorboard_log=... says it, and trust=True uses the file's",
                stacklevel=5,
            )
    if unknown:
        warnings.warn(
            f"{type(model).__name__} has no attributes {unknown[:10]}, which the file has, and they are not plain data under "
            "public names: they are left out; trust=True sets them",
            stacklevel=5,
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
        warnings.warn("the policy was saved by SB3 < 1.7: save the model again to have it in the present format", stacklevel=5)
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
        with th.device("meta"), _StayOnMeta(MAX_CALLS + MAX_CALLS_PER_PARAMETER * len(saved)):
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


def check_parameters(file: ModelFile) -> None:
    """
    See that all parameters in a file are finite.

    :param file: the file
    :raises NonFiniteError: one holds a NaN or an infinity
    """
    for name, state in file.parameters.items():
        check_finite(state, f"{name}.pth", file.path)
    check_finite(file.variables, VARIABLES, file.path)
