from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from support.tasks import v5
from torch import nn

from sb3_trpo import TRPO
from sb3_trpo.actions import raw_actions
from sb3_trpo.rollouts.collect import find_truncations
from sb3_trpo.rollouts.eligibility import supports_deferred_evaluation

N_STEPS, N_ENVS = 17, 3
VECTOR = spaces.Box(-np.inf, np.inf, (3,))
BOX = spaces.Box(-0.5, 0.5, (2,))
DICT = spaces.Dict({"place": VECTOR, "gear": spaces.Discrete(4), "flags": spaces.MultiBinary(2)})
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


class Wander(gym.Env):
    """Random observations; rewards and ends depend on the action, so that another action would show."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def _observe(self, space: spaces.Space) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._observe(subspace) for key, subspace in space.items()}
        if isinstance(space, spaces.Discrete):
            return int(self.np_random.integers(space.n))
        if isinstance(space, spaces.MultiBinary):
            return self.np_random.integers(0, 2, space.n).astype(np.int8)
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 256, space.shape).astype(np.uint8)
        return self.np_random.normal(size=space.shape)  # float64 whatever the space says, as many environments do

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(self.observation_space), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        draw = self.np_random.random()
        reward = float(np.sum(action)) + draw
        return self._observe(self.observation_space), reward, draw < 0.1, False, {"draw": draw, "is_success": draw < 0.05}


def make_env(observation_space: spaces.Space, action_space: spaces.Space, limit: int = 5) -> DummyVecEnv:
    """Episodes end by themselves after ten steps in the mean, or by the limit."""
    env_fns = [lambda: Monitor(gym.wrappers.TimeLimit(Wander(observation_space, action_space), limit)) for _ in range(N_ENVS)]
    return DummyVecEnv(env_fns)


class Recorder(BaseCallback):
    """Keeps what callbacks find at each step, without a copy, and the events."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.steps: list[dict[str, Any]] = []
        self.copies: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.ends: list[dict[str, Any]] = []

    def _on_rollout_start(self) -> None:
        self.events.append("start")

    def _on_step(self) -> bool:
        names = ["new_obs", "rewards", "dones", "infos", "actions", "clipped_actions", "n_steps"]
        self.steps.append({name: self.locals[name] for name in names})
        rewards = self.locals["rewards"].copy()  # SB3's loop adds the bootstrap value to the array itself
        infos = [{**info, "episode": None} for info in self.locals["infos"]]
        self.copies.append({**self.steps[-1], "rewards": rewards, "infos": infos})
        self.events.append("step")
        assert self.locals["self"] is self.model
        assert self.locals["env"] is self.model.env
        assert self.locals["rollout_buffer"] is self.model.rollout_buffer
        assert self.locals["n_rollout_steps"] == self.model.n_steps
        assert self.num_timesteps == self.model.num_timesteps
        return self.n_calls != self.stop_at

    def _on_rollout_end(self) -> None:
        self.events.append("end")
        self.ends.append(dict(self.locals))


def sb3_forward(policy: ActorCriticPolicy, actions: list[np.ndarray]) -> Any:
    """SB3's ``ActorCriticPolicy.forward``, but for the actions, which are given."""
    remaining = iter(actions)

    def forward(obs: Any, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        features = policy.extract_features(obs)
        if policy.share_features_extractor:
            latent_pi, latent_vf = policy.mlp_extractor(features)
        else:
            latent_pi = policy.mlp_extractor.forward_actor(features[0])
            latent_vf = policy.mlp_extractor.forward_critic(features[1])
        chosen = th.as_tensor(next(remaining))
        distribution = policy._get_action_dist_from_latent(latent_pi)
        flat = chosen.flatten(start_dim=1) if chosen.ndim > 2 else chosen
        return chosen, policy.value_net(latent_vf), distribution.log_prob(flat)

    return forward


def contents(buffer: RolloutBuffer) -> dict[str, Any]:
    names = ["actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns"]
    observations = buffer.observations if isinstance(buffer.observations, dict) else {"all": buffer.observations}
    return {name: getattr(buffer, name).copy() for name in names} | {
        f"observations of {key}": array.copy() for key, array in observations.items()
    }


EXACT = ("actions", "episode_starts", "observations")


def assert_same_contents(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        if name.startswith(EXACT):
            np.testing.assert_array_equal(actual[name], array, err_msg=name)
        else:
            np.testing.assert_allclose(actual[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_array_equal(actual, expected)


def collect(model: TRPO, loop: Any, n_rollouts: int, callback: Recorder) -> list[dict[str, Any]]:
    """Rollouts one after the other, without updates between; the buffer after each."""
    _, callback = model._setup_learn(10**6, callback)
    filled = []
    for _ in range(n_rollouts):
        assert loop(model, model.env, callback, model.rollout_buffer, model.n_steps)
        assert model.rollout_buffer.full
        assert model.rollout_buffer.pos == model.n_steps
        filled.append(contents(model.rollout_buffer))
    return filled


#: Name ↦ observation space, action space, arguments of TRPO; "normalize" are those of VecNormalize.
CASES: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any]]] = {
    "box": (VECTOR, BOX, {}),
    "box_matrix": (VECTOR, spaces.Box(-0.5, 0.5, (2, 2)), {}),
    "box_float64": (spaces.Box(-np.inf, np.inf, (2, 2), np.float64), spaces.Box(-0.5, 0.5, (2,), np.float64), {}),
    "discrete": (VECTOR, spaces.Discrete(4), {}),
    "multi_discrete": (VECTOR, spaces.MultiDiscrete([2, 3, 4]), {}),
    "multi_binary": (VECTOR, spaces.MultiBinary(3), {}),
    "discrete_observation": (spaces.Discrete(5), spaces.Discrete(2), {}),
    "multi_discrete_observation": (spaces.Box(0, 9, (3,), np.uint8), spaces.Discrete(2), {}),
    "dict": (DICT, BOX, {}),
    "dict_discrete": (DICT, spaces.Discrete(3), {}),
    "image": (IMAGE, spaces.Discrete(2), {"policy": "CnnPolicy", "n_steps": 8}),
    "separate_extractors": (VECTOR, BOX, {"policy_kwargs": {"share_features_extractor": False, "activation_fn": nn.ELU}}),
    "gsde": (VECTOR, BOX, {"use_sde": True}),
    "gsde_resampled": (VECTOR, BOX, {"use_sde": True, "sde_sample_freq": 4}),
    "gsde_squashed": (VECTOR, BOX, {"use_sde": True, "sde_sample_freq": 2, "policy_kwargs": {"squash_output": True}}),
    "normalize": (VECTOR, BOX, {"normalize": {}}),
    "normalize_rewards": (VECTOR, spaces.Discrete(4), {"normalize": {"norm_obs": False, "clip_reward": 0.5}}),
    "normalize_dict": (DICT, BOX, {"normalize": {"norm_obs_keys": ["place"]}}),
    "chunks": (VECTOR, BOX, {"max_batch_size": 7}),
    "chunks_dict": (DICT, spaces.MultiDiscrete([3, 2]), {"max_batch_size": 1}),
    "clip": (VECTOR, spaces.Box(-0.5, 1.5, (2,)), {"action_bound": "clip"}),
    "scaled_values": (VECTOR, BOX, {"return_scaling": True}),
    "no_discount": (VECTOR, BOX, {"gamma": 1.0, "gae_lambda": 1.0}),
}


def make_model(name: str, **changes: Any) -> TRPO:
    observation_space, action_space, arguments = CASES[name]
    arguments = {"n_steps": N_STEPS, "gamma": 0.9, "gae_lambda": 0.8, **arguments, **changes}
    env: VecEnv = make_env(observation_space, action_space)
    if "normalize" in arguments:
        env = VecNormalize(env, **arguments.pop("normalize"))
    usual = "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
    model = TRPO(arguments.pop("policy", usual), env, seed=0, device="cpu", **arguments)
    with th.no_grad():  # values and probabilities that differ from state to state
        model.policy.value_net.weight.mul_(3.0)
        model.policy.action_net.weight.mul_(50.0)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_buffer_is_that_of_sb3s_loop_with_the_same_actions(name):
    ours, sb3s = make_model(name), make_model(name)
    recorder, expected_recorder = Recorder(), Recorder()
    filled = collect(ours, TRPO.collect_rollouts, 2, recorder)
    sb3s.policy.forward = sb3_forward(sb3s.policy, [step["actions"] for step in recorder.steps])
    with raw_actions(sb3s.policy):  # SB3's loop stores what forward returns
        expected = collect(sb3s, OnPolicyAlgorithm.collect_rollouts, 2, expected_recorder)
    for one, other in zip(filled, expected, strict=True):
        assert_same_contents(one, other)
    assert_same(recorder.copies, expected_recorder.copies)
    assert recorder.events == expected_recorder.events
    assert_same(ours._last_obs, sb3s._last_obs)
    assert_same(ours._last_episode_starts, sb3s._last_episode_starts)
    assert ours.num_timesteps == sb3s.num_timesteps == 2 * ours.n_steps * N_ENVS
    episodes, expected_episodes = ([(e["r"], e["l"]) for e in model.ep_info_buffer] for model in (ours, sb3s))
    assert episodes == expected_episodes
    assert len(episodes) > 5
    assert list(ours.ep_success_buffer) == list(sb3s.ep_success_buffer)
    assert len(ours.ep_success_buffer) == len(episodes)
    truncated = [info["TimeLimit.truncated"] for step in recorder.steps for info in step["infos"] if "episode" in info]
    assert {True, False} == set(truncated)


@pytest.mark.parametrize("name", ["dict", "image", "gsde", "gsde_squashed", "discrete_observation", "separate_extractors"])
def test_general_policies_act_as_in_sb3s_loop(name):
    """Where the actor is not the lean one, the same seed gives the same actions, so that nothing need be replayed."""
    models = [make_model(name, sde_sample_freq=-1) if "gsde" in name else make_model(name) for _ in range(2)]
    filled = []
    for model, loop in zip(models, [TRPO.collect_rollouts, OnPolicyAlgorithm.collect_rollouts], strict=True):
        th.manual_seed(5)
        filled.append(collect(model, loop, 1, Recorder())[0])
    assert_same_contents(*filled)


def test_truncated_rewards_hold_the_value_of_the_last_observation():
    """By hand, of a rollout of one step."""
    env = make_env(VECTOR, BOX, limit=1)
    model = TRPO("MlpPolicy", env, n_steps=1, seed=1, gamma=0.5, device="cpu", policy_kwargs={"net_arch": []})
    recorder = Recorder()
    collect(model, TRPO.collect_rollouts, 1, recorder)
    (step,) = recorder.steps
    truncated = np.array([info["TimeLimit.truncated"] for info in step["infos"]])
    assert truncated.any()
    last = np.stack([info["terminal_observation"] for info in step["infos"]]).astype(np.float32)
    values = last @ model.policy.value_net.weight.detach().numpy().T.squeeze() + model.policy.value_net.bias.item()
    expected = recorder.copies[0]["rewards"] + 0.5 * values * truncated
    np.testing.assert_allclose(model.rollout_buffer.rewards[0], expected, atol=1e-6)
    np.testing.assert_allclose(model.rollout_buffer.returns[0], expected, atol=1e-6)


def test_values_are_scaled_wherever_they_come_from():
    """Values, bootstraps of truncated episodes and of the end: as SB3 has them of a critic that is so many times as large."""
    scaled, large = make_model("scaled_values"), make_model("box")
    scale = 7.0
    scaled.return_moments.var = np.float64(scale**2 - 1e-8)
    with th.no_grad():
        large.policy.value_net.weight.mul_(scale)
        large.policy.value_net.bias.mul_(scale)
    recorder, expected_recorder = Recorder(), Recorder()
    th.manual_seed(3)
    (filled,) = collect(scaled, TRPO.collect_rollouts, 1, recorder)
    th.manual_seed(3)
    (expected,) = collect(large, TRPO.collect_rollouts, 1, expected_recorder)
    assert any(info["TimeLimit.truncated"] for step in recorder.steps for info in step["infos"])
    for name, array in expected.items():
        np.testing.assert_allclose(filled[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(recorder.ends[0]["values"], expected_recorder.ends[0]["values"], rtol=1e-4)


def test_an_episode_that_ends_in_the_step_of_its_limit_is_not_bootstrapped():
    infos = [
        {"terminal_observation": np.ones(2), "TimeLimit.truncated": False},
        {"terminal_observation": np.ones(2), "TimeLimit.truncated": True},
        {"terminal_observation": np.ones(2)},
        {"TimeLimit.truncated": True},
        {"terminal_observation": np.ones(2), "TimeLimit.truncated": True},
    ]
    found = find_truncations(4, np.array([True, True, True, True, False]), infos)
    assert [(truncation.step, truncation.env) for truncation in found] == [(4, 1)]
    np.testing.assert_array_equal(found[0].observation, infos[1]["terminal_observation"])
    assert found[0].observation is not infos[1]["terminal_observation"]  # the environment may write into its own


class TestCallbacks:
    def test_events_come_in_order(self):
        model, recorder = make_model("box"), Recorder()
        model.learn(2 * N_STEPS * N_ENVS, callback=recorder)
        assert recorder.events == 2 * ["start", *N_STEPS * ["step"], "end"]
        assert [step["n_steps"] for step in recorder.steps] == 2 * list(range(N_STEPS))

    def test_what_a_callback_keeps_is_not_disturbed(self):
        model, recorder = make_model("normalize"), Recorder()
        collect(model, TRPO.collect_rollouts, 2, recorder)
        for step, expected in zip(recorder.steps, recorder.copies, strict=True):
            kept = {**step, "infos": [{**info, "episode": None} for info in step["infos"]]}
            assert_same(kept, expected)

    @pytest.mark.parametrize("stop_at", [1, 5, N_STEPS + 2])
    def test_false_stops(self, stop_at):
        def learn(loop):
            model, recorder = make_model("box"), Recorder(stop_at)
            model.collect_rollouts = loop.__get__(model)
            model.learn(10**4, callback=recorder)
            return model, recorder

        model, recorder = learn(TRPO.collect_rollouts)
        usual, expected = learn(OnPolicyAlgorithm.collect_rollouts)
        assert len(recorder.steps) == stop_at
        assert recorder.events == expected.events
        assert model.num_timesteps == usual.num_timesteps == stop_at * N_ENVS
        assert model._n_updates == usual._n_updates

    def test_rewards_may_be_changed_in_place(self):
        """Intrinsic rewards are added this way."""

        class Bonus(Recorder):
            def _on_step(self):
                self.locals["rewards"] += 100.0
                return True

        model = make_model("box")
        collect(model, TRPO.collect_rollouts, 1, Bonus())
        assert (model.rollout_buffer.rewards > 90.0).all()

    def test_values_are_there_at_the_end(self):
        model, recorder = make_model("box"), Recorder()
        collect(model, TRPO.collect_rollouts, 1, recorder)
        with th.no_grad():
            expected = model.policy.predict_values(th.as_tensor(model._last_obs)).flatten()
        np.testing.assert_allclose(recorder.ends[0]["values"].flatten(), expected, atol=1e-6)
        np.testing.assert_array_equal(recorder.ends[0]["new_obs"], model._last_obs)

    def test_the_policy_may_be_changed_at_the_start_of_a_rollout(self):
        """A schedule of the exploration does."""

        class Anneal(Recorder):
            def _on_rollout_start(self):
                with th.no_grad():
                    self.model.policy.log_std.fill_(-4.0)

        model = make_model("box")
        collect(model, TRPO.collect_rollouts, 1, Anneal())
        assert model.rollout_buffer.log_probs.mean() > 3.0  # 2 * (4 - ln(2π) / 2 - 1/2) = 5.2 in the mean

    def test_checkpoints_of_the_normalisation_hold_nothing_of_ours(self, tmp_path):
        model = make_model("normalize")
        model.learn(N_STEPS, callback=CheckpointCallback(3, str(tmp_path), save_vecnormalize=True))
        paths = list(tmp_path.glob("*vecnormalize*"))
        assert paths
        assert not any(b"sb3_trpo" in path.read_bytes() for path in paths)


class ShoutingPolicy(ActorCriticPolicy):
    """A user's own way of acting: every action doubled."""

    def forward(self, obs, deterministic=False):
        actions, values, _ = super().forward(obs, deterministic)
        return 2 * actions, values, th.full((len(obs),), -7.0)


class OwnNetworks(ActorCriticPolicy):
    """Other networks, but SB3's way of acting."""

    def _build_mlp_extractor(self):
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(nn.LayerNorm(self.mlp_extractor.latent_dim_pi))


class OwnBuffer(RolloutBuffer):
    """A buffer that does something at every step."""

    def add(self, obs, action, reward, episode_start, value, log_prob):
        super().add(obs, action, 10.0 * reward, episode_start, value, log_prob)


class TestWhoseLoop:
    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        sb3s = OnPolicyAlgorithm.collect_rollouts

        def spy(*args):
            calls.append(1)
            return sb3s(*args)

        monkeypatch.setattr(OnPolicyAlgorithm, "collect_rollouts", spy)
        return calls

    def make(self, policy="MlpPolicy", **arguments):
        env = make_env(VECTOR, BOX, limit=1000)
        return TRPO(policy, env, n_steps=8, seed=0, device="cpu", **arguments)

    def test_the_usual_takes_ours(self, calls):
        self.make().learn(24)
        assert not calls

    def test_a_policys_own_forward_takes_sb3s(self, calls):
        model = self.make(ShoutingPolicy)
        model.learn(24)
        assert calls == [1]
        assert (model.rollout_buffer.log_probs == -7.0).all()

    def test_a_buffer_of_ones_own_takes_sb3s(self, calls):
        model = self.make(rollout_buffer_class=OwnBuffer)
        recorder = Recorder()
        collect(model, TRPO.collect_rollouts, 1, recorder)
        assert calls == [1]
        expected = [10.0 * step["rewards"] for step in recorder.copies]
        np.testing.assert_allclose(model.rollout_buffer.rewards, expected, rtol=1e-5)

    def test_a_policys_own_networks_take_ours(self, calls):
        model = self.make(OwnNetworks)
        model.policy.set_training_mode(False)
        assert supports_deferred_evaluation(model.policy)
        model.learn(24)
        assert not calls


class Log(KVWriter):
    """Keeps the log but for times."""

    def __init__(self):
        self.lines: list[dict[str, Any]] = []

    def write(self, key_values, key_excluded, step=0):
        self.lines.append({key: value for key, value in key_values.items() if not key.startswith("time/")} | {"step": step})

    def close(self):
        pass


class TestReproducibility:
    def learn(self, env_id, seed, normalize):
        env: VecEnv = make_vec_env(env_id, 2)
        if normalize:
            env = VecNormalize(env)
        model = TRPO("MlpPolicy", env, n_steps=128, seed=seed, device="cpu")
        log = Log()
        model.set_logger(Logger(None, [log]))
        model.learn(3 * 256)
        parameters = {name: tensor.numpy() for name, tensor in model.policy.state_dict().items()}
        return {"parameters": parameters, "buffer": contents(model.rollout_buffer), "log": log.lines}

    @pytest.mark.parametrize(("env_id", "normalize"), [("CartPole-v1", False), ("Pendulum-v1", True), v5("HalfCheetah", True)])
    def test_the_seed_fixes_the_run_bit_for_bit(self, env_id, normalize):
        if "Cheetah" in env_id:
            pytest.importorskip("mujoco")
        first, again, other = (self.learn(env_id, seed, normalize) for seed in (0, 0, 1))
        assert len(first["log"]) == 3
        assert_same(first, again)
        for kind in ("parameters", "buffer", "log"):
            with pytest.raises(AssertionError):
                assert_same(first[kind], other[kind])
