from pathlib import Path

import pytest
import torch as th

pytest.importorskip("rl_zoo3", reason="needs the extra [zoo]")

import sb3_contrib
import yaml
from gymnasium import spaces
from stable_baselines3.common.distributions import kl_divergence, make_proba_distribution

from sb3_trpo import TRPO
from sb3_trpo.errors import UsageError
from sb3_trpo.saving.sb3_contrib import kl_dimensions
from sb3_trpo.zoo.convert import convert, main

#: Action space, and over how many dimensions sb3-contrib averages.
SPACES = [
    (spaces.Box(-1, 1, (3,)), 3),
    (spaces.MultiBinary(5), 5),
    (spaces.Discrete(4), 1),
    (spaces.MultiDiscrete([2, 3]), 1),
]


@pytest.mark.parametrize(("space", "d"), [*SPACES, (spaces.Box(-1, 1, (2, 2)), 4)])
def test_dimensions(space: spaces.Space, d: int) -> None:
    assert kl_dimensions(space) == d


@pytest.mark.parametrize("space", [space for space, _ in SPACES])
def test_their_kl_times_the_dimensions_is_the_joint_one(space: spaces.Space) -> None:
    th.manual_seed(0)
    p, q = make_proba_distribution(space), make_proba_distribution(space)
    for distribution in (p, q):
        if isinstance(space, spaces.Box):
            distribution.proba_distribution(th.randn(50, 3), th.randn(3))
        else:
            distribution.proba_distribution(th.randn(50, 5 if not isinstance(space, spaces.Discrete) else 4))
    parts = [(p.distribution, q.distribution)]
    if isinstance(space, spaces.MultiDiscrete):
        parts = list(zip(p.distribution, q.distribution, strict=True))
    joint = sum(th.distributions.kl_divergence(a, b).reshape(50, -1).sum(dim=1) for a, b in parts)
    theirs = kl_divergence(p, q).mean()  # as in sb3_contrib/trpo/trpo.py
    th.testing.assert_close(theirs * kl_dimensions(space), joint.mean())


def test_their_defaults_are_written_out_and_their_critic_is_left_out() -> None:
    theirs = {"n_steps": 1024, "batch_size": 128, "learning_rate": 1e-3, "n_critic_updates": 20}
    assert convert(theirs, spaces.Box(-1, 1, (3,))) == {"n_steps": 1024, "target_kl": 0.03, "cg_damping": 0.3}


def test_their_critic_can_be_kept() -> None:
    theirs = {"batch_size": 64, "target_kl": 0.04}
    expected = {"batch_size": 64, "target_kl": 0.24, "cg_damping": 0.6, "critic_method": "minibatch"}
    assert convert(theirs, spaces.Box(-1, 1, (6,)), keep_critic=True) == expected


def test_without_an_action_space_the_kl_is_left_to_our_defaults() -> None:
    assert convert({"target_kl": 0.04, "cg_damping": 0.2, "gamma": 0.9}, None) == {"gamma": 0.9}


def test_it_is_the_rule_of_load(tmp_path: Path) -> None:
    theirs = sb3_contrib.TRPO("MlpPolicy", "Reacher-v5", target_kl=0.02, cg_damping=0.3, n_steps=64, batch_size=64)
    theirs.save(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="converted to the joint KL"):
        loaded = TRPO.load(tmp_path / "theirs")
    converted = convert({"target_kl": 0.02, "cg_damping": 0.3}, theirs.action_space)
    assert converted == {"target_kl": 0.04, "cg_damping": 0.6}
    assert (loaded.target_kl, loaded.cg_damping) == (converted["target_kl"], converted["cg_damping"])


def test_a_file_is_converted_but_for_environments_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = {
        "default": {"policy": "MlpPolicy", "target_kl": 0.02},
        "atari": {"policy": "CnnPolicy", "batch_size": 64},
        "Reacher-v5": {"target_kl": 0.02, "n_steps": 512},
        "Reecher-v5": {"target_kl": 0.02},
    }
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump(theirs))
    main([str(tmp_path / "theirs.yml"), "--output", str(tmp_path / "ours.yml")])
    assert yaml.safe_load((tmp_path / "ours.yml").read_text()) == {
        "default": {"policy": "MlpPolicy"},
        "atari": {"policy": "CnnPolicy", "target_kl": 0.01, "cg_damping": 0.1},
        "Reacher-v5": {"n_steps": 512, "target_kl": 0.04, "cg_damping": 0.2},
    }
    said = capsys.readouterr().err
    assert "left out: Reecher-v5: unknown environment; did you mean 'Reacher-v5'?" in said
    assert "default: target_kl and cg_damping depend on the environment" in said


def test_arguments_are_converted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--env", "Reacher-v5", "--hyperparams", "target_kl:0.04"])
    assert yaml.safe_load(capsys.readouterr().out) == {"Reacher-v5": {"target_kl": 0.08, "cg_damping": 0.2}}


def test_an_environment_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(UsageError, match="CartPol-v1: unknown environment"):
        main(["--env", "CartPol-v1"])
    with pytest.raises(UsageError, match="Hopper-v2: cannot be made here"):  # it needs mujoco-py
        main(["--env", "Hopper-v2"])
