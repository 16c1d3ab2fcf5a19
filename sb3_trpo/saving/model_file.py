"""What a model's file holds: read it, and check its values.

``BaseAlgorithm.load`` trusts a file: it sets every attribute in it, and makes networks and buffers as large as it says. Here
:mod:`sb3_trpo.saving.model_building` sets an attribute only if the class has it.
"""

import base64
import inspect
import pickle
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

from sb3_trpo.arguments import Rule
from sb3_trpo.errors import CorruptCheckpointError, MismatchError, Source, UntrustedFileError, did_you_mean, name_of, short
from sb3_trpo.saving.archive import METADATA, Archive
from sb3_trpo.saving.attribute_rules import DERIVED, RULES
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


def check_parameters(file: ModelFile) -> None:
    """
    See that all parameters in a file are finite.

    :param file: the file
    :raises NonFiniteError: one holds a NaN or an infinity
    """
    for name, state in file.parameters.items():
        check_finite(state, f"{name}.pth", file.path)
    check_finite(file.variables, VARIABLES, file.path)
