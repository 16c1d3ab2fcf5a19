"""Trust Region Policy Optimization as a Stable-Baselines3 algorithm."""

import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import obs_as_tensor, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo.actions import ACTION_BOUNDS, ACTION_OPTIONS, BoundedActionPolicy, check_action_options, raw_actions
from sb3_trpo.adapters.actor_critic import policy_distribution, policy_values
from sb3_trpo.adapters.models import actor_model, critic_model, critic_parameters, value_function
from sb3_trpo.arguments import (
    BOOLEAN,
    DEVICE,
    ENVIRONMENT,
    KEYWORD_ARGUMENTS_OR_NONE,
    NON_NEGATIVE,
    NON_NEGATIVE_OR_SCHEDULE,
    OPEN_UNIT_INTERVAL,
    PATH_OR_NONE,
    POSITIVE,
    POSITIVE_INTEGER,
    POSITIVE_INTEGER_OR_NONE,
    POSITIVE_OR_SCHEDULE,
    SAMPLE_FREQUENCY,
    SEED,
    UNIT_INTERVAL,
    VERBOSITY,
    Rule,
    check_arguments,
    instance_of,
    one_of,
    optional,
    schedule_value,
    shown,
    subclass_of,
)
from sb3_trpo.base import ResumableAlgorithm
from sb3_trpo.constructors import checked, rules_of
from sb3_trpo.distributed.process_group import local_device
from sb3_trpo.distributed.synchronization import synchronized
from sb3_trpo.errors import argument_error, did_you_mean, warn_user
from sb3_trpo.optim.batch import Inputs, RolloutBatch, normalize_advantages
from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.critic import CriticFit, fit_gauss_newton, fit_minibatches
from sb3_trpo.optim.distributions import without_validation
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import KFACPreconditioner
from sb3_trpo.optim.line_search import (
    Evaluation,
    LineSearchResult,
    LineSearchStatus,
    backtracking_line_search,
    max_step_length,
    undamped_curvature,
)
from sb3_trpo.optim.moments import moments
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.parameters import Snapshot, all_finite, assign, flatten, is_step
from sb3_trpo.optim.running_statistics import STATISTICS_SHARE, keep_within, statistics, track, tracking_layers
from sb3_trpo.optim.statistics import PolicyStep, UpdateStats
from sb3_trpo.optim.transaction import UpdateTransaction
from sb3_trpo.policies import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    has_images,
)
from sb3_trpo.rollouts.actor import RolloutActor
from sb3_trpo.rollouts.buffers import ARRAY_BUFFERS, read_rollout
from sb3_trpo.rollouts.callback_locals import are_known, compute_locals
from sb3_trpo.rollouts.checks import EnvOutputCheck, checked_steps, kept_statistics
from sb3_trpo.rollouts.collect import (
    Truncation,
    find_truncations,
    stack_observations,
    widen_observations,
    write_step,
)
from sb3_trpo.rollouts.eligibility import draws_random_numbers, has_known_modules, has_own_forward, numpy_mlp
from sb3_trpo.rollouts.fast_step import Observations, copy_observations, fast_step_fn
from sb3_trpo.rollouts.samplers import (
    ActionSampler,
    NumpyActionSampler,
    action_transform,
    make_sampler,
    resamples_noise,
)
from sb3_trpo.saving.sb3_contrib import MINIBATCH_ARGUMENTS, convert_model

IMAGE_CHUNK = 256  # states in one forward pass where max_batch_size leaves it open: some 100 MB with NatureCNN
IMAGE_SAMPLE = 256  # states that curvature is computed from where curvature_batch_size leaves it open

MAX_STATES = 2**31 - 1  # in a rollout
#: Arguments that only the Gauss-Newton critic uses.
GAUSS_NEWTON_ARGUMENTS = ("critic_damping", "n_critic_steps")
OPTIMIZER_OPTIONS = ("optimizer_class", "optimizer_kwargs")
#: Arguments that are not the algorithm's own.
SB3_ARGUMENTS = (
    "policy",
    "env",
    "rollout_buffer_class",
    "rollout_buffer_kwargs",
    "stats_window_size",
    "tensorboard_log",
    "policy_kwargs",
    "verbose",
    "seed",
    "device",
)
BUFFER_CLASS = optional(subclass_of(RolloutBuffer, "a class derived from SB3's RolloutBuffer"))

SelfTRPO = TypeVar("SelfTRPO", bound="TRPO")


class TRPO(ResumableAlgorithm):
    """
    Trust Region Policy Optimization (TRPO).

    Paper: Schulman et al. 2015, https://arxiv.org/abs/1502.05477. Takes the arguments of sb3-contrib's TRPO, in their
    order. One difference matters: the KL is that of the joint action, summed over action dimensions, and it stays at or
    below ``target_kl`` in every update.

    :param policy: policy class, or its name: ``MlpPolicy``, ``CnnPolicy``, ``MultiInputPolicy``
    :param env: environment, or its registered name
    :param learning_rate: of the minibatch critic's optimizer; number or schedule of the remaining progress
    :param n_steps: steps of each environment per update; ``n_steps * n_envs`` states make a rollout
    :param batch_size: states in a minibatch of the minibatch critic
    :param gamma: discount factor, in [0, 1]
    :param cg_max_steps: bound on conjugate gradient iterations
    :param cg_damping: λ, added to the diagonal of the Fisher matrix; 0 for the least that rounding errors allow
    :param line_search_shrinking_factor: α in (0, 1), shortens a step that does not improve the objective (one that leaves
        the trust region is shortened to its boundary)
    :param line_search_max_iter: bound on the points that the line search tries
    :param n_critic_updates: passes of the minibatch critic over the rollout, per update
    :param gae_lambda: λ of generalised advantage estimation, in [0, 1]
    :param use_sde: explore with generalised state-dependent noise (gSDE)
    :param sde_sample_freq: sample a new gSDE noise matrix every so many steps; -1 for once a rollout
    :param rollout_buffer_class: rollout buffer; None for SB3's own, by observation space
    :param rollout_buffer_kwargs: further arguments of the rollout buffer
    :param normalize_advantage: scale advantages to mean 0 and standard deviation 1
    :param target_kl: δ, bound on the mean joint KL(π_old ‖ π_new) of an update, in nats; number or schedule
    :param sub_sampling_factor: compute the Fisher matrix from one in so many states (Schulman's thesis, p. 40); gradient
        and line search always use all
    :param stats_window_size: episodes over which the logged episode statistics average
    :param tensorboard_log: folder for TensorBoard logs; None for none
    :param policy_kwargs: further arguments of the policy
    :param verbose: 0 for no output, 1 for info, 2 for debug messages
    :param seed: seed of all pseudo-random generators
    :param device: device of the networks
    :param _init_setup_model: build the networks at once
    :param cg_residual_tol: stop conjugate gradients once the residual's norm is this share of the gradient's; 0 to run
        all ``cg_max_steps``
    :param cg_preconditioner: ``"kfac"`` for Kronecker factors, None for plain conjugate gradients
    :param critic_method: how the critic is fitted: ``"gauss_newton"`` (damped Gauss-Newton steps on the whole rollout), or
        ``"minibatch"`` (the policy's optimizer, as in sb3-contrib, with ``learning_rate``, ``batch_size`` and
        ``n_critic_updates``, which the first does not use)
    :param critic_damping: damping of the Gauss-Newton steps; larger is smoother
    :param n_critic_steps: Gauss-Newton steps per update
    :param max_batch_size: most states in one forward pass of the update, to bound its memory; results stay the same.
        None for all states at once, or 256 with images
    :param ent_coef: weight of the policy's mean entropy in the objective
    :param n_policy_updates: steps of the policy on each rollout. All stay in one trust region, around the policy that
        collected it: each goes for an equal share of the way
    :param policy_batch_size: most states that the direction of one step is computed from; the rollout is shuffled and cut
        into equal parts, and each ``n_policy_updates`` goes through all. The line search always uses the whole rollout.
        None for the whole rollout
    :param line_search_accept_ratio: least ratio of actual to expected improvement that the line search accepts, in [0, 1]
    :param return_scaling: let the critic predict returns divided by the running standard deviation of all returns so far
    :param action_bound: ``"clip"`` or ``"tanh"`` to bring Box actions to [-1, 1] so and scale them to the space's bounds; None
        to clip them to the bounds, as SB3 does
    :param curvature_batch_size: most states, drawn at random in each update, that the Fisher and Gauss-Newton matrices are
        computed from; gradient, KL and line search always use all. Applies to what ``sub_sampling_factor`` leaves, and to the
        critic. None for all states, or 256 with images
    :param check_observations: refuse observations with a NaN or an infinity; False for a policy that handles them itself, as
        by masking padding. Rewards, actions, values and the update are checked in any case
    :raises ValueError: an argument is out of range; the message names it, its value and what is allowed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    #: Training ends with an error after so many updates in a row that came to a NaN or an infinity, and were undone.
    max_failed_updates: int = 10
    _failed_updates: int = 0
    #: Names of the constructor arguments that the user gave.
    _given_arguments: frozenset[str] = frozenset()
    #: States of a sample of images, with ``curvature_batch_size=None``; None for all.
    image_sample: ClassVar[int | None] = IMAGE_SAMPLE
    #: SB3's local variables, for callbacks, that come from the policy.
    _step_variables: ClassVar[frozenset[str]] = frozenset({"obs_tensor", "values", "log_probs"})

    @checked
    def __init__(
        self,
        policy: Annotated[str | type[ActorCriticPolicy], instance_of(str, type, allowed="a policy class or its name")],
        env: Annotated[GymEnv | str, ENVIRONMENT],
        learning_rate: Annotated[float | Schedule, NON_NEGATIVE_OR_SCHEDULE] = 1e-3,
        n_steps: Annotated[int, POSITIVE_INTEGER] = 2048,
        batch_size: Annotated[int, POSITIVE_INTEGER] = 128,
        gamma: Annotated[float, UNIT_INTERVAL] = 0.99,
        cg_max_steps: Annotated[int, POSITIVE_INTEGER] = 15,
        cg_damping: Annotated[float, NON_NEGATIVE] = 0.1,
        line_search_shrinking_factor: Annotated[float, OPEN_UNIT_INTERVAL] = 0.8,
        line_search_max_iter: Annotated[int, POSITIVE_INTEGER] = 10,
        n_critic_updates: Annotated[int, POSITIVE_INTEGER] = 10,
        gae_lambda: Annotated[float, UNIT_INTERVAL] = 0.95,
        use_sde: Annotated[bool, BOOLEAN] = False,
        sde_sample_freq: Annotated[int, SAMPLE_FREQUENCY] = -1,
        rollout_buffer_class: Annotated[type[RolloutBuffer] | None, BUFFER_CLASS] = None,
        rollout_buffer_kwargs: Annotated[dict[str, Any] | None, KEYWORD_ARGUMENTS_OR_NONE] = None,
        normalize_advantage: Annotated[bool, BOOLEAN] = True,
        target_kl: Annotated[float | Schedule, POSITIVE_OR_SCHEDULE] = 0.05,
        sub_sampling_factor: Annotated[int, POSITIVE_INTEGER] = 1,
        stats_window_size: Annotated[int, POSITIVE_INTEGER] = 100,
        tensorboard_log: Annotated[str | None, PATH_OR_NONE] = None,
        policy_kwargs: Annotated[dict[str, Any] | None, KEYWORD_ARGUMENTS_OR_NONE] = None,
        verbose: Annotated[int, VERBOSITY] = 0,
        seed: Annotated[int | None, SEED] = None,
        device: Annotated[th.device | str, DEVICE] = "auto",
        _init_setup_model: bool = True,
        *,
        cg_residual_tol: Annotated[float, NON_NEGATIVE] = 0.05,
        cg_preconditioner: Annotated[str | None, one_of("kfac", None)] = "kfac",
        critic_method: Annotated[str, one_of("gauss_newton", "minibatch")] = "gauss_newton",
        critic_damping: Annotated[float, POSITIVE] = 0.03,
        n_critic_steps: Annotated[int, POSITIVE_INTEGER] = 1,
        max_batch_size: Annotated[int | None, POSITIVE_INTEGER_OR_NONE] = None,
        ent_coef: Annotated[float, NON_NEGATIVE] = 0.0,
        n_policy_updates: Annotated[int, POSITIVE_INTEGER] = 1,
        policy_batch_size: Annotated[int | None, POSITIVE_INTEGER_OR_NONE] = None,
        line_search_accept_ratio: Annotated[float, UNIT_INTERVAL] = 0.0,
        return_scaling: Annotated[bool, BOOLEAN] = False,
        action_bound: Annotated[str | None, one_of(*ACTION_BOUNDS, None)] = None,
        check_observations: Annotated[bool, BOOLEAN] = True,
        curvature_batch_size: Annotated[int | None, POSITIVE_INTEGER_OR_NONE] = None,
    ) -> None:
        place = self._place
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=0.0,
            max_grad_norm=0.0,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose if place.rank == 0 else 0,
            seed=seed,
            device=local_device(device, place),
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.batch_size = batch_size
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.n_critic_updates = n_critic_updates
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.sub_sampling_factor = sub_sampling_factor
        self.cg_residual_tol = cg_residual_tol
        self.cg_preconditioner = cg_preconditioner
        self.critic_method = critic_method
        self.critic_damping = critic_damping
        self.n_critic_steps = n_critic_steps
        self.max_batch_size = max_batch_size
        self.n_policy_updates = n_policy_updates
        self.policy_batch_size = policy_batch_size
        self.line_search_accept_ratio = line_search_accept_ratio
        self.return_scaling = return_scaling
        self.action_bound = action_bound
        self.check_observations = check_observations
        self.curvature_batch_size = curvature_batch_size
        self.return_moments = RunningMeanStd(epsilon=0.0)
        #: What the latest update did; None before the first.
        self.last_update: UpdateStats | None = None
        # Written into every zip: sb3-contrib's TRPO, which averages the KL over action dimensions, has no such mark.
        self.kl_is_joint = True

        if _init_setup_model:
            self._setup_model()
            self._warn_of_unused_arguments(self._given_arguments)

    #: Rules of the algorithm's own arguments: files, hyperparameters and other processes are checked by them.
    argument_rules: ClassVar[dict[str, Rule]] = {
        name: rule for name, rule in rules_of(__init__).items() if name not in SB3_ARGUMENTS
    }

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name not in self.policy_aliases:
            raise ValueError(
                f"policy={policy_name!r} is not allowed: it must be {' or '.join(map(repr, self.policy_aliases))}, or a "
                f"policy class{did_you_mean(policy_name, self.policy_aliases)}"
            )
        return self.policy_aliases[policy_name]

    def _setup_model(self) -> None:
        # A loaded model's arguments come from its file and from the keyword arguments of `load`.
        rules = {**rules_of(TRPO.__init__), **self.argument_rules}
        kept = {name: rule for name, rule in rules.items() if name in vars(self) and name != "policy"}
        vars(self).update(check_arguments(kept, vars(self)))
        if getattr(self, "observation_space", None) is None:
            raise ValueError("env=None is not allowed: a new model needs an environment")
        self._check_rollout_size()
        self._check_policy()
        self._build()
        if not self._fits_loop(self.rollout_buffer):
            self._check_sb3s_loop()

    def _check_policy(self) -> None:
        for method in ("get_distribution", "predict_values"):
            if not hasattr(self.policy_class, method):
                raise ValueError(
                    f"policy={self.policy_class.__name__} is not allowed: it must be an actor-critic policy "
                    f"with the methods get_distribution and predict_values, and it has no {method}"
                )
        if self.action_bound is not None:
            self._bound_actions(self.action_bound)
        if issubclass(self.policy_class, BoundedActionPolicy):
            options = {name: self.policy_kwargs.get(name) for name in ACTION_OPTIONS}
            check_action_options(self.action_space, self.use_sde, options)

    def _unused_arguments(self) -> dict[str, tuple[str, ...]]:
        """Return the arguments that have no effect, by the argument that disables them."""
        if self.critic_method == "minibatch":
            return {"critic_method='minibatch'": GAUSS_NEWTON_ARGUMENTS}
        return {"critic_method='gauss_newton'": MINIBATCH_ARGUMENTS}

    def _warn_of_unused_arguments(self, given: Collection[str]) -> None:
        """Warn once about arguments that the user gave and that have no effect."""
        optimizer = [f"policy_kwargs[{name!r}]" for name in OPTIMIZER_OPTIONS if name in self.policy_kwargs]
        for reason, names in self._unused_arguments().items():
            unused = [name for name in names if name in given]
            if names is MINIBATCH_ARGUMENTS and "policy_kwargs" in given:
                unused += optimizer
            if unused:
                warn_user(f"no effect with {reason}: {', '.join(unused)}")

    def _build(self) -> None:
        try:
            self._setup_networks()
        except (TypeError, AttributeError, AssertionError, LookupError, RuntimeError, OverflowError) as error:
            given = {name: getattr(self, name) for name in ("policy_kwargs", "rollout_buffer_kwargs")}
            words = " and ".join(f"{name}={shown(value)}" for name, value in given.items() if value)
            if not words:
                raise
            raise argument_error(
                f"{words} is not allowed: it must suit {self.policy_class.__name__} and the rollout buffer, "
                f"which raised {error!r}",
                error,
            ) from error

    def _setup_networks(self) -> None:
        """Make policy and buffer, after seeding all generators."""
        super()._setup_model()

    def _buffer_class(self, flat: type[RolloutBuffer], dictionary: type[RolloutBuffer]) -> type[RolloutBuffer]:
        """
        Find the class of the rollout buffer, for policies that need one of their own.

        :param flat: the usual one
        :param dictionary: the usual one for Dict observations
        :return: the user's, or the usual one
        :raises ValueError: the user's does not derive from the usual one
        """
        usual = dictionary if isinstance(self.observation_space, spaces.Dict) else flat
        buffer_class = self.rollout_buffer_class or usual
        if not issubclass(buffer_class, usual):
            raise ValueError(
                f"rollout_buffer_class={buffer_class.__name__} is not allowed: "
                f"it must derive from sb3-contrib's {usual.__name__}"
            )
        return buffer_class

    def _bound_actions(self, action_bound: str) -> None:
        if not issubclass(self.policy_class, BoundedActionPolicy):
            raise ValueError(
                f"policy={self.policy_class.__name__} is not allowed with action_bound={action_bound!r}: "
                "it must derive from MlpPolicy, CnnPolicy or MultiInputPolicy of sb3_trpo"
            )
        other = self.policy_kwargs.get("action_bound", action_bound)
        if other != action_bound:
            raise ValueError(f"action_bound={action_bound!r} is not allowed with policy_kwargs['action_bound']={other!r}")
        self.policy_kwargs = {**self.policy_kwargs, "action_bound": action_bound}

    def _check_sb3s_loop(self) -> None:
        """SB3's loop, which collects for policies and buffers that this package's loop does not know, scales no values."""
        if self.return_scaling:
            raise ValueError(
                "return_scaling=True is not allowed with a policy that has a forward method of its own, or a rollout buffer "
                "class of your own: their values could not be scaled"
            )

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        if self.critic_method != "minibatch":  # nothing uses the optimizer
            return
        learning_rate = schedule_value("learning_rate", self.learning_rate, self._current_progress_remaining)
        self.logger.record("train/learning_rate", learning_rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            update_learning_rate(optimizer, learning_rate)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go beyond the total, and a schedule that ends at 0 must not go below it.
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _check_rollout_size(self) -> None:
        n_states = self.n_steps * self.n_envs
        words = f"n_steps={self.n_steps} * n_envs={self.n_envs} = {n_states} states"
        if n_states > MAX_STATES:
            raise ValueError(f"a rollout of {words} is not allowed: it must have at most {MAX_STATES}")
        if self.normalize_advantage and n_states < 2:
            raise ValueError(f"a rollout of {words} is not allowed with normalize_advantage=True: it must have at least 2")
        if self.sub_sampling_factor > n_states:
            raise ValueError(
                f"sub_sampling_factor={self.sub_sampling_factor} is not allowed: it must be at most the rollout's {words}"
            )
        if self.policy_batch_size is not None and self.policy_batch_size > n_states:
            raise ValueError(
                f"policy_batch_size={self.policy_batch_size} is not allowed: it must be at most the rollout's {words}"
            )
        if self.critic_method == "minibatch" and n_states % self.batch_size > 0:
            warnings.warn(
                f"batch_size={self.batch_size} does not divide the rollout's {words}: "
                f"the last minibatch of each pass has {n_states % self.batch_size}",
                stacklevel=3,
            )

    @synchronized
    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Fill the buffer by acting with the policy.

        Callbacks find SB3's local variables. A callback may change the policy at any time.

        :param env: the training environment
        :param callback: called at every step, and at the rollout's start and end
        :param rollout_buffer: buffer to fill
        :param n_rollout_steps: steps to take in each environment
        :return: False if the callback stopped the training
        :raises NonFiniteError: the environment returned a NaN or an infinity
        """
        check = EnvOutputCheck(env, self.num_timesteps, self.check_observations)
        with kept_statistics(env):
            if not self._fits_loop(rollout_buffer):
                with checked_steps(env, check):
                    return self._collect_by_sb3(env, callback, rollout_buffer, n_rollout_steps)
            self.policy.set_training_mode(False)
            rollout_buffer.reset()
            self._last_obs = copy_observations(self._last_obs)  # type: ignore[arg-type]
            widen_observations(rollout_buffer, self._last_obs)
            callback.on_rollout_start()
            actor = self._make_actor(env, callback, n_rollout_steps)
            act, to_env, step = actor.act, action_transform(self.policy), fast_step_fn(env)

            n_steps = 0
            while n_steps < n_rollout_steps:
                obs: Observations = self._last_obs  # type: ignore[assignment]
                actions = act(obs, n_steps)
                if not self.check_observations:
                    check.check_actions(actions)
                clipped_actions = to_env(actions)
                new_obs, rewards, dones, infos = step(clipped_actions)
                check(new_obs, rewards)
                self.num_timesteps += env.num_envs
                callback.update_locals(locals())
                if not callback.on_step():
                    return False

                self._update_info_buffer(infos, dones)
                write_step(rollout_buffer, n_steps, obs, actions, rewards, self._last_episode_starts)  # type: ignore[arg-type]
                if dones.any():
                    truncations = find_truncations(n_steps, dones, infos)
                    check.check_truncations(truncations)
                    actor.add_truncations(truncations)
                self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
                n_steps += 1

            actor.finish(self._last_obs, dones)  # type: ignore[arg-type]
            check.check_evaluation(rollout_buffer)
            callback.update_locals({**locals(), **actor.variables()})
            callback.on_rollout_end()
            return True

    def _fits_loop(self, rollout_buffer: RolloutBuffer) -> bool:
        """Whether the loop of :meth:`collect_rollouts` serves policy and buffer; a user's buffer must fill itself."""
        return type(rollout_buffer) in ARRAY_BUFFERS and not has_own_forward(self.policy)

    def _collect_by_sb3(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """SB3's loop, for all others."""
        with raw_actions(self.policy):
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def _make_actor(self, env: VecEnv, callback: BaseCallback, n_rollout_steps: int) -> RolloutActor:
        """
        Decide how to act in the next rollout.

        The policy is watched where somebody may change it: a callback that is neither SB3's nor this package's, or modules
        of the user's own that are called at every step.
        """
        sampler = self._make_sampler(env, n_rollout_steps)
        changes_by_itself = False
        calls_policy = sampler is not None and not isinstance(sampler, NumpyActionSampler)
        if calls_policy and not has_known_modules(self.policy) and numpy_mlp(self.policy) is None:
            observations = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
            changes_by_itself = True
            sampler = None if draws_random_numbers(self.policy, observations) else sampler
        is_known = are_known(callback)
        actor = RolloutActor(self, env, sampler, is_watched=changes_by_itself or not is_known)
        if not is_known:
            compute_locals(callback, self._step_variables, actor.variables)
        return actor

    def _make_sampler(self, env: VecEnv, n_rollout_steps: int) -> ActionSampler | None:
        """Make what samples actions in the next rollout; None to call :meth:`_forward` at every step."""
        return make_sampler(self.policy, n_rollout_steps, env.num_envs, self.sde_sample_freq)

    @th.no_grad()
    def _forward(self, env: VecEnv, observations: Observations, step: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Act as SB3's loop does: actions, and SB3's local variables that come with them."""
        if self.use_sde and resamples_noise(step, self.sde_sample_freq):
            self.policy.reset_noise(env.num_envs)
        obs_tensor = obs_as_tensor(observations, self.device)
        with raw_actions(self.policy):
            actions, values, log_probs = self.policy(obs_tensor)
        variables = {"obs_tensor": obs_tensor, "values": self._value_scale * values, "log_probs": log_probs}
        return actions.cpu().numpy(), variables

    def _more_variables(self, step: int) -> dict[str, Any]:
        """Return further local variables of SB3's loop that come from acting."""
        return {}

    def _last_values(self, observations: Observations, dones: np.ndarray) -> th.Tensor:
        """V of the observations after a rollout, shape ``(n_envs, 1)``."""
        return self._value_scale * self.policy.predict_values(obs_as_tensor(observations, self.device))

    def _truncated_values(self, truncations: list[Truncation]) -> list[float]:
        """V of the last observations of episodes that a time limit cut off."""
        values: list[float] = []
        size = self._chunk_size or len(truncations)
        for start in range(0, len(truncations), size):
            batch = stack_observations([truncation.observation for truncation in truncations[start : start + size]])
            values += (self._value_scale * self.policy.predict_values(obs_as_tensor(batch, self.device))).flatten().tolist()
        return values

    @without_validation()
    def train(self) -> None:
        """Improve the policy inside its trust region, then fit the value function."""
        start_time = time.perf_counter()
        self.policy.set_training_mode(False)  # the mode in which the rollout was collected
        self._update_learning_rate(self.policy.optimizer)
        batch = self._rollout_batch()  # normalized advantages; this rank's shard
        with UpdateTransaction(self.policy, self._failed_updates, self.max_failed_updates) as update:
            actor = actor_model(self.policy, self._distribution, batch.select(slice(1)).inputs)
            surrogate = Surrogate(actor, batch, self._chunk_size, self.ent_coef)  # L(θ), D̄_KL(π_old ‖ π_θ)
            point, tracked = self._track_statistics(surrogate)
            minibatches = self._policy_minibatches(batch)
            for index in minibatches:
                update.steps.append(self._policy_step(surrogate, point, index, len(minibatches)))
                point = update.steps[-1].search.point
            update.restore_buffers_without_step()
            update.critic = self._fit_critic(batch, actor.parameters, tracked)
        self._failed_updates = update.n_failed
        self._n_updates += 1
        self._record(update.steps, update.critic, surrogate.entropy, time.perf_counter() - start_time)
        update.raise_if_stuck()

    def _policy_step(self, surrogate: Surrogate, start: Evaluation, index: th.Tensor | None, n_steps: int) -> PolicyStep:
        """
        One natural-gradient step θ ← θ + αʲβs (Schulman et al. 2015, appendix C).

        :param surrogate: L(θ) and D̄_KL(π_old ‖ π_θ) on the whole rollout
        :param start: L and D̄_KL at the current θ
        :param index: sequences to compute the direction from; None for all
        :param n_steps: number of steps in a pass over the rollout
        :return: the step
        """
        local = surrogate.relinearize(index)  # around the current θ
        subsampled = local.subsample(self.sub_sampling_factor, self._curvature_size)
        gradient = local.gradient()  # g
        fisher = FisherOperator(subsampled, self.cg_damping)  # v ↦ (F + λI) v
        fisher.keep_definite(gradient)
        inverse = self._preconditioner(subsampled, fisher.damping)  # v ↦ ≈ (F + λI)⁻¹ v
        cg = conjugate_gradient(fisher, gradient, max_iter=self.cg_max_steps, rtol=self.cg_residual_tol, M=inverse)
        curvature = undamped_curvature(cg.curvature, fisher.damping, float(cg.x.dot(cg.x)))  # sᵀFs
        step_size = self._step_size(curvature, n_steps)  # β
        expected = step_size * float(gradient.dot(cg.x))
        search = self._line_search(surrogate, step_size * cg.x, start, expected)  # θ + αʲβs, or θ
        return PolicyStep(start, float(gradient.norm()), cg, step_size, expected, search)

    def _rollout_batch(self) -> RolloutBatch:
        batch = self._read_rollout().shard(self._ranks)
        return normalize_advantages(batch) if self.normalize_advantage else batch

    def _policy_minibatches(self, batch: RolloutBatch) -> list[th.Tensor | None]:
        """The sequences of the rollout that each policy step uses; None for all."""
        if self.policy_batch_size is None:
            return [None] * self.n_policy_updates
        return [index for _ in range(self.n_policy_updates) for index in batch.minibatches(self.policy_batch_size, equal=True)]

    def _track_statistics(self, surrogate: Surrogate) -> tuple[Evaluation, Sequence[nn.Module]]:
        """
        Bring the policy's running statistics up to date, inside the trust region.

        :param surrogate: L(θ) and D̄_KL(π_old ‖ π_θ)
        :return: L and D̄_KL afterwards, and the layers with the policy's statistics
        """
        layers = tracking_layers(self.policy)
        old = {layer: flatten(statistics([layer])) for layer in layers}
        tracked = track(layers, self._distribution, surrogate.batch, self._chunk_size) if layers else []
        if not tracked:
            return surrogate.start(), []
        before = th.cat([old[layer] for layer in tracked])
        return keep_within(tracked, before, surrogate.evaluate, STATISTICS_SHARE * self._current_target_kl), tracked

    @property
    def _current_target_kl(self) -> float:
        """δ at this point of the training."""
        return schedule_value("target_kl", self.target_kl, self._current_progress_remaining)

    @property
    def _value_scale(self) -> float:
        """What the critic's outputs are multiplied with to give values."""
        return float(np.sqrt(self.return_moments.var + 1e-8)) if self.return_scaling else 1.0

    @property
    def _chunk_size(self) -> int | None:
        """Most states in one forward pass."""
        if self.max_batch_size is not None or not has_images(self.observation_space):
            return self.max_batch_size
        return IMAGE_CHUNK

    @property
    def _curvature_size(self) -> int | None:
        """Most states that a curvature matrix is computed from."""
        if self.curvature_batch_size is not None or not has_images(self.observation_space):
            return self.curvature_batch_size
        return self.image_sample

    def _read_rollout(self) -> RolloutBatch:
        return read_rollout(self.rollout_buffer, self.action_space)

    def _distribution(self, inputs: Inputs) -> Distribution:
        return policy_distribution(self.policy, inputs)

    def _values(self, inputs: Inputs) -> th.Tensor:
        return policy_values(self.policy, inputs).flatten()

    def _evaluate(self, rollout: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """The critic's outputs, and log-probabilities."""
        with raw_actions(self.policy):
            return self.policy.evaluate_actions(rollout.inputs, rollout.actions)[:2]

    def _preconditioner(self, surrogate: Surrogate, damping: float) -> KFACPreconditioner | None:
        if self.cg_preconditioner is None or not surrogate.has_closed_form:
            return None
        return KFACPreconditioner(surrogate, damping)

    def _step_size(self, curvature: float, n_steps: int) -> float:
        """
        β of a step.

        Steps share the trust region. Passes over the rollout take similar directions, so their lengths add up to its radius;
        minibatches of a pass take different ones, so the squares of their lengths add up.

        :param curvature: sᵀFs
        :param n_steps: number of steps of the update
        :return: factor of s
        """
        return max_step_length(curvature, self._current_target_kl / (n_steps * self.n_policy_updates))

    def _line_search(self, surrogate: Surrogate, step: th.Tensor, start: Evaluation, expected: float) -> LineSearchResult:
        """
        Move θ along the step as far as the trust region and the objective allow, or not at all.

        :param surrogate: L(θ) and D̄_KL(π_old ‖ π_θ)
        :param step: βs, the longest step
        :param start: L and D̄_KL at the current θ
        :param expected: βgᵀs, the improvement of L by the step in a linear model
        :return: the accepted point, or ``start``
        """
        if not is_step(step):
            return LineSearchResult(LineSearchStatus.SKIPPED, 0.0, 0, start)
        actor = surrogate.model.parameters
        before = Snapshot([*actor, *self.policy.buffers()])
        theta = flatten(actor).detach()

        def evaluate(fraction: float) -> Evaluation:
            assign(actor, theta + fraction * step)
            return surrogate.evaluate()

        search = backtracking_line_search(
            evaluate,
            start,
            target_kl=self._current_target_kl,
            shrink=self.line_search_shrinking_factor,
            max_iter=self.line_search_max_iter,
            min_improvement=self.line_search_accept_ratio * expected,
            slope=expected,
        )
        if search.outcome is LineSearchStatus.REJECTED:
            before.restore()
        return search

    def _fit_critic(self, batch: RolloutBatch, actor: Sequence[nn.Parameter], tracked: Sequence[nn.Module] = ()) -> CriticFit:
        """
        Regress the values on the returns, in the parameters that the policy does not depend on.

        :param batch: the rollout
        :param actor: θ, not to be changed
        :param tracked: layers with the policy's running statistics, not to be changed
        :return: result of the regression
        """
        own = [layer for layer in tracking_layers(self.policy) if layer not in tracked]
        if own:
            track(own, self._values, batch, self._chunk_size)
        parameters = critic_parameters(self.policy, self._values, batch.select(slice(1)).inputs, actor)
        encode, head = value_function(self.policy, self._values, parameters)
        if encode is not None:
            batch = batch.encoded(encode, self._chunk_size)
        if self.return_scaling:
            batch = self._scale_returns(batch)
        if self.critic_method == "gauss_newton":
            critic = critic_model(self.policy, head, parameters)
            return fit_gauss_newton(
                critic,
                batch,
                self._chunk_size,
                damping=self.critic_damping,
                n_steps=self.n_critic_steps,
                # Features are no images any more: products on them are cheap.
                curvature_size=self._curvature_size if encode is None else self.curvature_batch_size,
            )
        return fit_minibatches(
            head,
            batch,
            critic=parameters,
            optimizer=self.policy.optimizer,
            batch_size=self.batch_size,
            n_epochs=self.n_critic_updates,
        )

    def _scale_returns(self, batch: RolloutBatch) -> RolloutBatch:
        """Divide returns by the running standard deviation, then update it."""
        scaled = replace(batch, returns=batch.returns / self._value_scale)
        seen = moments(batch.returns[batch.mask].cpu().double(), batch.ranks)
        if all_finite([seen.variance]):
            self.return_moments.update_from_moments(seen.mean.numpy(), seen.variance.numpy(), seen.n_values)
        return scaled

    def _record(self, steps: list[PolicyStep], critic: CriticFit, entropy: float, seconds: float) -> None:
        """
        Tell the logger, and :attr:`last_update`, what the update did.

        :param steps: steps of the policy
        :param critic: fit of the critic
        :param entropy: mean entropy of the policy that collected the rollout, in nats
        :param seconds: wall-clock time of the update
        """
        self.last_update = UpdateStats.of(steps, critic.losses, seconds)
        record = self.logger.record
        for name, summary in self.last_update.summaries.items():
            # Objective and KL are those of the whole update, whatever number of steps it took.
            is_of_update = name in ("policy_objective", "kl_divergence_loss")
            record(f"train/{name}", summary.last if is_of_update else summary.mean)
            if summary.count > 1:
                for statistic in ("std", "min", "max"):
                    record(f"train/{name}_{statistic}", getattr(summary, statistic), exclude="stdout")
        record("time/train_seconds", seconds)
        record("train/explained_variance", self._explained_variance())
        self._record_outcomes(steps)
        record("train/cg_status", steps[-1].solution.status.value, exclude="tensorboard")
        record("train/is_critic_fit_success", float(critic.succeeded))
        record("train/failed_updates", self._failed_updates)
        record("train/entropy", entropy)
        if hasattr(self.policy, "log_std"):
            record("train/std", th.exp(self.policy.log_std).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _explained_variance(self) -> float:
        """Share of the returns' variance that the values had explained; NaN where there is none."""
        buffer = self.rollout_buffer
        seen = np.stack([buffer.returns - buffer.values, buffer.returns], axis=-1).reshape(-1, 2)
        unexplained, total = moments(th.from_numpy(seen), self._ranks).variance.tolist()
        return 1.0 - unexplained / total if total > 0.0 else float("nan")

    def _record_outcomes(self, steps: list[PolicyStep]) -> None:
        accepted = [step.search.outcome is LineSearchStatus.ACCEPTED for step in steps]
        self.logger.record("train/is_line_search_success", float(np.mean(accepted)))
        self.logger.record("train/line_search", steps[-1].search.outcome.value, exclude="tensorboard")
        self.logger.record("train/target_kl", self._current_target_kl)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "last_update", "_given_arguments"]

    def learn(
        self: SelfTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfTRPO:
        """
        Train.

        :param total_timesteps: environment steps to collect, over all environments; rollouts are always completed
        :param callback: SB3 callback, or a list of them
        :param log_interval: updates between two writes of the log
        :param tb_log_name: name of the run in TensorBoard; None for the name of the algorithm
        :param reset_num_timesteps: start counting at 0; False to continue an earlier call
        :param progress_bar: show a progress bar (tqdm and rich)
        :return: the model
        """
        name = self.algorithm() if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _loaded(self, names: set[str], keep: set[str]) -> None:
        if "kl_is_joint" not in names:
            convert_model(self, keep)
        self._warn_of_unused_arguments(keep)
