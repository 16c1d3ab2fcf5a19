"""On a CUDA card: updates are those of the CPU, and training, saving, loading and resuming work."""

import copy
from typing import Any, NamedTuple

import gymnasium as gym
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from support import rows
from support.arguments import effective
from support.rows import BOX, DICT, VECTOR, Wander, image
from torch import nn

from sb3_trpo import NPG, TRPO, MaskableTRPO, RecurrentTRPO
from sb3_trpo.optim.parameters import flatten

pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA card")

CARD = "cuda"
N_ENVS, N_STEPS, TARGET_KL = 4, 16, 0.01
N_STATES = N_ENVS * N_STEPS
DISCRETE, MULTI_DISCRETE = spaces.Discrete(4), spaces.MultiDiscrete([2, 3])


class OwnLSTM(nn.LSTM):
    """A user's class, which runs without cuDNN where it is differentiated twice."""


def with_own_lstms(policy: Any) -> None:
    for name in ("lstm_actor", "lstm_critic"):
        getattr(policy, name).__class__ = OwnLSTM


class Setup(NamedTuple):
    """
    A model and its environment.

    :param observation: observation space
    :param action: action space
    :param algorithm: class
    :param policy: class of the policy, or its alias
    :param arguments: arguments of the algorithm
    :param policy_kwargs: arguments of the policy
    :param prepare: what is done to the policy
    :param draws: whether the update draws random numbers, which differ between devices
    """

    observation: spaces.Space = VECTOR
    action: spaces.Space = BOX
    algorithm: type[TRPO] = TRPO
    policy: Any = "MlpPolicy"
    arguments: dict[str, Any] = {}  # noqa: RUF012
    policy_kwargs: dict[str, Any] = {}  # noqa: RUF012
    prepare: Any = None
    draws: bool = False


def recurrent(**changes: Any) -> Setup:
    return Setup(**{"algorithm": RecurrentTRPO, "policy": "MlpLstmPolicy", **changes})


CNN: dict[str, Any] = {"policy": "CnnPolicy", "action": DISCRETE}
SETUPS: dict[str, Setup] = {
    "box": Setup(),
    "discrete": Setup(action=DISCRETE),
    "multi_discrete": Setup(action=MULTI_DISCRETE),
    "multi_binary": Setup(action=spaces.MultiBinary(3)),
    "dict": Setup(DICT, policy="MultiInputPolicy"),
    "gsde": Setup(arguments={"use_sde": True}),
    "gsde_squashed": Setup(arguments={"use_sde": True}, policy_kwargs={"squash_output": True}),
    "tanh": Setup(arguments={"action_bound": "tanh"}),
    "relu": Setup(policy_kwargs={"activation_fn": nn.ReLU, "net_arch": [256, 256]}),
    "own_family": Setup(policy=rows.OwnFamily),
    "own_features": Setup(policy=rows.OwnFeatures),
    "no_preconditioner": Setup(arguments={"cg_preconditioner": None, "cg_max_steps": 20}),
    "several_steps": Setup(arguments={"n_policy_updates": 3, "n_critic_steps": 2}),
    "chunks": Setup(arguments={"max_batch_size": 7}),
    "return_scaling": Setup(arguments={"return_scaling": True}),
    "state_kl": Setup(arguments={"max_state_kl": 0.05}),
    "npg": Setup(algorithm=NPG),
    "minibatch_critic": Setup(arguments={"critic_method": "minibatch", "n_critic_updates": 2, "batch_size": 16}, draws=True),
    "policy_minibatches": Setup(arguments={"policy_batch_size": 16}, draws=True),
    "subsampled": Setup(arguments={"sub_sampling_factor": 2}, draws=True),
    "image": Setup(image(1), **CNN),
    "image_separate": Setup(image(3), **CNN, policy_kwargs={"share_features_extractor": False}),
    "image_own_layers": Setup(image(1), **CNN, policy_kwargs={"features_extractor_class": rows.SmallCNN}),
    "image_pooled": Setup(image(1), **CNN, policy_kwargs={"features_extractor_class": rows.PooledCNN}),
    "image_layer_norm": Setup(image(1), **CNN, policy_kwargs={"features_extractor_class": rows.NormedCNN}),
    "image_residual": Setup(image(1), **CNN, policy_kwargs={"features_extractor_class": rows.ResidualCNN}),
    "maskable": Setup(action=DISCRETE, algorithm=MaskableTRPO),
    "maskable_multi_discrete": Setup(action=MULTI_DISCRETE, algorithm=MaskableTRPO),
    "recurrent": recurrent(),
    "recurrent_discrete": recurrent(action=DISCRETE, policy_kwargs={"n_lstm_layers": 2}),
    "recurrent_shared": recurrent(policy_kwargs={"shared_lstm": True, "enable_critic_lstm": False}),
    "recurrent_gsde": recurrent(arguments={"use_sde": True}),
    "recurrent_image": recurrent(observation=image(1), action=DISCRETE, policy="CnnLstmPolicy"),
    "recurrent_own_lstm": recurrent(prepare=with_own_lstms),
}


def make_env(setup: Setup) -> VecEnv:
    def make() -> gym.Env:
        env = Wander(copy.deepcopy(setup.observation), setup.action, one_array=False, nested=False, scale=1.0)
        return Monitor(gym.wrappers.TimeLimit(env, 9))

    env: VecEnv = DummyVecEnv([make] * N_ENVS)
    return VecNormalize(env) if setup.observation is VECTOR else env


def make_model(setup: Setup, device: str) -> Any:
    arguments = {"n_steps": N_STEPS, "target_kl": TARGET_KL, **setup.arguments}
    small = {"lstm_hidden_size": 8} if setup.algorithm is RecurrentTRPO else {}
    model = setup.algorithm(
        setup.policy,
        make_env(setup),
        seed=0,
        device=device,
        policy_kwargs={**small, **setup.policy_kwargs},
        **effective(arguments, setup.algorithm),
    )
    if setup.prepare is not None:
        setup.prepare(model.policy)
    return model


@pytest.fixture(params=SETUPS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return SETUPS[request.param]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds the inputs of convolutions to ten bits by default."""
    monkeypatch.setattr(th.backends.cudnn, "allow_tf32", False)


class Stop(BaseCallback):
    """Collects rollouts, and updates nothing."""

    def _on_step(self) -> bool:
        return True


def collect(model: Any) -> None:
    _, callback = model._setup_learn(10**6, Stop())
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


def copy_buffer(source: Any, target: Any) -> None:
    for name, value in vars(source).items():
        if name != "device":
            setattr(target, name, copy.deepcopy(value))


def test_an_update_is_that_of_the_cpu(setup: Setup) -> None:
    on_cpu, on_card = make_model(setup, "cpu"), make_model(setup, CARD)
    on_card.policy.load_state_dict(on_cpu.policy.state_dict())
    collect(on_cpu)
    collect(on_card)
    copy_buffer(on_cpu.rollout_buffer, on_card.rollout_buffer)
    before = flatten(list(on_cpu.policy.parameters())).clone()
    for model in (on_cpu, on_card):
        th.manual_seed(1)
        model.train()
    after, other = (flatten(list(model.policy.parameters())).cpu() for model in (on_cpu, on_card))
    assert th.isfinite(other).all()
    assert (after - before).norm() > 0.0
    if setup.draws:
        assert 0.0 < on_card.last_update.kl_divergence_loss.last <= TARGET_KL
        return
    assert (other - after).norm() <= 0.01 * (after - before).norm()
    assert on_card.last_update.kl_divergence_loss.last == pytest.approx(on_cpu.last_update.kl_divergence_loss.last, rel=0.01)


def test_a_rollout_is_of_the_policy(setup: Setup) -> None:
    model = make_model(setup, CARD)
    collect(model)
    rollout = model.adapter.read()
    assert rollout.actions.device.type == CARD
    if setup.algorithm is RecurrentTRPO or setup.arguments.get("use_sde"):
        return
    with th.no_grad():
        log_probs = model.adapter.distribution(rollout.inputs).log_prob(rollout.actions).cpu().numpy()
    assert log_probs == pytest.approx(model.rollout_buffer.log_probs.reshape(-1), rel=1e-3, abs=1e-3)


@pytest.mark.filterwarnings("ignore:the model was trained with VecNormalize")
def test_training_saving_and_loading(setup: Setup, tmp_path: Any) -> None:
    model = make_model(setup, CARD)
    model.learn(3 * N_STATES)
    assert all(parameter.device.type == CARD for parameter in model.policy.parameters())
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    if setup.prepare is not None:
        return
    model.save(tmp_path / "model")
    observations = model.env.reset()
    expected, _ = model.predict(observations, deterministic=True)
    for device in (CARD, "cpu"):
        loaded = setup.algorithm.load(tmp_path / "model", device=device, trust=True)
        assert loaded.policy.device.type == device
        actions, _ = loaded.predict(observations, deterministic=True)
        assert actions == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["box", "discrete", "gsde", "maskable", "recurrent", "minibatch_critic"])
def test_resuming_is_exact(name: str, tmp_path: Any) -> None:
    setup = SETUPS[name]
    whole = make_model(setup, CARD)
    whole.learn(2 * N_STATES)
    whole.save_checkpoint(tmp_path / "checkpoint.zip")
    whole.learn(2 * N_STATES, reset_num_timesteps=False)
    resumed = setup.algorithm.resume(tmp_path / "checkpoint.zip", make_env(setup), device=CARD)
    resumed.learn(2 * N_STATES, reset_num_timesteps=False)
    assert th.equal(flatten(list(resumed.policy.parameters())), flatten(list(whole.policy.parameters())))
