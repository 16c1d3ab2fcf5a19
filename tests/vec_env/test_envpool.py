import copy
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_trpo import TRPO
from sb3_trpo.rollouts.fast_step import fast_step_fn
from sb3_trpo.vec_env.envpool import make_envpool


def test_the_error_without_envpool_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[envpool\]'"):
        make_envpool("CartPole-v1")


@pytest.fixture(scope="module")
def envpool():
    return pytest.importorskip("envpool", reason="EnvPool (the extra [envpool], a wheel of 150 MB and more) is not installed")


pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered.*")


def play(env, n_steps, seed=0, make_step=lambda env: env.step):
    """Random actions, the same for every environment of the same spaces; each step's observations, actions and results."""
    env.action_space.seed(seed)
    observations = env.reset()
    step = make_step(env)
    steps = []
    for _ in range(n_steps):
        actions = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
        results = step(actions)
        steps.append((observations, actions, *results))
        observations = results[0]
    return steps


def assert_same_play(first, second):
    for one, other in zip(first, second, strict=True):
        for left, right in zip(one[:5], other[:5], strict=True):
            np.testing.assert_array_equal(left, right)


def test_every_step_is_a_transition_of_the_true_dynamics(envpool):
    """Gymnasium's CartPole, put into the state before each step, gets to the state after it."""
    oracle = gym.make("CartPole-v1").unwrapped
    oracle.reset()
    n_ends = 0
    for observations, actions, after, rewards, dones, infos in play(make_envpool("CartPole-v1", 5, seed=1), 150):
        assert (rewards == 1.0).all()
        for env in range(5):
            oracle.state, oracle.steps_beyond_terminated = observations[env].astype(float), None
            expected, _, terminated, _, _ = oracle.step(int(actions[env]))
            assert terminated == dones[env]
            actual = infos[env]["terminal_observation"] if dones[env] else after[env]
            np.testing.assert_allclose(actual, expected, atol=1e-5)
            if dones[env]:
                assert np.abs(after[env]).max() <= 0.05  # a first observation
                assert not infos[env]["TimeLimit.truncated"]
            else:
                assert "terminal_observation" not in infos[env]
                assert "episode" not in infos[env]
        n_ends += dones.sum()
    assert n_ends > 20


def test_the_transitions_are_those_of_envpools_own_loop(envpool):
    """One environment a pool, stepped as EnvPool wants it: the step after an episode's end resets, and is dropped."""
    n_envs, seed = 3, 11
    steps = play(make_envpool("Hopper-v5", n_envs, seed=seed, max_episode_steps=17), 60)
    for env in range(n_envs):
        pool = envpool.make_gymnasium("Hopper-v5", num_envs=1, seed=[seed + env], max_episode_steps=17)
        expected_observation = pool.reset()[0][0]
        for observations, actions, after, rewards, dones, infos in steps:
            np.testing.assert_array_equal(observations[env], expected_observation)
            last, reward, terminated, truncated, _ = pool.step(actions[None, env])
            assert reward[0] == rewards[env]
            assert dones[env] == (terminated | truncated)[0]
            assert infos[env]["TimeLimit.truncated"] == truncated[0]
            expected_observation = last[0]
            if dones[env]:
                np.testing.assert_array_equal(infos[env]["terminal_observation"], last[0])
                expected_observation = pool.step(actions[None, env])[0][0]
            np.testing.assert_array_equal(after[env], expected_observation)
    assert any(dones.any() for *_, dones, _ in steps)


def test_time_limits_are_told_from_terminations(envpool):
    steps = play(make_envpool("CartPole-v1", 6, seed=0, max_episode_steps=15), 100)
    truncated = {True: 0, False: 0}
    for *_, dones, infos in steps:
        for done, info in zip(dones, infos, strict=True):
            if done:
                assert info["TimeLimit.truncated"] == (info["elapsed_step"] == 15)
                truncated[info["TimeLimit.truncated"]] += 1
            else:
                assert info["TimeLimit.truncated"] is False
    assert min(truncated.values()) > 3


def test_episode_statistics_are_those_of_vec_monitor(envpool):
    ours = make_envpool("Pendulum-v1", 3, seed=0, max_episode_steps=7)
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        monitored = VecMonitor(make_envpool("Pendulum-v1", 3, seed=0, max_episode_steps=7))
    first, second = play(ours, 40), play(monitored, 40)
    episodes, expected = (
        [info["episode"] for *_, infos in steps for info in infos if "episode" in info] for steps in (first, second)
    )
    assert len(episodes) == 15
    for episode, other in zip(episodes, expected, strict=True):
        assert episode.keys() == other.keys() == {"r", "l", "t"}
        assert episode["r"] == pytest.approx(other["r"], abs=1e-4)
        assert episode["l"] == other["l"] == 7
        assert 0 <= episode["t"] < 60


def test_a_reset_forgets_unfinished_episodes(envpool):
    env = make_envpool("Pendulum-v1", 2, seed=0, max_episode_steps=5)
    play(env, 3)
    infos = play(env, 5)[-1][-1]
    assert [info["episode"]["l"] for info in infos] == [5, 5]
    assert infos[0]["episode"]["r"] > -5 * 17  # of five steps, each worth -16.3 or more


def test_nothing_returned_changes_later(envpool):
    env = make_envpool("CartPole-v1", 3, seed=0)
    env.reset()
    returned, copies = [], []
    for step in range(40):
        returned.append(env.step(np.full(3, step // 12 % 2)))
        copies.append(copy.deepcopy(returned[-1]))
    for results, copied in zip(returned, copies, strict=True):
        np.testing.assert_equal(results, copied)


class TestSeeds:
    def test_the_same_seed_gives_the_same_episodes_with_any_number_of_threads(self, envpool):
        first = play(make_envpool("CartPole-v1", 4, seed=3, num_threads=1), 50)
        assert_same_play(first, play(make_envpool("CartPole-v1", 4, seed=3, num_threads=2), 50))

    def test_each_environment_counts_on_from_the_seed(self, envpool):
        observations = make_envpool("CartPole-v1", 3, seed=3).reset()
        assert len(np.unique(observations[:, 0])) == 3
        np.testing.assert_array_equal(make_envpool("CartPole-v1", 1, seed=4).reset()[0], observations[1])

    def test_none_is_a_random_seed_that_numpy_determines(self, envpool):
        np.random.seed(0)  # noqa: NPY002 - SB3 seeds with it
        first, second = (make_envpool("CartPole-v1", 1).reset() for _ in range(2))
        assert (first != second).any()
        np.random.seed(0)  # noqa: NPY002
        np.testing.assert_array_equal(first, make_envpool("CartPole-v1", 1).reset())

    def test_seeding_acts_at_the_next_reset_and_once(self, envpool):
        env = make_envpool("CartPole-v1", 2, seed=3)
        first = play(env, 20)
        assert (env.reset() != first[0][0]).any()
        assert env.seed(3) == [3, 4]
        assert_same_play(first, play(env, 20))
        assert (env.reset() != first[0][0]).any()

    def test_seeds_of_32_bits_are_fine(self, envpool):
        env = make_envpool("CartPole-v1", 2, seed=2**32 - 2)
        assert len(np.unique(env.reset()[:, 0])) == 2


@pytest.mark.parametrize("task_id", ["CartPole-v1", "Pendulum-v1", "HalfCheetah-v5"])
def test_spaces_are_gymnasiums(envpool, task_id):
    if "Cheetah" in task_id:
        pytest.importorskip("mujoco")
    env, other = make_envpool(task_id, 2, seed=0), gym.make(task_id)
    assert env.observation_space == other.observation_space
    assert env.action_space == other.action_space


@pytest.mark.parametrize("task_id", ["HalfCheetah-v5", "FetchReach-v4", "FrozenLake-v1", "Blackjack-v1"])
def test_every_observation_is_of_the_space(envpool, task_id):
    env = make_envpool(task_id, 2, seed=0, max_episode_steps=5)
    is_dict = isinstance(env.observation_space, spaces.Dict)
    all_spaces = env.observation_space.spaces if is_dict else {None: env.observation_space}

    def check(observations, shape):
        for key, space in all_spaces.items():
            array = observations[key] if is_dict else observations
            assert array.dtype == space.dtype
            assert array.shape == (*shape, *space.shape)

    check(env.reset(), (2,))
    n_ends = 0
    for _, _, after, rewards, dones, infos in play(env, 12):
        check(after, (2,))
        assert (rewards.dtype, dones.dtype) == (np.float32, bool)
        for info in infos:
            if "terminal_observation" in info:
                n_ends += 1
                check(info["terminal_observation"], ())
    assert n_ends >= 4


def test_infos_are_those_of_each_environment(envpool):
    for _, _, _, rewards, _, infos in play(make_envpool("HalfCheetah-v5", 3, seed=0), 5):
        for env, info in enumerate(infos):
            assert info["env_id"] == env
            assert info["reward_run"] + info["reward_ctrl"] == pytest.approx(rewards[env], abs=1e-5)
            assert type(info["x_position"]) is float


def test_what_there_is_of_attributes(envpool):
    env = make_envpool("CartPole-v1", 3, seed=0, max_episode_steps=9)
    assert env.get_attr("max_episode_steps") == [9, 9, 9]
    assert env.get_attr("max_episode_steps", 1) == [9]
    assert env.render_mode is None
    assert not env.has_attr("state")
    with pytest.raises(AttributeError, match="'state' is not there"):
        env.get_attr("state")
    with pytest.raises(NotImplementedError, match="gravity= to make_envpool"):
        env.set_attr("gravity", 3.0)
    with pytest.raises(NotImplementedError, match="no method 'push'"):
        env.env_method("push")
    with pytest.raises(NotImplementedError, match="take no options"):
        env.set_options({"low": 0.0})
    assert env.env_is_wrapped(Monitor) == [True, True, True]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, [0, 2]) == [False, False]
    env.close()
    env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_id": "CartPole-v7"}, "task_id='CartPole-v7' is not allowed.*CartPole-v1"),
        ({"task_id": "?"}, "none is close"),
        ({"n_envs": 0}, "n_envs=0 is not allowed: it must be a positive integer"),
        ({"num_threads": -1}, "num_threads=-1 is not allowed"),
        ({"n_envs": 4, "batch_size": 2}, "batch_size=2 is not allowed: it must be n_envs"),
    ],
)
def test_wrong_arguments(envpool, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_envpool(**{"task_id": "CartPole-v1", **arguments})


def test_options_of_envpool_that_have_another_name_here(envpool):
    with pytest.raises(TypeError, match="num_envs"):
        make_envpool("CartPole-v1", num_envs=2)


def test_the_lean_stepping_of_a_normalised_pool_gives_the_same(envpool):
    lean, usual = (VecNormalize(make_envpool("CartPole-v1", 3, seed=0)) for _ in range(2))
    assert_same_play(play(lean, 60, make_step=fast_step_fn), play(usual, 60))
    np.testing.assert_array_equal(lean.obs_rms.var, usual.obs_rms.var)


def test_trpo_learns_on_it(envpool):
    env = VecNormalize(make_envpool("CartPole-v1", 8, seed=0, num_threads=1))
    model = TRPO("MlpPolicy", env, n_steps=128, seed=0, device="cpu")
    model.learn(6 * 8 * 128)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    assert np.mean(returns[:30]) < 40 < 80 < np.mean(returns[-20:])
    monitored = make_envpool("CartPole-v1", 2, max_episode_steps=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Monitor")  # that there is none
        evaluate_policy(model, monitored, n_eval_episodes=2)


def test_learning_is_reproducible(envpool):
    def learn(seed):
        env = VecNormalize(make_envpool("Hopper-v5", 3))
        model = TRPO("MlpPolicy", env, n_steps=64, seed=seed, device="cpu")
        model.learn(2 * 3 * 64)
        return th.cat([parameter.flatten() for parameter in model.policy.parameters()])

    first = learn(1)
    assert th.equal(first, learn(1))
    assert not th.equal(first, learn(2))


def test_a_rollout_holds_no_resetting_steps(envpool):
    """Every state of a rollout but the first ones of an episode follows from the one before."""
    model = TRPO("MlpPolicy", make_envpool("CartPole-v1", 4, seed=0), n_steps=64, seed=0, device="cpu")
    model.learn(4 * 64)
    buffer = model.rollout_buffer
    oracle = gym.make("CartPole-v1").unwrapped
    oracle.reset()
    assert 8 < buffer.episode_starts.sum() < 40
    assert (buffer.rewards == 1.0).all()
    for env in range(4):
        for step in range(63):
            if not buffer.episode_starts[step + 1, env]:
                oracle.state, oracle.steps_beyond_terminated = buffer.observations[step, env].astype(float), None
                expected = oracle.step(int(buffer.actions[step, env].item()))[0]
                np.testing.assert_allclose(buffer.observations[step + 1, env], expected, atol=1e-5)
