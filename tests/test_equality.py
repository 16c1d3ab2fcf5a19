"""Fast paths equal the general ones, or are not taken: every row runs through both.

The rollout: SB3's own loop, given the same actions. The sampler: the distribution that is trained. The update: plain
conjugate gradients with autograd's Fisher products, against a dense Fisher matrix for the small ones. A row is one line.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from support import rows
from support.equality import (
    SB3S_LOOP,
    Row,
    Run,
    as_functions,
    assert_equal,
    contents,
    deviations,
    kl_divergence,
    torch_distributions,
)
from support.rows import DICT, DOUBLE, HALF, READS, Changer, image, nested
from torch import nn

from sb3_trpo import TRPO, MaskableTRPO, RecurrentTRPO

DISCRETE, MULTI_DISCRETE, MULTI_BINARY = spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)
CNN: dict[str, Any] = {"policy": "CnnPolicy", "n_steps": 12}
SMALL_CNN: dict[str, Any] = {"features_extractor_kwargs": {"features_dim": 8}}

ROWS: dict[str, Row] = {
    # ---- spaces, buffers and options
    "box": Row(),
    "box_matrix": Row(action=spaces.Box(-0.5, 0.5, (2, 2))),
    "box_float64": Row(DOUBLE, spaces.Box(-0.5, 0.5, (2,), np.float64)),
    "discrete": Row(action=DISCRETE),
    "multi_discrete": Row(action=MULTI_DISCRETE),
    "multi_binary": Row(action=MULTI_BINARY),
    "dict": Row(DICT),
    "discrete_observation": Row(spaces.Discrete(5), DISCRETE),
    "multi_binary_observation": Row(spaces.MultiBinary(4), DISCRETE),
    "image_discrete": Row(image(1), DISCRETE, arguments=CNN, policy_kwargs=SMALL_CNN),
    "image_box_3_channels": Row(image(3), arguments=CNN, policy_kwargs=SMALL_CNN),
    "image_box_4_channels": Row(image(4), arguments=CNN, policy_kwargs=SMALL_CNN),
    "image_separate_extractors": Row(
        image(3), DISCRETE, arguments=CNN, policy_kwargs={**SMALL_CNN, "share_features_extractor": False}
    ),
    "image_own_layers": Row(image(1), DISCRETE, extractor=rows.SmallCNN, arguments=CNN),
    "image_own_layers_pooled": Row(image(1), extractor=rows.PooledCNN, arguments=CNN),
    "image_layer_norm": Row(image(1), DISCRETE, extractor=rows.NormedCNN, arguments=CNN),
    "image_residual": Row(image(1), DISCRETE, extractor=rows.ResidualCNN, arguments=CNN),
    "image_hook": Row(image(1), DISCRETE, prepare=rows.hook_layer, extractor=rows.SmallCNN, arguments=CNN),
    "relu": Row(policy_kwargs={"activation_fn": nn.ReLU}),
    "elu_separate_extractors": Row(policy_kwargs={"activation_fn": nn.ELU, "share_features_extractor": False}),
    "no_hidden_layer": Row(policy_kwargs={"net_arch": []}),
    "gsde": Row(arguments={"use_sde": True, "sde_sample_freq": 4}),
    "gsde_squashed": Row(arguments={"use_sde": True}, policy_kwargs={"squash_output": True}),
    "action_clip": Row(arguments={"action_bound": "clip"}),
    "normalize": Row(normalize={}),
    "normalize_float16": Row(HALF, normalize={"norm_reward": False}),
    "normalize_rewards": Row(action=DISCRETE, normalize={"norm_obs": False, "clip_reward": 0.5}),
    "normalize_dict": Row(DICT, normalize={"norm_obs_keys": ["place"]}),
    "stacked_frames": Row(stack=2),
    "chunks": Row(arguments={"max_batch_size": 7}),
    "large_observations": Row(env={"scale": 1e6}),
    "maskable_discrete": Row(action=DISCRETE, algorithm=MaskableTRPO),
    "maskable_multi_discrete": Row(action=MULTI_DISCRETE, algorithm=MaskableTRPO, read="by_key"),
    "maskable_general": Row(action=DISCRETE, algorithm=MaskableTRPO, policy_kwargs={"activation_fn": nn.ELU}, read="by_key"),
    "recurrent": Row(algorithm=RecurrentTRPO, read="by_key"),
    "recurrent_discrete": Row(action=DISCRETE, algorithm=RecurrentTRPO),
    # ---- callbacks that read (B1)
    **{f"read_{name}": Row(read=name) for name in READS},
    "read_discrete": Row(action=DISCRETE, read="by_key"),
    "read_dict": Row(DICT, DISCRETE, read="by_key"),
    "read_image": Row(image(3), DISCRETE, read="by_key", arguments=CNN, policy_kwargs=SMALL_CNN),
    "read_normalized": Row(normalize={}, read="by_get"),
    "read_gsde": Row(arguments={"use_sde": True}, read="by_key"),
    "read_in_event_callback": Row(read="by_key", place=nested),
    "read_in_function": Row(read="by_key", place=as_functions),
    "read_own_networks": Row(arguments={"policy": rows.OwnNetworks}, read="by_key"),
    # ---- callbacks that change the policy in the middle of a rollout (B2)
    "change_std": Row(change=partial(Changer, rows.fill_std), read="by_key", stays=False),
    "change_std_data": Row(change=partial(Changer, rows.fill_std_data), stays=False),
    "change_std_pointed": Row(change=partial(Changer, rows.point_std_data), stays=False),
    "change_std_replaced": Row(change=partial(Changer, rows.replace_std), stays=False),
    "change_std_every_step": Row(change=partial(Changer, rows.anneal_std, every_step=True), read="by_key", stays=False),
    "change_std_in_last_step": Row(change=partial(Changer, rows.fill_std, at=40), stays=False),
    "change_std_normalized": Row(normalize={}, change=partial(Changer, rows.fill_std), stays=False),
    "change_std_gsde": Row(arguments={"use_sde": True}, change=partial(Changer, rows.fill_std), stays=False),
    "change_parameters": Row(change=partial(Changer, rows.load_parameters), read="by_get", stays=False),
    "change_by_optimizer": Row(change=partial(Changer, rows.step_optimizer), stays=False),
    "change_one_weight": Row(change=partial(Changer, rows.write_weight), stays=False),
    "change_by_numpy": Row(change=partial(Changer, rows.write_by_numpy), stays=False),
    "change_critic": Row(change=partial(Changer, rows.change_critic), read="by_key"),
    "change_discrete": Row(action=DISCRETE, change=partial(Changer, rows.load_parameters), read="by_key", stays=False),
    "change_dict": Row(DICT, DISCRETE, change=partial(Changer, rows.load_parameters), stays=False),
    "change_image": Row(
        image(1), change=partial(Changer, rows.load_parameters), arguments=CNN, policy_kwargs=SMALL_CNN, stays=False
    ),
    "change_masked": Row(
        action=DISCRETE, algorithm=MaskableTRPO, change=partial(Changer, rows.load_parameters), read="by_key", stays=False
    ),
    "change_recurrent": Row(algorithm=RecurrentTRPO, change=partial(Changer, rows.fill_std), read="by_key", stays=False),
    "change_network": Row(change=partial(Changer, rows.of_policy(rows.replace_by_module)), stays=False),
    "change_hook": Row(change=partial(Changer, rows.of_policy(rows.hook_layer)), read="by_key", stays=False),
    "change_patch": Row(change=partial(Changer, rows.of_policy(rows.patch_layer)), stays=False),
    # ---- hooks, patches, replaced networks (B3)
    "hook": Row(prepare=rows.hook_layer, read="by_key"),
    "hook_before": Row(prepare=rows.pre_hook_layer),
    "hook_action_net": Row(prepare=rows.hook_networks),
    "hook_critic": Row(prepare=rows.hook_critic),
    "hook_discrete": Row(action=DISCRETE, prepare=rows.hook_layer),
    "hook_maskable": Row(action=DISCRETE, algorithm=MaskableTRPO, prepare=rows.hook_layer),
    "pruned": Row(prepare=rows.prune_layer),
    "patched_layer": Row(prepare=rows.patch_layer),
    "patched_forward_actor": Row(prepare=rows.patch_forward_actor),
    "patched_activation": Row(prepare=rows.patch_activation),
    "patched_extractor": Row(prepare=rows.patch_extractor),
    "patched_extract_features": Row(prepare=rows.patch_extract_features),
    "patched_distribution": Row(prepare=rows.patch_log_prob),
    "identity": Row(prepare=rows.replace_by_identity),
    "other_network": Row(prepare=rows.replace_by_module),
    "other_flatten": Row(prepare=rows.replace_flatten),
    "other_pi_extractor": Row(prepare=rows.replace_pi_extractor),
    "compiled_layer": Row(prepare=rows.compile_layer),
    "compiled_network": Row(prepare=rows.compile_networks),
    "transposed_weight": Row(prepare=rows.share_data),
    "double_layer": Row(prepare=rows.one_layer_double),
    "own_forward": Row(arguments={"policy": rows.OwnForward}),
    "own_distribution": Row(arguments={"policy": rows.OwnDistribution}),
    "own_get_distribution": Row(arguments={"policy": rows.OwnGetDistribution}),
    "own_features": Row(arguments={"policy": rows.OwnFeatures}),
    "own_features_separate": Row(arguments={"policy": rows.OwnFeatures}, policy_kwargs={"share_features_extractor": False}),
    "own_family": Row(arguments={"policy": rows.OwnFamily}),
    "counting": Row(extractor=rows.Counting, stays=False, updates=False),
    "running_mean": Row(extractor=rows.RunningMean, stays=False, updates=False),
    # ---- environments (B4)
    "one_array": Row(env={"one_array": True}),
    "one_array_general": Row(env={"one_array": True}, policy_kwargs={"activation_fn": nn.ELU}),
    "one_array_dict": Row(DICT, DISCRETE, env={"one_array": True}),
    "one_array_normalized": Row(normalize={}, env={"one_array": True}),
    "nested_info": Row(env={"nested": True}),
    # ---- torch's defaults (B5)
    "default_float64": Row(default_dtype=th.float64, updates=False),
    "default_float64_discrete": Row(action=DISCRETE, default_dtype=th.float64, updates=False),
    "default_device": Row(default_device="meta", updates=False),
    "default_device_general": Row(default_device="meta", policy_kwargs={"activation_fn": nn.ELU}, updates=False),
    "default_device_read": Row(default_device="meta", action=MULTI_BINARY, read="by_key", updates=False),
    # ---- modules (A)
    "objects": Row(extractor=rows.Objects),
    "sequence_first": Row(extractor=rows.SequenceFirst),
    "transformer": Row(extractor=rows.Transformer),
    "on_constant": Row(extractor=rows.OnConstant),
    "by_keyword": Row(extractor=rows.ByKeyword),
    "under_no_grad": Row(extractor=rows.TwiceWithoutGradient),
    "spectral_norm": Row(extractor=rows.Parametrized),
    "weight_norm": Row(extractor=rows.WeightNorm),
    "old_weight_norm": Row(extractor=rows.OldWeightNorm),
    "orthogonal": Row(extractor=rows.Orthogonal),
    "scaled_linear": Row(extractor=rows.WithScaledLinear),
    "autocast": Row(extractor=rows.Autocast),
    "double_extractor": Row(extractor=rows.OneDoubleLayer),
    "batch_norm": Row(extractor=rows.WithBatchNorm),
    "dropout": Row(extractor=rows.WithDropout),
    "hardsigmoid": Row(policy_kwargs={"activation_fn": nn.Hardsigmoid}),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.mark.filterwarnings("ignore")
class TestEquality:
    def test_rollout_is_that_of_sb3s_loop(self, row):
        ours = Run(row, row.algorithm.collect_rollouts)
        sb3s = Run(row, SB3S_LOOP[row.algorithm], ours.watch.actions)
        tolerance = 1e-4 if "CnnPolicy" in row.arguments.values() else 1e-5  # SB3 hands convolutions transposed images
        for buffer, expected in zip(ours.buffers, sb3s.buffers, strict=True):
            if row.observation.dtype == np.float16:  # into which SB3 rounds what it normalizes, after it has acted on it
                assert_equal(buffer.pop("observations all"), expected.pop("observations all"), "observations", 1e-3)
            assert_equal(buffer, expected, "buffer", tolerance)
        for reader, other in zip(ours.readers, sb3s.readers, strict=True):
            assert len(reader.found) == 2 * ours.model.n_steps
            assert_equal(reader.found, other.found, "locals", tolerance)
        assert_equal(ours.watch.infos, sb3s.watch.infos, "infos")
        for seen, expected in zip(ours.watch.seen, sb3s.watch.seen, strict=True):
            assert_equal({name: seen[name] for name in expected}, expected, "locals")

    def test_actions_follow_the_policy_that_is_trained(self, row):
        if not row.stays:
            pytest.skip("the policy that acted is no more")
        run = Run(row, row.algorithm.collect_rollouts, n_rollouts=1)
        rollout, buffer = run.model.adapter.read(), run.model.rollout_buffer
        run.model.policy.set_training_mode(False)
        with th.no_grad():
            errors, spreads = deviations(run.model, rollout.inputs, rollout.actions)
            log_probs = run.model.adapter.distribution(rollout.inputs).log_prob(rollout.actions)
        real = rollout.weights > 0
        expected = spreads[real].square().sum(dim=0)
        errors, expected = errors[real][:, expected > 0], expected[expected > 0]  # but for the only one of the valid actions
        assert ((errors.sum(dim=0) / expected.sqrt()).abs() < 5.0).all()
        assert (errors.square().sum(dim=0) / expected - 1.0).abs().max() < 0.5
        if row.algorithm is not RecurrentTRPO:  # whose rollout is read sequence by sequence
            assert_equal(log_probs.flatten(), buffer.log_probs.reshape(-1), "log_probs", 1e-4)

    def test_update_is_that_of_the_dense_fisher_matrix(self, row):
        """Inside δ, along (F + λI)⁻¹ g, however F was multiplied and conjugate gradients preconditioned."""
        if not (row.updates and row.stays):
            pytest.skip("the policy changes with every call")
        exact = {"cg_max_steps": 200, "cg_residual_tol": 1e-6, "target_kl": 1e-3}
        model = Run(row, row.algorithm.collect_rollouts, n_rollouts=1, **exact).model
        model.policy.set_training_mode(False)
        rollout = model.adapter.read()
        actor, direction = dense_direction(model, rollout)
        before = th.cat([parameter.detach().flatten().clone() for parameter in actor]).double()
        with th.no_grad():
            old = torch_distributions(model, rollout.inputs)
        model.train()
        with th.no_grad():
            kl = kl_divergence(old, torch_distributions(model, rollout.inputs), rollout.weights)
        assert kl <= 1.01e-3
        step = th.cat([parameter.detach().flatten() for parameter in actor]).double() - before
        assert step.isfinite().all()
        assert step.norm() > 0.0
        if direction is not None:
            assert th.cosine_similarity(step, direction, dim=0) > 0.995


def test_networks_that_draw_random_numbers_are_called_as_in_sb3s_loop():
    """The same draws, so that nothing need be replayed."""
    row = Row(extractor=rows.Noisy, read="by_key")
    ours, sb3s = Run(row, TRPO.collect_rollouts), Run(row, SB3S_LOOP[TRPO])
    assert_equal(ours.buffers, sb3s.buffers, "buffer")
    assert_equal(ours.readers[0].found, sb3s.readers[0].found, "locals")


@pytest.mark.parametrize("n_channels", [1, 3, 4])
@pytest.mark.parametrize("algorithm", [TRPO, RecurrentTRPO])
def test_strides_of_the_observations_change_no_bit(n_channels, algorithm):
    """A resumed model begins with an array in C order, and SB3's transposed images are views in another."""
    policy = "CnnLstmPolicy" if algorithm is RecurrentTRPO else "CnnPolicy"
    row = Row(image(n_channels), algorithm=algorithm, arguments={"policy": policy, "n_steps": 12}, policy_kwargs=SMALL_CNN)
    buffers = []
    for copy in (False, True):
        run = Run(row, algorithm.collect_rollouts, n_rollouts=1)
        if copy:
            run.model._last_obs = np.array(run.model._last_obs, order="C")
        else:
            run.model._last_obs = np.asfortranarray(run.model._last_obs)
        th.manual_seed(6)
        _, callback = run.model._setup_learn(10**6, None, reset_num_timesteps=False)
        assert run.model.collect_rollouts(run.model.env, callback, run.model.rollout_buffer, 12)
        buffers.append(contents(run.model.rollout_buffer))
    for name, array in buffers[0].items():
        np.testing.assert_array_equal(array, buffers[1][name], err_msg=name)


def dense_direction(model: Any, rollout: Any) -> tuple[list[th.Tensor], th.Tensor | None]:
    """θ, and (F + λI)⁻¹ g by a dense F, the Hessian of the mean joint KL; None for more than a few hundred parameters."""
    distributions = torch_distributions(model, rollout.inputs)
    fixed = [detached(distribution) for distribution in distributions]
    log_prob = model.adapter.distribution(rollout.inputs).log_prob(rollout.actions)
    parameters = list(model.policy.parameters())
    found = th.autograd.grad(log_prob.sum(), parameters, allow_unused=True, retain_graph=True)
    actor = [parameter for parameter, gradient in zip(parameters, found, strict=True) if gradient is not None]
    if sum(parameter.numel() for parameter in actor) > 400:
        return actor, None
    real = rollout.weights > 0
    advantages = (rollout.advantages - rollout.advantages[real].mean()) / (rollout.advantages[real].std() + 1e-8)
    gradient = flat(th.autograd.grad(rollout.weights @ (advantages * log_prob), actor))
    try:
        kl = kl_divergence(fixed, torch_distributions(model, rollout.inputs), rollout.weights)
        slopes = flat(th.autograd.grad(kl, actor, create_graph=True))
        rows = [flat(th.autograd.grad(slope, actor, retain_graph=True, materialize_grads=True)) for slope in slopes]
    except RuntimeError:  # no second derivative
        return actor, None
    fisher = th.stack(rows).double()
    return actor, th.linalg.solve(fisher + model.cg_damping * th.eye(len(fisher)), gradient.double())


def flat(tensors: Any) -> th.Tensor:
    return th.cat([tensor.flatten() for tensor in tensors])


def detached(distribution: Any) -> Any:
    if isinstance(distribution, th.distributions.Normal):
        return th.distributions.Normal(distribution.loc.detach(), distribution.scale.detach())
    return type(distribution)(logits=distribution.logits.detach())
