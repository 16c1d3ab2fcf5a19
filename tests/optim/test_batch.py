from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_trpo.optim.batch import RolloutBatch, map_inputs, normalize_advantages
from sb3_trpo.rollouts.buffers import read_rollout

N_STEPS, N_ENVS = 3, 2
N_STATES = N_STEPS * N_ENVS
VECTOR = spaces.Box(-np.inf, np.inf, (2,))


def sample_of_each_env(space):
    if isinstance(space, spaces.Dict):
        return {key: sample_of_each_env(subspace) for key, subspace in space.items()}
    return np.stack([space.sample() for _ in range(N_ENVS)])


def filled_buffer(observation_space, action_space, buffer_class=None):
    """A full buffer; its advantages are the ranks of the states in time, its returns ten times that."""
    if buffer_class is None:
        buffer_class = DictRolloutBuffer if isinstance(observation_space, spaces.Dict) else RolloutBuffer
    buffer = buffer_class(N_STEPS, observation_space, action_space, device="cpu", n_envs=N_ENVS)
    for space in (observation_space, action_space):
        space.seed(0)
    for _ in range(N_STEPS):
        actions = np.stack([action_space.sample() for _ in range(N_ENVS)])
        rewards = episode_starts = np.zeros(N_ENVS)
        values = log_probs = th.zeros(N_ENVS)
        buffer.add(sample_of_each_env(observation_space), actions, rewards, episode_starts, values, log_probs)
    buffer.advantages[:] = np.arange(N_STATES).reshape(N_STEPS, N_ENVS)
    buffer.returns[:] = 10.0 * buffer.advantages
    return buffer


def in_time_order(rollout):
    """The rollout's tensors, sorted by the advantages that `filled_buffer` numbers the states with."""
    order = rollout.advantages.argsort()
    return map_inputs(lambda tensor: tensor[order], rollout.inputs), rollout.actions[order], rollout.returns[order]


OBSERVATIONS = {
    "box": VECTOR,
    "float64": spaces.Box(-1.0, 1.0, (2,), np.float64),
    "image": spaces.Box(0, 255, (1, 4, 4), np.uint8),
    "uint16": spaces.Box(0, 60_000, (2,), np.uint16),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(4),
    "dict": spaces.Dict({"position": VECTOR, "gear": spaces.Discrete(3)}),
}
ACTIONS = {
    "box": (spaces.Box(-1.0, 1.0, (2,)), (N_STATES, 2), th.float32),
    "box_matrix": (spaces.Box(-1.0, 1.0, (2, 3)), (N_STATES, 6), th.float32),
    "discrete": (spaces.Discrete(4), (N_STATES,), th.int64),
    "multi_discrete": (spaces.MultiDiscrete([2, 3, 4]), (N_STATES, 3), th.float32),
    "multi_binary": (spaces.MultiBinary(3), (N_STATES, 3), th.float32),
}


@pytest.mark.parametrize("space", OBSERVATIONS.values(), ids=OBSERVATIONS)
@pytest.mark.parametrize("read_before", [False, True], ids=["fresh", "after_get"])
def test_observations_are_the_buffers(space, read_before):
    action_space = spaces.Discrete(4)
    buffer = filled_buffer(space, action_space)
    # Before `get` reorders them.
    expected = map_inputs(lambda array: array.copy().reshape(N_STATES, *array.shape[2:]), buffer.observations)
    if read_before:
        next(buffer.get(batch_size=2))
    inputs, _, _ = in_time_order(read_rollout(buffer, action_space))
    pairs = [(inputs[key], expected[key]) for key in expected] if isinstance(expected, dict) else [(inputs, expected)]
    for actual, array in pairs:
        np.testing.assert_array_equal(actual.numpy(), array)


@pytest.mark.parametrize(("space", "shape", "dtype"), ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize("read_before", [False, True], ids=["fresh", "after_get"])
def test_actions_belong_to_their_states(space, shape, dtype, read_before):
    buffer = filled_buffer(VECTOR, space)
    expected = buffer.actions.copy().reshape(shape)
    if read_before:
        next(buffer.get(batch_size=2))
    rollout = read_rollout(buffer, space)
    _, actions, returns = in_time_order(rollout)
    assert (actions.shape, actions.dtype) == (shape, dtype)
    np.testing.assert_array_equal(actions.numpy(), expected)
    assert returns.tolist() == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    assert rollout.weights.tolist() == pytest.approx([1 / N_STATES] * N_STATES)
    assert rollout.n_states == N_STATES


def test_policy_accepts_what_was_read(case):
    policy = case.policy
    rollout = read_rollout(filled_buffer(policy.observation_space, policy.action_space), policy.action_space)
    log_prob = policy.get_distribution(rollout.inputs).log_prob(rollout.actions)
    assert log_prob.shape == (N_STATES,)
    assert policy.predict_values(rollout.inputs).shape == (N_STATES, 1)


def test_reading_neither_shuffles_nor_copies_nor_draws_random_numbers():
    buffer = filled_buffer(VECTOR, spaces.Discrete(4))
    random_state = np.random.get_state()[1].copy()  # noqa: NPY002 (the generator that SB3's buffers draw from)
    rollout = read_rollout(buffer, spaces.Discrete(4))
    assert rollout.advantages.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert np.shares_memory(rollout.inputs.numpy(), buffer.observations)
    assert not buffer.generator_ready
    np.testing.assert_array_equal(np.random.get_state()[1], random_state)  # noqa: NPY002


class ScaledBuffer(RolloutBuffer):
    """A user's own buffer: samples are not what the arrays hold."""

    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(observations=samples.observations + 100.0, returns=samples.returns / 10.0)


class ScaledDictBuffer(DictRolloutBuffer):
    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        observations = {key: value + 100.0 for key, value in samples.observations.items()}
        return samples._replace(observations=observations, returns=samples.returns / 10.0)


@pytest.mark.parametrize(
    ("observation_space", "buffer_class"),
    [(VECTOR, ScaledBuffer), (OBSERVATIONS["dict"], ScaledDictBuffer)],
    ids=["box", "dict"],
)
@pytest.mark.parametrize(("space", "shape", "dtype"), ACTIONS.values(), ids=ACTIONS)
def test_users_own_buffer_is_asked_for_its_samples(observation_space, buffer_class, space, shape, dtype):
    buffer = filled_buffer(observation_space, space, buffer_class)
    plain = read_rollout(filled_buffer(observation_space, space), space)
    own = read_rollout(buffer, space)
    own_inputs, own_actions, own_returns = in_time_order(own)
    plain_inputs, plain_actions, _ = in_time_order(plain)
    for key in plain_inputs if isinstance(plain_inputs, dict) else [...]:
        th.testing.assert_close(own_inputs[key], plain_inputs[key] + 100.0, check_dtype=False)
    assert (own.actions.shape, own.actions.dtype) == (shape, dtype)
    th.testing.assert_close(own_actions, plain_actions)
    assert own_returns.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert own.weights.tolist() == pytest.approx([1 / N_STATES] * N_STATES)


def make_rollout(advantages, returns=None, weights=None):
    advantages = th.as_tensor(advantages)
    n_states = len(advantages)
    states = th.arange(n_states)
    returns = th.ones(n_states) if returns is None else th.as_tensor(returns)
    weights = th.full((n_states,), 1.0 / n_states) if weights is None else th.as_tensor(weights)
    return RolloutBatch({"index": states, "double": 2 * states}, 3 * states, advantages, returns, weights)


def test_selection_takes_the_same_states_everywhere():
    rollout = make_rollout([0.0, 1.0, 2.0, 3.0, 4.0], weights=[0.1, 0.2, 0.3, 0.2, 0.2]).select(slice(1, 4, 2))
    assert rollout.inputs["index"].tolist() == [1, 3]
    assert rollout.inputs["double"].tolist() == [2, 6]
    assert rollout.actions.tolist() == [3, 9]
    assert rollout.advantages.tolist() == [1.0, 3.0]
    assert rollout.weights.tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(("max_size", "sizes"), [(None, [7]), (7, [7]), (100, [7]), (3, [3, 3, 1]), (1, [1] * 7)])
def test_chunks_cover_the_rollout_in_order(max_size, sizes):
    chunks = make_rollout(th.arange(7.0)).chunks(max_size)
    assert [chunk.n_states for chunk in chunks] == sizes
    assert th.cat([chunk.inputs["index"] for chunk in chunks]).tolist() == list(range(7))
    assert float(sum(chunk.weights.sum() for chunk in chunks)) == pytest.approx(1.0)


@pytest.mark.parametrize(("factor", "n_kept"), [(1, 100), (2, 50), (3, 34), (100, 1)])
def test_thinning_keeps_a_share_of_the_states_with_weights_that_add_up(factor, n_kept):
    weights = th.full((100,), 0.01, dtype=th.float64)
    random_state = th.get_rng_state()
    rollout = make_rollout(th.arange(100.0), weights=weights).subsample(factor)
    kept = rollout.inputs["index"].tolist()
    assert len(set(kept)) == n_kept
    assert kept == sorted(kept)
    assert rollout.actions.tolist() == [3 * index for index in kept]
    assert rollout.advantages.tolist() == kept
    assert rollout.weights.tolist() == pytest.approx([1 / n_kept] * n_kept, abs=1e-12)
    assert th.equal(th.get_rng_state(), random_state)


def test_thinning_is_no_regular_stride():
    """With 4 environments, each 4th state would be of the same one."""
    kept = make_rollout(th.arange(100.0)).subsample(4).inputs["index"]
    assert set((kept % 4).tolist()) == {0, 1, 2, 3}


def test_thinning_keeps_the_proportions_of_weights():
    weights = th.arange(1.0, 11.0, dtype=th.float64) / 55
    rollout = make_rollout(th.arange(10.0), weights=weights).subsample(3)
    expected = weights[rollout.inputs["index"]]
    assert rollout.weights.tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=1e-12)


@pytest.mark.parametrize("max_size", [None, 3])
def test_encoding_replaces_the_observations_and_nothing_else(max_size):
    rollout = make_rollout(th.arange(7.0))
    scale = th.ones(1, requires_grad=True)
    encoded = rollout.encoded(lambda inputs: scale * (inputs["index"] + inputs["double"]), max_size)
    assert encoded.inputs.tolist() == [0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 18.0]
    assert not encoded.inputs.requires_grad
    assert replace(encoded, inputs=rollout.inputs) == rollout


def test_normalized_advantages_have_mean_0_and_standard_deviation_1():
    advantages = 5.0 + 3.0 * th.randn(50, generator=th.Generator().manual_seed(0))
    rollout = make_rollout(advantages)
    normalized = normalize_advantages(rollout)
    assert float(normalized.advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(normalized.advantages.std()) == pytest.approx(1.0, abs=1e-6)
    expected = (advantages - advantages.mean()) / (advantages.std() + 1e-8)  # as in Stable-Baselines3
    th.testing.assert_close(normalized.advantages, expected)
    assert rollout.advantages is advantages
    assert replace(normalized, advantages=advantages) == rollout


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
@pytest.mark.parametrize("n_states", [1, 2, 7])
def test_constant_advantages_become_exactly_zero(value, n_states):
    rollout = make_rollout(th.full((n_states,), value), returns=th.full((n_states,), 3.0))
    assert normalize_advantages(rollout).advantages.tolist() == [0.0] * n_states


def test_spread_of_rounding_errors_is_no_information():
    returns = th.full((4,), 1e4)
    rounding = th.tensor([0.0, 1.0, -1.0, 0.0]) * 1e-4  # float32 resolves 1e4 to 1e-3
    assert normalize_advantages(make_rollout(rounding, returns)).advantages.tolist() == [0.0] * 4


def test_small_but_real_spread_is_scaled_up():
    advantages = th.tensor([0.0, 1.0, -1.0, 0.0]) * 1e-4
    assert float(normalize_advantages(make_rollout(advantages)).advantages.std()) == pytest.approx(1.0, rel=1e-3)


def test_sample_has_weights_that_stand_for_the_whole():
    weights = th.arange(1.0, 6.0, dtype=th.float64) / 15
    rollout = make_rollout([0.0, 1.0, 2.0, 3.0, 4.0], weights=weights)
    sample = rollout.sample(th.tensor([4, 1]))
    assert sample.inputs["double"].tolist() == [8, 2]
    assert sample.actions.tolist() == [12, 3]
    assert sample.advantages.tolist() == [4.0, 1.0]
    assert sample.weights.tolist() == pytest.approx([5 / 7, 2 / 7], abs=1e-15)
    assert rollout.weights is weights


def test_ratios_go_with_their_states():
    rollout = make_rollout(th.arange(5.0))
    assert rollout.ratios is None
    assert rollout.select(slice(2)).ratios is None
    ratios = th.arange(5.0) + 0.5
    seen = replace(rollout, ratios=ratios)
    assert seen.select(slice(1, 4, 2)).ratios.tolist() == [1.5, 3.5]
    assert seen.sample(th.tensor([3, 0])).ratios.tolist() == [3.5, 0.5]
    assert th.cat([chunk.ratios for chunk in seen.chunks(2)]).tolist() == ratios.tolist()
    assert seen.subsample(2).ratios.tolist() == (seen.subsample(2).inputs["index"] + 0.5).tolist()
    assert normalize_advantages(seen).ratios is ratios


@pytest.mark.parametrize("size", [4, np.int64(4)])
def test_minibatches_go_through_all_states_once(size: int) -> None:
    rollout = make_rollout(th.randn(10))
    for equal, sizes in ((False, [4, 4, 2]), (True, [4, 3, 3])):
        pieces = rollout.minibatches(size, equal)
        assert [len(piece) for piece in pieces] == sizes
        assert th.cat(list(pieces)).sort().values.tolist() == list(range(10))


@pytest.mark.parametrize("size", [None, 10, 11])
def test_random_sample_that_is_no_smaller_is_the_batch_and_draws_nothing(size: int | None) -> None:
    rollout = make_rollout(th.arange(10.0))
    state = th.get_rng_state()
    assert rollout.random_sample(size) is rollout
    assert th.equal(th.get_rng_state(), state)


def test_random_sample_is_drawn_by_torchs_generator_and_stands_for_the_whole() -> None:
    rollout = make_rollout(th.arange(100.0))
    samples = []
    for seed in (0, 0, 1):
        th.manual_seed(seed)
        samples.append(rollout.random_sample(25))
    kept = [sample.inputs["index"].tolist() for sample in samples]
    assert kept[0] == kept[1] != kept[2]
    assert len(set(kept[0])) == 25
    assert float(samples[0].weights.sum()) == pytest.approx(float(rollout.weights.sum()))


@pytest.mark.parametrize(("size", "n_states"), [(1, 4), (9, 8)])
def test_random_sample_takes_whole_sequences(size: int, n_states: int) -> None:
    rollout = replace(make_rollout(th.arange(20.0)), sequence_length=4)
    sample = rollout.random_sample(size)
    assert sample.n_states == n_states
    first = sample.advantages.view(-1, 4)[:, :1]
    assert th.equal(sample.advantages.view(-1, 4), first + th.arange(4.0, dtype=first.dtype))


def test_random_sample_of_a_process_is_its_share() -> None:
    ranks = SimpleNamespace(rank=1, size=3, n_envs=[1, 2, 5])
    rollout = replace(make_rollout(th.arange(40.0)), ranks=ranks)
    assert rollout.random_sample(16).n_states == 4
    assert rollout.random_sample(1).n_states == 1
