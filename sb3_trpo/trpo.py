"""Trust Region Policy Optimization as a Stable-Baselines3 algorithm."""

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo import arguments as allowed
from sb3_trpo.actions import ACTION_BOUNDS
from sb3_trpo.adapters.actor_critic import ActorCriticAdapter
from sb3_trpo.adapters.base import PolicyAdapter
from sb3_trpo.arguments import Rule, instance_of, one_of, optional, schedule_value
from sb3_trpo.base import ResumableAlgorithm
from sb3_trpo.constructors import checked, own_rules_of, rules_of
from sb3_trpo.distributed.process_group import local_device
from sb3_trpo.distributed.synchronization import synchronized
from sb3_trpo.optim.batch import RolloutBatch, normalize_advantages
from sb3_trpo.optim.conjugate_gradient import conjugate_gradient
from sb3_trpo.optim.critic import CriticFit, fit_gauss_newton, fit_minibatches
from sb3_trpo.optim.distributions import without_validation
from sb3_trpo.optim.fisher import FisherOperator
from sb3_trpo.optim.kfac import default_stopping, make_preconditioner
from sb3_trpo.optim.line_search import (
    Evaluation,
    LineSearchResult,
    first_fraction,
    max_step_length,
    search_along,
    undamped_curvature,
    updated_kl_ratio,
)
from sb3_trpo.optim.objective import Surrogate
from sb3_trpo.optim.return_scaling import scale_returns, value_scale
from sb3_trpo.optim.running_statistics import RunningStatistics
from sb3_trpo.optim.statistics import PolicyStep, UpdateStats
from sb3_trpo.optim.transaction import UpdateTransaction
from sb3_trpo.policies import POLICY_ALIASES
from sb3_trpo.reporting import explained_variance, record_line_search, record_statuses, record_update
from sb3_trpo.rollouts.checks import EnvOutputCheck, checked_steps, kept_statistics
from sb3_trpo.rollouts.loop import fill_buffer
from sb3_trpo.saving.sb3_contrib import convert_model
from sb3_trpo.validation import checked_setup, unused_arguments, warn_of_unused_arguments


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
    :param line_search_shrinking_factor: α in (0, 1), shortens a step inside the trust region that does not improve enough
    :param line_search_max_iter: bound on the points that the line search tries
    :param n_critic_updates: passes of the minibatch critic over the rollout, per update
    :param gae_lambda: λ of generalised advantage estimation, in [0, 1]
    :param use_sde: explore with generalised state-dependent noise (gSDE)
    :param sde_sample_freq: sample a new gSDE noise matrix every so many steps; -1 for once a rollout
    :param rollout_buffer_class: rollout buffer; None for SB3's own, by observation space
    :param rollout_buffer_kwargs: further arguments of the rollout buffer
    :param normalize_advantage: scale advantages to mean 0 and standard deviation 1
    :param target_kl: δ, bound on the mean joint KL(π_old ‖ π_new) of an update, in nats; number or schedule
    :param sub_sampling_factor: compute the Fisher matrix from one in so many states (Schulman's thesis, p. 40)
    :param stats_window_size: episodes over which the logged episode statistics average
    :param tensorboard_log: folder for TensorBoard logs; None for none
    :param policy_kwargs: further arguments of the policy
    :param verbose: 0 for no output, 1 for info, 2 for debug messages
    :param seed: seed of all pseudo-random generators
    :param device: device of the networks
    :param _init_setup_model: build the networks at once
    :param cg_residual_tol: relative residual at which conjugate gradients stop; None: 0.01; with Kronecker factors 0.05
    :param cg_preconditioner: ``"kfac"`` for Kronecker factors where the network has no convolutions; None for none
    :param critic_method: how the critic is fitted: ``"gauss_newton"`` (damped Gauss-Newton steps on the whole rollout), or
        ``"minibatch"`` (the policy's optimizer, as in sb3-contrib, with ``learning_rate``, ``batch_size`` and
        ``n_critic_updates``, which the first does not use)
    :param critic_damping: damping of the Gauss-Newton steps; larger is smoother
    :param n_critic_steps: Gauss-Newton steps per update
    :param max_batch_size: most states in one forward pass of the update, to bound its memory; None: all, or 256 images
    :param ent_coef: weight of the policy's mean entropy in the objective
    :param n_policy_updates: steps of the policy on each rollout. All stay in one trust region, around the policy that
        collected it: each goes for an equal share of the way
    :param policy_batch_size: most states that the direction of one step is computed from: each of ``n_policy_updates`` passes
        takes all equal parts of the shuffled rollout. The line search always uses all states. None for the whole rollout
    :param line_search_accept_ratio: least ratio of actual to expected improvement that the line search accepts, in [0, 1]
    :param return_scaling: let the critic predict returns divided by the running standard deviation of all returns so far
    :param action_bound: squash Box actions by ``"clip"`` or ``"tanh"`` and scale them to the bounds; None to clip, as SB3 does
    :param curvature_batch_size: most states, drawn at random, for Fisher and Gauss-Newton matrices; None: all, or 256 images
    :param max_state_kl: bound on the joint KL in any one state of the rollout, in nats; None for none
    :param check_observations: refuse observations with NaN or infinity; False for a policy that handles them, as padding
    :raises ValueError: an argument is out of range; the message names it, its value and what is allowed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICY_ALIASES
    #: Training ends with an error after so many updates in a row that came to a NaN or an infinity, and were undone.
    max_failed_updates: int = 10
    _failed_updates: int = 0
    #: True over quadratic KL of recent steps: where the line search starts.
    _kl_ratio: float = 1.0
    #: How the family of policies is built and called.
    adapter_class: ClassVar[type[PolicyAdapter]] = ActorCriticAdapter

    @checked
    def __init__(
        self,
        policy: Annotated[str | type[ActorCriticPolicy], instance_of(str, type, allowed="a policy class or its name")],
        env: Annotated[GymEnv | str, allowed.ENVIRONMENT],
        learning_rate: Annotated[float | Schedule, allowed.NON_NEGATIVE_OR_SCHEDULE] = 1e-3,
        n_steps: Annotated[int, allowed.POSITIVE_INTEGER] = 2048,
        batch_size: Annotated[int, allowed.POSITIVE_INTEGER] = 128,
        gamma: Annotated[float, allowed.UNIT_INTERVAL] = 0.99,
        cg_max_steps: Annotated[int, allowed.POSITIVE_INTEGER] = 15,
        cg_damping: Annotated[float, allowed.NON_NEGATIVE] = 0.1,
        line_search_shrinking_factor: Annotated[float, allowed.OPEN_UNIT_INTERVAL] = 0.8,
        line_search_max_iter: Annotated[int, allowed.POSITIVE_INTEGER] = 10,
        n_critic_updates: Annotated[int, allowed.POSITIVE_INTEGER] = 10,
        gae_lambda: Annotated[float, allowed.UNIT_INTERVAL] = 0.95,
        use_sde: Annotated[bool, allowed.BOOLEAN] = False,
        sde_sample_freq: Annotated[int, allowed.SAMPLE_FREQUENCY] = -1,
        rollout_buffer_class: Annotated[type[RolloutBuffer] | None, allowed.ROLLOUT_BUFFER_CLASS_OR_NONE] = None,
        rollout_buffer_kwargs: Annotated[dict[str, Any] | None, allowed.KEYWORD_ARGUMENTS_OR_NONE] = None,
        normalize_advantage: Annotated[bool, allowed.BOOLEAN] = True,
        target_kl: Annotated[float | Schedule, allowed.POSITIVE_OR_SCHEDULE] = 0.03,
        sub_sampling_factor: Annotated[int, allowed.POSITIVE_INTEGER] = 1,
        stats_window_size: Annotated[int, allowed.POSITIVE_INTEGER] = 100,
        tensorboard_log: Annotated[str | None, allowed.PATH_OR_NONE] = None,
        policy_kwargs: Annotated[dict[str, Any] | None, allowed.KEYWORD_ARGUMENTS_OR_NONE] = None,
        verbose: Annotated[int, allowed.VERBOSITY] = 0,
        seed: Annotated[int | None, allowed.SEED] = None,
        device: Annotated[th.device | str, allowed.DEVICE] = "auto",
        _init_setup_model: bool = True,
        *,
        cg_residual_tol: Annotated[float | None, optional(allowed.NON_NEGATIVE)] = None,
        cg_preconditioner: Annotated[str | None, one_of("kfac", None)] = "kfac",
        critic_method: Annotated[str, one_of("gauss_newton", "minibatch")] = "gauss_newton",
        critic_damping: Annotated[float, allowed.POSITIVE] = 0.03,
        n_critic_steps: Annotated[int, allowed.POSITIVE_INTEGER] = 1,
        max_batch_size: Annotated[int | None, allowed.POSITIVE_INTEGER_OR_NONE] = None,
        ent_coef: Annotated[float, allowed.NON_NEGATIVE] = 0.0,
        n_policy_updates: Annotated[int, allowed.POSITIVE_INTEGER] = 1,
        policy_batch_size: Annotated[int | None, allowed.POSITIVE_INTEGER_OR_NONE] = None,
        line_search_accept_ratio: Annotated[float, allowed.UNIT_INTERVAL] = 0.0,
        return_scaling: Annotated[bool, allowed.BOOLEAN] = False,
        action_bound: Annotated[str | None, one_of(*ACTION_BOUNDS, None)] = None,
        check_observations: Annotated[bool, allowed.BOOLEAN] = True,
        curvature_batch_size: Annotated[int | None, allowed.POSITIVE_INTEGER_OR_NONE] = None,
        max_state_kl: Annotated[float | None, optional(allowed.POSITIVE)] = None,
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
        self.max_state_kl = max_state_kl
        self.curvature_batch_size = curvature_batch_size
        self.return_moments = RunningMeanStd(epsilon=0.0)
        #: What the latest update did; None before the first.
        self.last_update: UpdateStats | None = None
        # Written into every zip: sb3-contrib's TRPO, which averages the KL over action dimensions, has no such mark.
        self.kl_is_joint = True

        if _init_setup_model:
            self._setup_model()
            warn_of_unused_arguments(self._unused_arguments(), self._given_arguments, self.policy_kwargs)

    argument_rules: ClassVar[dict[str, Rule]] = own_rules_of(__init__)

    def _setup_model(self) -> None:
        with checked_setup(self, {**rules_of(TRPO.__init__), **self.argument_rules}):
            self._setup_networks()

    def _setup_networks(self) -> None:
        """Make policy and buffer, after seeding all generators."""
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.adapter_class.make_policy(self)
        self.rollout_buffer = self.adapter_class.make_buffer(self)
        self._maybe_recommend_cpu()

    @property
    def adapter(self) -> PolicyAdapter:
        """What rollouts and updates ask of the policy."""
        return self.adapter_class(self.policy, self.rollout_buffer)

    def _unused_arguments(self) -> dict[str, tuple[str, ...]]:
        """Return the arguments that have no effect, by the argument that disables them."""
        return unused_arguments(self.critic_method)

    @synchronized
    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Fill the buffer by acting with the policy: see :func:`fill_buffer` for the loop.

        Callbacks find SB3's local variables, and may change the policy at any time.
        """
        check = EnvOutputCheck(env, self.num_timesteps, self.check_observations)
        with kept_statistics(env):
            if self.adapter.fits_loop(rollout_buffer):
                return fill_buffer(self, env, callback, rollout_buffer, n_rollout_steps, check)
            with checked_steps(env, check):
                return self.adapter.collect_by_sb3(self, env, callback, rollout_buffer, n_rollout_steps)

    @without_validation()
    def train(self) -> None:
        """Improve the policy inside its trust region, then fit the value function."""
        start_time = time.perf_counter()
        self.policy.set_training_mode(False)  # the mode in which the rollout was collected
        if self.critic_method == "minibatch":  # nothing else uses the optimizer
            self._update_learning_rate(self.policy.optimizer)
        adapter, statistics = self.adapter, RunningStatistics(self.policy)
        batch = adapter.read().shard(self._ranks)
        batch = normalize_advantages(batch) if self.normalize_advantage else batch
        with UpdateTransaction(self.policy, self._failed_updates, self.max_failed_updates) as update:
            surrogate = Surrogate(adapter.actor(batch), batch, self._chunk_size, self.ent_coef)  # L(θ), D̄_KL(π_old ‖ π_θ)
            point = statistics.follow_policy(adapter.distribution, surrogate, self._current_target_kl)
            minibatches = self._policy_minibatches(batch)
            for index in minibatches:
                update.steps.append(self._policy_step(surrogate, point, index, len(minibatches)))
                point = update.steps[-1].search.point
            update.restore_buffers_without_step()
            statistics.follow_critic(adapter.values, adapter.critic_batch(batch), self._chunk_size)
            update.critic = self._fit_critic(adapter, batch, surrogate.model.parameters)
        self._failed_updates = update.n_failed
        self._n_updates += 1
        self._record(update, surrogate.entropy, time.perf_counter() - start_time)
        update.raise_if_stuck()

    def _policy_step(self, surrogate: Surrogate, start: Evaluation, index: th.Tensor | None, n_steps: int) -> PolicyStep:
        """Take one natural-gradient step θ ← θ + αʲβs (Schulman et al. 2015, appendix C), one of ``n_steps`` in a pass."""
        local = surrogate.relinearize(index)  # around the current θ
        subsampled = local.subsample(self.sub_sampling_factor, self._curvature_size)
        gradient = local.gradient()  # g
        fisher = FisherOperator(subsampled, self.cg_damping)  # v ↦ (F + λI) v
        fisher.keep_definite(gradient)
        inverse = make_preconditioner(subsampled, fisher.damping) if self.cg_preconditioner else None  # v ↦ ≈ (F + λI)⁻¹ v
        stopping = default_stopping(inverse) if self.cg_residual_tol is None else {"rtol": self.cg_residual_tol}
        cg = conjugate_gradient(fisher, gradient, max_iter=self.cg_max_steps, M=inverse, **stopping)  # s ≈ (F + λI)⁻¹ g
        curvature = undamped_curvature(cg.curvature, fisher.damping, float(cg.x.dot(cg.x)))  # sᵀFs
        step_size = self._step_size(curvature, n_steps)  # β
        expected = step_size * float(gradient.dot(cg.x))
        search = self._line_search(surrogate, step_size * cg.x, start, expected)  # θ + αʲβs, or θ
        return PolicyStep(start, float(gradient.norm()), cg, step_size, expected, search)

    def _policy_minibatches(self, batch: RolloutBatch) -> list[th.Tensor | None]:
        """The sequences of the rollout that each policy step uses; None for all."""
        if self.policy_batch_size is None:
            return [None] * self.n_policy_updates
        return [index for _ in range(self.n_policy_updates) for index in batch.minibatches(self.policy_batch_size, equal=True)]

    @property
    def _current_target_kl(self) -> float:
        """δ at this point of the training."""
        return schedule_value("target_kl", self.target_kl, self._current_progress_remaining)

    @property
    def _value_scale(self) -> float:
        """Factor of the critic's outputs to give values."""
        return value_scale(self.return_moments) if self.return_scaling else 1.0

    @property
    def _chunk_size(self) -> int | None:
        """Most states in one forward pass."""
        return self.adapter_class.chunk_size(self.max_batch_size, self.observation_space)

    @property
    def _curvature_size(self) -> int | None:
        """Most states that a curvature matrix is computed from."""
        return self.adapter_class.curvature_size(self.curvature_batch_size, self.observation_space)

    def _step_size(self, curvature: float, n_steps: int) -> float:
        """Return β, so that all steps of the update together fill the trust region."""
        # Passes take similar directions, so their lengths add up; the ``n_steps`` minibatches of a pass take different ones,
        # so the squares of their lengths add up.
        return max_step_length(curvature, self._current_target_kl / (n_steps * self.n_policy_updates))

    def _line_search(self, surrogate: Surrogate, step: th.Tensor, start: Evaluation, expected: float) -> LineSearchResult:
        """Move θ by the step βs, as far as the trust region and the objective allow. Expects an improvement of βgᵀs."""
        # Alone in the region, the full step has a quadratic KL of δ.
        fills_region = start.kl == 0.0 and self.n_policy_updates == 1 and self.policy_batch_size is None
        search = search_along(
            step,
            surrogate.model.parameters,
            surrogate.evaluate,
            start,
            buffers=self.policy.buffers(),
            target_kl=self._current_target_kl,
            max_state_kl=self.max_state_kl,
            shrink=self.line_search_shrinking_factor,
            max_iter=self.line_search_max_iter,
            min_improvement=self.line_search_accept_ratio * expected,
            slope=expected,
            first=first_fraction(self._kl_ratio) if fills_region else 1.0,
        )
        if fills_region:
            self._kl_ratio = updated_kl_ratio(self._kl_ratio, search, self._current_target_kl)
        return search

    def _fit_critic(self, adapter: PolicyAdapter, batch: RolloutBatch, actor: Sequence[th.nn.Parameter]) -> CriticFit:
        """Regress the values on the returns, in the parameters that the policy does not depend on."""
        critic = adapter.critic(batch, actor, self._chunk_size)
        batch = scale_returns(critic.batch, self.return_moments) if self.return_scaling else critic.batch
        if self.critic_method == "gauss_newton":
            return fit_gauss_newton(
                critic.model,
                batch,
                self._chunk_size,
                damping=self.critic_damping,
                n_steps=self.n_critic_steps,
                # Features are not images any more: products on them are cheap.
                curvature_size=self.curvature_batch_size if critic.has_features else self._curvature_size,
            )
        return fit_minibatches(
            critic.values,
            batch,
            critic=critic.model.parameters,
            optimizer=self.policy.optimizer,
            batch_size=self.batch_size,
            n_epochs=self.n_critic_updates,
        )

    def _record(self, update: UpdateTransaction, entropy: float, seconds: float) -> None:
        """Tell the logger, and :attr:`last_update`, what the update did; ``entropy`` is that of π_old."""
        self.last_update = UpdateStats.of(update.steps, update.critic.losses, seconds)
        record_update(self.logger, self.last_update)
        record_statuses(self.logger, update)
        self._record_outcomes(update.steps)
        self.logger.record("train/explained_variance", explained_variance(self.rollout_buffer, self._ranks))
        self.logger.record("train/entropy", entropy)
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _record_outcomes(self, steps: list[PolicyStep]) -> None:
        record_line_search(self.logger, steps)
        self.logger.record("train/target_kl", self._current_target_kl)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "last_update"]

    def _loaded(self, names: set[str], keep: set[str]) -> None:
        if "kl_is_joint" not in names:
            convert_model(self, keep)
        warn_of_unused_arguments(self._unused_arguments(), keep, self.policy_kwargs)
