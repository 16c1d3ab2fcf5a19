"""The bridge to RL Zoo, over every algorithm that it registers and every entry of their files."""

import argparse
import json
import math
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch as th

pytest.importorskip("rl_zoo3", reason="needs the extra [zoo]")

import gymnasium as gym
import optuna
import rl_zoo3.import_envs
import yaml
from rl_zoo3 import ALGOS, hyperparams_opt
from rl_zoo3.exp_manager import ExperimentManager
from sb3_contrib.common.envs import InvalidActionEnvDiscrete

from sb3_trpo.errors import UsageError
from sb3_trpo.zoo import hyperparameters
from sb3_trpo.zoo.registration import ALGORITHMS, PEERS

ENTRIES = [(name, entry) for name, algorithm in ALGORITHMS.items() for entry in hyperparameters.read(algorithm.config)]
#: Environments that stand for the entries without one.
EXAMPLES = {"default": "InvertedPendulum-v5", "atari": "PongNoFrameskip-v4"}
gym.register("InvalidActions-v0", partial(InvalidActionEnvDiscrete, dim=8, n_invalid_actions=3), max_episode_steps=20)
TINY = {"n_envs": 2, "n_steps": 16}


def manager(folder: Path, algorithm: str, env_id: str, **kwargs: Any) -> ExperimentManager:
    arguments = argparse.Namespace(conf_file=kwargs.get("config"), env_kwargs=None)
    return ExperimentManager(
        arguments, algorithm, env_id, str(folder), eval_freq=-1, log_interval=-1, verbose=0, device="cpu", **kwargs
    )


@pytest.mark.parametrize(("name", "algorithm"), (ALGORITHMS | PEERS).items())
def test_the_zoo_knows_our_algorithms(name: str, algorithm: Any) -> None:
    assert ALGOS[name] is algorithm.cls
    assert hyperparams_opt.HYPERPARAMS_SAMPLER[name] is algorithm.sampler
    assert hyperparams_opt.HYPERPARAMS_CONVERTER[name] is algorithm.converter
    assert algorithm.config.name.removesuffix(".yml") in {name, "trpo"}


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_every_key_is_accepted(name: str, entry: str) -> None:
    algorithm = ALGORITHMS[name]
    found = hyperparameters.read(algorithm.config)[entry]
    assert {"policy", "n_timesteps"} <= found.keys()
    hyperparameters.check(algorithm.cls, found, {})


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_every_entry_trains_two_updates(tmp_path: Path, name: str, entry: str) -> None:
    env_id = "InvalidActions-v0" if name == "trpo_mask" else EXAMPLES.get(entry, entry)
    if env_id not in gym.registry:
        pytest.skip(f"{env_id} is not installed: pip install '.[envs]'")
    try:
        gym.make(env_id).close()
    except gym.error.DependencyNotInstalled as error:
        pytest.skip(f"{env_id}: {error}")
    experiment = manager(tmp_path, name, env_id, n_timesteps=64, hyperparams=dict(TINY))
    model, _ = experiment.setup_experiment()
    before = [parameter.clone() for parameter in model.policy.parameters()]
    experiment.learn(model)
    assert model._n_updates == 2
    after = list(model.policy.parameters())
    assert all(bool(th.isfinite(parameter).all()) for parameter in after)
    assert any(not th.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_studies_draw_arguments_that_the_constructor_takes(name: str) -> None:
    algorithm = ALGORITHMS[name]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        trial = study.ask()
        drawn = algorithm.sampler(trial, 3, 2, {})
        assert drawn == algorithm.converter(trial.params)  # what --trial-id gets back from a stored study
        hyperparameters.check(algorithm.cls, drawn, {})
        assert drawn["n_steps"] == trial.user_attrs["n_steps"]
        assert math.isclose(drawn["gamma"], trial.user_attrs["gamma"])


def test_our_file_is_read_unless_another_is_given(tmp_path: Path) -> None:
    ours = manager(tmp_path, "trpo", "CartPole-v1")
    _, saved = ours.read_hyperparameters()
    assert dict(saved) == hyperparameters.read(ALGORITHMS["trpo"].config)["CartPole-v1"]
    other = tmp_path / "other.yml"
    other.write_text("CartPole-v1: {n_timesteps: 100, policy: MlpPolicy, target_kl: 0.2}")
    _, saved = manager(tmp_path, "trpo", "CartPole-v1", config=str(other)).read_hyperparameters()
    assert saved["target_kl"] == 0.2


def test_other_algorithms_are_left_to_the_zoo(tmp_path: Path) -> None:
    ppo = manager(tmp_path, "ppo", "CartPole-v1")
    ppo.read_hyperparameters()
    assert Path(ppo.config).parent == Path(rl_zoo3.__file__).parent / "hyperparams"
    assert ppo.tensorboard_log is None


def test_target_kl_may_fall_linearly(tmp_path: Path) -> None:
    experiment = manager(tmp_path, "trpo", "CartPole-v1", n_timesteps=64, hyperparams={**TINY, "target_kl": "lin_0.04"})
    model, saved = experiment.setup_experiment()
    assert saved["target_kl"] == "lin_0.04"
    model._current_progress_remaining = 0.25
    assert model._current_target_kl == pytest.approx(0.01)


def test_a_run_keeps_the_log_of_its_trust_region(tmp_path: Path) -> None:
    experiment = manager(tmp_path, "trpo", "CartPole-v1", n_timesteps=64, hyperparams=dict(TINY))
    model, _ = experiment.setup_experiment()
    experiment.learn(model)
    assert list(Path(experiment.save_path).rglob("events.out.tfevents.*"))


def test_wrong_names_are_reported_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("default:\n  n_timesteps: 100\n  policy: MlpPolicy\n  n_step: 16\n")
    with pytest.raises(UsageError, match=r"mine.yml, line 4: unknown hyperparameter 'n_step' of TRPO; did you mean 'n_steps'"):
        manager(tmp_path, "trpo", "CartPole-v1", config=str(path)).read_hyperparameters()
    with pytest.raises(UsageError, match=r"--hyperparams: unknown hyperparameter 'gama' of TRPO; did you mean 'gamma'"):
        manager(tmp_path, "trpo", "CartPole-v1", hyperparams={"gama": 0.9}).read_hyperparameters()


def test_the_zoos_own_command_uses_our_class(tmp_path: Path) -> None:
    command = "-m rl_zoo3.train --algo trpo --gym-packages sb3_trpo.zoo --env CartPole-v1 -n 64 --eval-freq -1 --hyperparams"
    settings = [f"{name}:{value}" for name, value in TINY.items()]
    subprocess.run(
        [sys.executable, *command.split(), *settings, "--log-folder", str(tmp_path)],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    run = tmp_path / "trpo" / "CartPole-v1_1"
    with zipfile.ZipFile(run / "CartPole-v1.zip") as archive:
        assert json.loads(archive.read("data"))["kl_is_joint"]
    config = yaml.unsafe_load((run / "CartPole-v1" / "config.yml").read_text())
    assert config["target_kl"] == hyperparameters.read(ALGORITHMS["trpo"].config)["CartPole-v1"]["target_kl"]
