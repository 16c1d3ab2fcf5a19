"""
Register the algorithms of this package with ``rl_zoo3`` on import.

``python -m sb3_trpo`` imports it; for RL Zoo's own commands, use ``--gym-packages sb3_trpo.zoo``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import rl_zoo3
import sb3_contrib
from rl_zoo3 import exp_manager, hyperparams_opt
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_trpo import NPG, TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo.zoo import hyperparameters

Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]
Converter = Callable[[dict[str, Any]], dict[str, Any]]

OUR_CONFIGS = hyperparameters.folder()
ZOO_CONFIGS = Path(rl_zoo3.__file__).parent / "hyperparams"


class Algorithm(NamedTuple):
    """
    An algorithm for RL Zoo.

    :param cls: the class
    :param sampler: samples hyperparameters for an Optuna trial
    :param converter: converts the parameters of a stored trial to constructor arguments
    :param config: hyperparameters of each environment
    """

    cls: type[OnPolicyAlgorithm]
    sampler: Sampler
    converter: Converter
    config: Path


def sample_trpo_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample hyperparameters of TRPO and of the algorithms that share its update.

    :param trial: the trial
    :param n_actions: dimensions of a Box action
    :param n_envs: environments in a rollout
    :param additional_args: the zoo's, for other algorithms
    :return: constructor arguments
    """
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 1e-4, 0.03, log=True)
    n_steps_pow = trial.suggest_int("n_steps_pow", 5, 12)
    trial.suggest_float("one_minus_gae_lambda", 1e-3, 0.1, log=True)
    trial.suggest_float("target_kl", 0.005, 0.3, log=True)
    trial.suggest_float("cg_damping", 0.01, 1.0, log=True)
    trial.suggest_float("critic_damping", 0.01, 1.0, log=True)
    trial.suggest_int("n_critic_steps", 1, 4)
    trial.suggest_categorical("net_arch", ["tiny", "small", "medium"])
    trial.suggest_categorical("activation_fn", ["tanh", "relu"])
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("n_steps", 2**n_steps_pow)
    return hyperparams_opt.convert_onpolicy_params(trial.params)


#: Name on the command line -> algorithm. A new one is a line here and a file in ``zoo_hyperparams/``.
OURS: dict[str, type[TRPO]] = {"trpo": TRPO, "npg": NPG, "trpo_lstm": RecurrentTRPO, "trpo_mask": MaskableTRPO}
ALGORITHMS: dict[str, Algorithm] = {
    name: Algorithm(cls, sample_trpo_params, hyperparams_opt.convert_onpolicy_params, OUR_CONFIGS / f"{name}.yml")
    for name, cls in OURS.items()
}
#: sb3-contrib's TRPO under another name, for comparisons.
PEERS: dict[str, Algorithm] = {
    "sb3_contrib_trpo": Algorithm(
        sb3_contrib.TRPO,
        hyperparams_opt.sample_trpo_params,
        hyperparams_opt.convert_onpolicy_params,
        ZOO_CONFIGS / "trpo.yml",
    ),
}

_read_hyperparameters = exp_manager.ExperimentManager.read_hyperparameters


def read_hyperparameters(manager: exp_manager.ExperimentManager) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Read and check the hyperparameters of an experiment, from this package's files for its algorithms.

    Replaces the method of RL Zoo's manager, which handles all other algorithms. RL Zoo has no hook for this.

    :param manager: the zoo's manager
    :return: hyperparameters to use, and those to save
    :raises UsageError: the file or something in it cannot be used
    """
    algorithm = (ALGORITHMS | PEERS).get(manager.algo)
    if algorithm is None:
        return _read_hyperparameters(manager)
    if manager.args.conf_file is None:
        manager.config = str(algorithm.config)
    if manager.config.endswith((".yml", ".yaml")):
        hyperparameters.read(Path(manager.config))
    if manager.tensorboard_log is None and not manager.optimize_hyperparameters:
        manager.tensorboard_log = manager.save_path  # keep the log in the run's folder, for `plot`
    found, saved = _read_hyperparameters(manager)
    hyperparameters.check(algorithm.cls, found, _places(manager, found))
    if hyperparameters.is_linear(found.get("target_kl")):  # RL Zoo converts learning rates and clip ranges only
        found["target_kl"] = rl_zoo3.linear_schedule(found["target_kl"].removeprefix("lin_"))
    return found, saved


def _places(manager: exp_manager.ExperimentManager, names: dict[str, Any]) -> dict[str, str]:
    """Return where each hyperparameter was given: the command line, a line of a YAML file, or a Python module."""
    places = dict.fromkeys(names, str(manager.config))
    if manager.config.endswith((".yml", ".yaml")):
        path, env_id = Path(manager.config), manager.env_name.gym_id
        entries = hyperparameters.read(path)
        entry = env_id if env_id in entries else "atari" if manager.is_atari(env_id) else "default"
        places |= {name: f"{path}, line {line}" for name, line in hyperparameters.lines(path, entry).items()}
    return places | dict.fromkeys(manager.custom_hyperparams or (), "--hyperparams")


def register() -> None:
    """Register the algorithms; ``trpo`` replaces sb3-contrib's."""
    manager: Any = exp_manager.ExperimentManager
    tuning: Any = hyperparams_opt
    for name, algorithm in (ALGORITHMS | PEERS).items():
        rl_zoo3.ALGOS[name] = algorithm.cls
        tuning.HYPERPARAMS_SAMPLER[name] = algorithm.sampler
        tuning.HYPERPARAMS_CONVERTER[name] = algorithm.converter
    manager.read_hyperparameters = read_hyperparameters


register()
