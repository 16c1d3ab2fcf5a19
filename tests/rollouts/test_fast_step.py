import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_trpo.rollouts.fast_step import fast_step_fn, update_moments

N_ENVS = 3
FLOAT32 = spaces.Box(-np.inf, np.inf, (3,))
OBSERVATIONS: dict[str, spaces.Space] = {
    "float32": FLOAT32,
    "float64": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    "uint8": spaces.Box(0, 255, (3,), np.uint8),
    "int64": spaces.Box(-1000, 1000, (3,), np.int64),
    "discrete": spaces.Discrete(5),
    "dict": spaces.Dict({"place": FLOAT32, "gear": spaces.Discrete(4)}),
    "tuple": spaces.Tuple([FLOAT32, spaces.Discrete(4)]),
}


class Wander(gym.Env):
    """Random observations, and rewards that depend on the action; ends by itself, or by a limit of nine steps."""

    action_space = spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, observation_space: spaces.Space = FLOAT32) -> None:
        self.observation_space = observation_space

    def _observe(self, space: spaces.Space) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._observe(subspace) for key, subspace in space.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(self._observe(subspace) for subspace in space)
        if isinstance(space, spaces.Discrete):
            return int(self.np_random.integers(space.n))
        if np.issubdtype(space.dtype, np.integer):
            return self.np_random.integers(0, 200, space.shape).astype(space.dtype)
        return 3.0 + self.np_random.normal(size=space.shape)  # float64 whatever the space says, as many environments do

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(self.observation_space), {"luck": self.np_random.random()}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        draw = self.np_random.random()
        reward = float(np.sum(action)) + draw
        return self._observe(self.observation_space), reward, draw < 0.1, self.steps >= 9, {"draw": draw, "kept": [self.steps]}


def make_dummy(observation_space: spaces.Space = FLOAT32, cls: type[DummyVecEnv] = DummyVecEnv) -> DummyVecEnv:
    return cls([lambda: Monitor(Wander(observation_space)) for _ in range(N_ENVS)])


def without_time(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for info in infos:
        if "episode" in info:
            info["episode"].pop("t")
    return infos


def history(env: VecEnv, n_steps: int, make_step: Callable[[VecEnv], Any] = fast_step_fn) -> list[Any]:
    """Everything that a user sees of each step."""
    step = make_step(env)
    env.seed(7)
    generator = np.random.default_rng(0)
    steps: list[Any] = [env.reset()]
    for _ in range(n_steps):
        observations, rewards, dones, infos = step(generator.uniform(-1.0, 1.0, (N_ENVS, 2)))
        steps.append((observations, rewards, dones, without_time(infos), copy.deepcopy(env.reset_infos)))
        if isinstance(env, VecNormalize):
            steps.append((env.get_original_obs(), env.get_original_reward(), env.returns.copy(), statistics(env)))
    return steps


def usual(env: VecEnv) -> Any:
    return env.step


def statistics(env: VecNormalize) -> list[Any]:
    of_observations = vars(env).get("obs_rms", {})  # none if only rewards are normalised
    moments = [*(of_observations.values() if isinstance(of_observations, dict) else [of_observations]), env.ret_rms]
    return [(copy.copy(each.mean), copy.copy(each.var), each.count) for each in moments]


def assert_identical(actual: Any, expected: Any) -> None:
    """Bit for bit, the types of arrays included."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict)
        assert list(actual) == list(expected)
        for key in expected:
            assert_identical(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_identical(one, other)
    else:
        assert type(actual) is type(expected)
        assert np.asarray(actual).dtype == np.asarray(expected).dtype
        np.testing.assert_array_equal(actual, expected)


def assert_lean_is_identical(make: Callable[[], VecEnv], n_steps: int = 100) -> None:
    assert_identical(history(make(), n_steps), history(make(), n_steps, usual))


class TestStepDummy:
    @pytest.mark.parametrize("space", OBSERVATIONS.values(), ids=OBSERVATIONS)
    def test_steps_are_sb3s(self, space):
        assert_lean_is_identical(lambda: make_dummy(space), 300 if space is FLOAT32 else 100)

    def test_it_is_lean_that_steps(self, monkeypatch):
        """So that the comparison is not of SB3 with itself."""
        env = make_dummy()
        env.reset()
        step = fast_step_fn(env)
        monkeypatch.setattr(DummyVecEnv, "step_wait", None)
        step(np.zeros((N_ENVS, 2)))

    def test_both_ends_of_episodes_occur(self):
        steps = history(make_dummy(), 100)[1:]
        truncated = [info["TimeLimit.truncated"] for *_, infos, _ in steps for info in infos if "terminal_observation" in info]
        assert min(truncated.count(True), truncated.count(False)) > 5

    @pytest.mark.parametrize("name", ["float32", "dict"])
    def test_nothing_returned_changes_later(self, name):
        env = make_dummy(OBSERVATIONS[name])
        env.reset()
        step = fast_step_fn(env)
        returned, copies = [], []
        for _ in range(40):
            returned.append(step(np.zeros((N_ENVS, 2))))
            copies.append(copy.deepcopy(returned[-1]))
        assert_identical(returned, copies)

    def test_an_environment_may_use_one_info_again(self):
        class OneInfo(Wander):
            info: dict[str, Any]

            def reset(self, **kwargs):
                self.info = {}
                return super().reset(**kwargs)

            def step(self, action):
                *results, info = super().step(action)
                self.info.update(info)
                return *results, self.info

        env = DummyVecEnv([OneInfo])
        env.reset()
        step = fast_step_fn(env)
        draws = [step(np.zeros((1, 2)))[3][0] for _ in range(20)]
        assert len({info["draw"] for info in draws}) == 20

    def test_changing_what_was_returned_changes_nothing(self):
        expected = history(make_dummy(), 30, usual)
        env = make_dummy()
        step = fast_step_fn(env)
        env.seed(7)
        env.reset()
        generator = np.random.default_rng(0)
        for i in range(1, 31):
            observations, rewards, dones, infos = step(generator.uniform(-1.0, 1.0, (N_ENVS, 2)))
            assert_identical((observations, rewards, dones, without_time(infos)), expected[i][:4])
            observations += 1.0
            rewards += 1.0
            dones[:] = True
            infos[0].clear()


NORMALIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("float32", {}),
    "float64": ("float64", {}),
    "uint8": ("uint8", {}),
    "int64": ("int64", {}),
    "clipped": ("float32", {"clip_obs": 0.5, "clip_reward": 0.3}),
    "gamma": ("float32", {"gamma": 0.5, "epsilon": 0.1}),
    "not_training": ("float32", {"training": False}),
    "rewards_only": ("float32", {"norm_obs": False}),
    "rewards_only_of_dict": ("dict", {"norm_obs": False}),
    "observations_only": ("float32", {"norm_reward": False}),
    "nothing": ("float32", {"norm_obs": False, "norm_reward": False}),
    "dict": ("dict", {"norm_obs_keys": ["place"]}),
}


class TestStepNormalize:
    @pytest.mark.parametrize(("name", "arguments"), NORMALIZE.values(), ids=NORMALIZE)
    def test_steps_are_sb3s(self, name, arguments):
        assert_lean_is_identical(lambda: VecNormalize(make_dummy(OBSERVATIONS[name]), **arguments), 100 if arguments else 300)

    def test_it_is_lean_that_steps(self, monkeypatch):
        env = VecNormalize(make_dummy())
        env.reset()
        step = fast_step_fn(env)
        monkeypatch.setattr(VecNormalize, "step_wait", None)
        monkeypatch.setattr(DummyVecEnv, "step_wait", None)
        step(np.zeros((N_ENVS, 2)))

    def test_training_may_be_switched_while_stepping(self):
        def run(make_step):
            env = VecNormalize(make_dummy())
            step = make_step(env)
            env.seed(0)
            results = [env.reset()]
            for i in range(90):
                env.training, env.norm_obs, env.norm_reward = i % 2 == 0, i % 3 > 0, i % 5 > 0
                results.append((*step(np.full((N_ENVS, 2), 0.1))[:3], statistics(env)))
            return results

        assert_identical(run(fast_step_fn), run(usual))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: VecFrameStack(VecNormalize(make_dummy()), 2),
            lambda: VecNormalize(VecFrameStack(make_dummy(), 2)),
            lambda: VecNormalize(VecMonitor(DummyVecEnv([Wander for _ in range(N_ENVS)]))),
            lambda: VecNormalize(VecNormalize(make_dummy(), norm_reward=False), norm_obs=False),
        ],
        ids=["frames_of_normalised", "normalised_frames", "monitored", "twice"],
    )
    def test_among_other_wrappers(self, make):
        assert_lean_is_identical(make)

    def test_saved_statistics_are_sb3s(self, tmp_path):
        saved = []
        for make_step in (fast_step_fn, usual):
            env = VecNormalize(make_dummy())
            history(env, 60, make_step)
            env.save(str(tmp_path / "normalize.pkl"))
            assert b"sb3_trpo" not in (tmp_path / "normalize.pkl").read_bytes()
            saved.append(VecNormalize.load(str(tmp_path / "normalize.pkl"), make_dummy()))
        assert_identical(statistics(saved[0]), statistics(saved[1]))
        assert vars(saved[0]).keys() == vars(saved[1]).keys()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("n_envs", [1, 2, 8, 33])
def test_moments_are_updated_as_sb3_does(n_envs, shape, dtype):
    generator = np.random.default_rng(0)
    ours, sb3s = RunningMeanStd(shape=shape), RunningMeanStd(shape=shape)
    for _ in range(20):
        batch = generator.uniform(0, 250, (n_envs, *shape)).astype(dtype)
        update_moments(ours, batch)
        sb3s.update(batch)
        if np.__version__ >= "2":
            assert_identical((ours.mean, ours.var, ours.count), (sb3s.mean, sb3s.var, sb3s.count))
        else:  # sums in another order
            for our, sb3 in ((ours.mean, sb3s.mean), (ours.var, sb3s.var), (ours.count, sb3s.count)):
                np.testing.assert_allclose(our, sb3, rtol=1e-6)


class LoudDummy(DummyVecEnv):
    """A class of a user's own."""

    def step_wait(self):
        observations, rewards, dones, infos = super().step_wait()
        return observations, rewards + 100.0, dones, infos


class LoudNormalize(VecNormalize):
    """A class of a user's own, which changes what SB3's step calls."""

    def normalize_reward(self, reward):
        return reward + 100.0


class TestWhatIsStepped:
    def layers(self):
        dummy = make_dummy()
        normalize = VecNormalize(dummy)
        stack = VecFrameStack(normalize, 2)
        stack.reset()
        return [dummy, normalize, stack]

    def test_the_environments_stay_as_they_are(self):
        layers = self.layers()
        before = [set(vars(layer)) | {"actions"} for layer in layers]  # which is there from the first step on
        for layer in layers:
            fast_step_fn(layer)(np.zeros((N_ENVS, 2)))
        assert [set(vars(layer)) | {"actions"} for layer in layers] == before
        assert layers[0].step_wait.__func__ is DummyVecEnv.step_wait
        assert layers[1].step_wait.__func__ is VecNormalize.step_wait

    def test_both_ways_of_stepping_may_alternate(self):
        def run(make_steps):
            env = VecNormalize(make_dummy())
            steps = [make_step(env) for make_step in make_steps]
            env.seed(0)
            results = [env.reset()]
            for i in range(60):
                results.append((*steps[i // 7 % 2](np.full((N_ENVS, 2), 0.1))[:3], statistics(env)))
            return results

        assert_identical(run([fast_step_fn, usual]), run([usual, usual]))

    def test_errors_of_the_environment_come_through(self):
        for layer in self.layers():
            with pytest.raises(TypeError, match="NoneType"):
                fast_step_fn(layer)(None)

    @pytest.mark.parametrize("cls", [LoudDummy, LoudNormalize, VecNormalize])
    def test_subclasses_are_stepped_by_their_own_methods(self, cls):
        def make():
            if cls is LoudDummy:
                return make_dummy(cls=LoudDummy)
            return cls(make_dummy(cls=LoudDummy), norm_obs=False, norm_reward=False)

        assert_lean_is_identical(make, 30)
        env = make()
        env.reset()
        assert (fast_step_fn(env)(np.zeros((N_ENVS, 2)))[1] >= 100.0).all()

    @pytest.mark.parametrize("depth", [0, 1])
    def test_what_a_user_has_put_there_is_called(self, depth):
        layers = self.layers()
        calls = []
        original = layers[depth].step_wait

        def own():
            calls.append(1)
            return original()

        layers[depth].step_wait = own
        fast_step_fn(layers[1])(np.zeros((N_ENVS, 2)))
        assert calls == [1]
        assert layers[depth].step_wait is own
