"""Trust Region Policy Optimization as a Stable-Baselines3 algorithm."""

import warnings
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo.acting import Observations, action_transform, make_actor
from sb3_trpo.archive import Attributes
from sb3_trpo.checkpoint import SavedAlgorithm
from sb3_trpo.collect import Truncation, can_defer, complete_buffer, find_truncations, write_step
from sb3_trpo.conjugate_gradient import Solution, conjugate_gradient
from sb3_trpo.critic import CriticFit, fit_gauss_newton, fit_minibatches
from sb3_trpo.distributions import without_validation
from sb3_trpo.fisher import FisherOperator
from sb3_trpo.guards import StepGuard, UpdateGuard, checked_steps, keeps_statistics
from sb3_trpo.line_search import Outcome, Point, Search, backtracking_line_search, max_step_length, undamped_curvature
from sb3_trpo.mlp import actor_chain, critic_chain
from sb3_trpo.parameters import Snapshot, assign, flatten
from sb3_trpo.policies import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    actor_parameters,
    critic_parameters,
    has_images,
    value_function,
)
from sb3_trpo.preconditioner import KroneckerPreconditioner, factored_layers
from sb3_trpo.rollout import Inputs, Rollout, normalize_advantages, read_rollout
from sb3_trpo.stepping import make_stepper
from sb3_trpo.surrogate import Surrogate
from sb3_trpo.validation import (
    BOOLEAN,
    NON_NEGATIVE,
    NON_NEGATIVE_OR_SCHEDULE,
    OPEN_UNIT_INTERVAL,
    POSITIVE,
    POSITIVE_INTEGER,
    POSITIVE_INTEGER_OR_NONE,
    POSITIVE_OR_SCHEDULE,
    SAMPLE_FREQUENCY,
    UNIT_INTERVAL,
    Rule,
    check_arguments,
    one_of,
)

IMAGE_CHUNK = 256  # states in one forward pass where max_batch_size leaves it open: some 100 MB with NatureCNN

SelfTRPO = TypeVar("SelfTRPO", bound="TRPO")


class TRPO(SavedAlgorithm):
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
    :param cg_damping: λ, added to the diagonal of the Fisher matrix; 0 for none
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
    :param critic_cg_max_steps: bound on conjugate gradient iterations in each Gauss-Newton step
    :param max_batch_size: most states in one forward pass of the update, to bound its memory; results stay the same.
        None for all states at once, or 256 with images
    :raises ValueError: an argument is out of range; the message names it, its value and what is allowed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    argument_rules: ClassVar[dict[str, Rule]] = {
        "learning_rate": NON_NEGATIVE_OR_SCHEDULE,
        "n_steps": POSITIVE_INTEGER,
        "batch_size": POSITIVE_INTEGER,
        "gamma": UNIT_INTERVAL,
        "cg_max_steps": POSITIVE_INTEGER,
        "cg_damping": NON_NEGATIVE,
        "line_search_shrinking_factor": OPEN_UNIT_INTERVAL,
        "line_search_max_iter": POSITIVE_INTEGER,
        "n_critic_updates": POSITIVE_INTEGER,
        "gae_lambda": UNIT_INTERVAL,
        "use_sde": BOOLEAN,
        "sde_sample_freq": SAMPLE_FREQUENCY,
        "normalize_advantage": BOOLEAN,
        "target_kl": POSITIVE_OR_SCHEDULE,
        "sub_sampling_factor": POSITIVE_INTEGER,
        "cg_residual_tol": NON_NEGATIVE,
        "cg_preconditioner": one_of("kfac", None),
        "critic_method": one_of("gauss_newton", "minibatch"),
        "critic_damping": POSITIVE,
        "n_critic_steps": POSITIVE_INTEGER,
        "critic_cg_max_steps": POSITIVE_INTEGER,
        "max_batch_size": POSITIVE_INTEGER_OR_NONE,
    }

    #: Training ends with an error after so many updates in a row that came to a NaN or an infinity, and were undone.
    max_failed_updates: int = 10
    _failed_updates: int = 0

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | Schedule = 0.05,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        cg_residual_tol: float = 0.1,
        cg_preconditioner: str | None = "kfac",
        critic_method: str = "gauss_newton",
        critic_damping: float = 0.1,
        n_critic_steps: int = 2,
        critic_cg_max_steps: int = 8,
        max_batch_size: int | None = None,
    ) -> None:
        check_arguments(self.argument_rules, locals())
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate if callable(learning_rate) else float(learning_rate),
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=0.0,
            vf_coef=0.0,
            max_grad_norm=0.0,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.batch_size = batch_size
        self.cg_max_steps = cg_max_steps
        self.cg_damping = float(cg_damping)
        self.line_search_shrinking_factor = line_search_shrinking_factor
        self.line_search_max_iter = line_search_max_iter
        self.n_critic_updates = n_critic_updates
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        self.sub_sampling_factor = sub_sampling_factor
        self.cg_residual_tol = cg_residual_tol
        self.cg_preconditioner = cg_preconditioner
        self.critic_method = critic_method
        self.critic_damping = float(critic_damping)
        self.n_critic_steps = n_critic_steps
        self.critic_cg_max_steps = critic_cg_max_steps
        self.max_batch_size = max_batch_size
        # Written into every zip: sb3-contrib's TRPO, which averages the KL over action dimensions, has no such mark.
        self.kl_is_joint = True

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        check_arguments(self.argument_rules, vars(self))
        self._check_rollout_size()
        for method in ("get_distribution", "predict_values"):
            if not hasattr(self.policy_class, method):
                raise ValueError(
                    f"policy={self.policy_class.__name__} is not allowed: it must be an actor-critic policy "
                    f"with the methods get_distribution and predict_values, and it has no {method}"
                )
        super()._setup_model()
        self._set_target_kl_schedule()

    def _set_target_kl_schedule(self) -> None:
        self._target_kl_schedule = FloatSchedule(self.target_kl if callable(self.target_kl) else float(self.target_kl))

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may go beyond the total, and a schedule that ends at 0 must not go below it.
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _check_rollout_size(self) -> None:
        n_states = self.n_steps * self.n_envs
        words = f"n_steps={self.n_steps} * n_envs={self.n_envs} = {n_states} states"
        if self.normalize_advantage and n_states < 2:
            raise ValueError(f"a rollout of {words} is not allowed with normalize_advantage=True: it must have at least 2")
        if self.sub_sampling_factor > n_states:
            raise ValueError(
                f"sub_sampling_factor={self.sub_sampling_factor} is not allowed: it must be at most the rollout's {words}"
            )
        if n_states % self.batch_size > 0:
            warnings.warn(
                f"batch_size={self.batch_size} does not divide the rollout's {words}: "
                f"the last minibatch of each pass has {n_states % self.batch_size}",
                stacklevel=3,
            )

    @keeps_statistics
    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Fill the buffer by acting with the policy.

        Callbacks find SB3's local variables, but for ``obs_tensor``, ``values`` and ``log_probs``: those are computed for
        the whole rollout at its end, where ``values`` (of the last observations) is there in ``on_rollout_end``. A
        callback may change the policy in ``on_rollout_start``, not in ``on_step``.

        :param env: the training environment
        :param callback: called at every step, and at the rollout's start and end
        :param rollout_buffer: buffer to fill
        :param n_rollout_steps: steps to take in each environment
        :return: False if the callback stopped the training
        """
        check = StepGuard(env, self.num_timesteps)
        if not can_defer(self.policy, rollout_buffer):
            with checked_steps(env, check):
                return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        self.policy.set_training_mode(False)
        rollout_buffer.reset()
        truncations: list[Truncation] = []
        callback.on_rollout_start()
        act = make_actor(self.policy, n_rollout_steps, env.num_envs, self.sde_sample_freq)
        to_env = action_transform(self.policy)
        step = make_stepper(env)

        n_steps = 0
        while n_steps < n_rollout_steps:
            obs: Observations = self._last_obs  # type: ignore[assignment]
            starts: np.ndarray = self._last_episode_starts  # type: ignore[assignment]
            actions = act(obs, n_steps)
            clipped_actions = to_env(actions)
            new_obs, rewards, dones, infos = step(clipped_actions)
            check(new_obs, rewards)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False

            self._update_info_buffer(infos, dones)
            if dones.any():
                truncations += find_truncations(n_steps, dones, infos)
            write_step(rollout_buffer, n_steps, obs, actions, rewards, starts)
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
            n_steps += 1

        check.check_truncations(truncations)
        last_obs: Observations = new_obs  # type: ignore[assignment]
        values = complete_buffer(rollout_buffer, self.policy, truncations, last_obs, dones, self._chunk_size)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    @without_validation()
    def train(self) -> None:
        """One trust-region step of the policy, then the regression of the critic, on the rollout in the buffer."""
        # One mode from start to end (dropout off, batch-norm statistics fixed): the one the rollout was collected in.
        self.policy.set_training_mode(False)
        self._update_learning_rate(self.policy.optimizer)
        buffers, guard = Snapshot(self.policy.buffers()), UpdateGuard(self.policy)
        target_kl = self._target_kl_schedule(self._current_progress_remaining)  # δ
        rollout = read_rollout(self.rollout_buffer, self.action_space)
        if self.normalize_advantage:
            rollout = normalize_advantages(rollout)
        actor = actor_parameters(self.policy, self._distribution, rollout.select(slice(1)).inputs)  # θ
        layers = factored_layers(self.policy, actor)

        surrogate = Surrogate(self._distribution, rollout.chunks(self._chunk_size), layers)  # L(θ), D̄_KL(θ_old, θ)
        gradient = surrogate.gradient(actor)  # g
        curved = self._thinned(surrogate, rollout, layers)
        fisher = FisherOperator(curved, actor, self.cg_damping, actor_chain(self.policy))  # v ↦ (F + λI) v
        inverse = self._preconditioner(curved, layers, actor)  # ≈ v ↦ (F + λI)⁻¹ v
        solution = conjugate_gradient(
            fisher, gradient, max_iter=self.cg_max_steps, rtol=self.cg_residual_tol, M=inverse
        )  # s ≈ (F + λI)⁻¹ g
        curvature = undamped_curvature(solution.curvature, self.cg_damping, float(solution.x.dot(solution.x)))  # sᵀFs
        step_length = max_step_length(curvature, target_kl)  # β
        step = step_length * solution.x
        search = self._search(surrogate, actor, step, target_kl)  # θ_old + αʲβs, or θ_old
        if search.outcome is not Outcome.ACCEPTED:
            buffers.restore()
        critic = self._fit_critic(rollout, actor)

        self._failed_updates = guard.count(self._failed_updates, gradient, solution, search, critic)
        self._n_updates += 1
        self._record(surrogate, gradient, solution, step_length, search, critic)
        guard.stop_after(self._failed_updates, self.max_failed_updates)

    @property
    def _chunk_size(self) -> int | None:
        """Most states in one forward pass."""
        if self.max_batch_size is not None or not has_images(self.observation_space):
            return self.max_batch_size
        return IMAGE_CHUNK

    def _distribution(self, inputs: Inputs) -> Distribution:
        return self.policy.get_distribution(inputs)

    def _values(self, inputs: Inputs) -> th.Tensor:
        return self.policy.predict_values(inputs).flatten()

    def _thinned(self, surrogate: Surrogate, rollout: Rollout, layers: list[nn.Module]) -> Surrogate:
        if self.sub_sampling_factor == 1:
            return surrogate
        return Surrogate(self._distribution, rollout.thin(self.sub_sampling_factor).chunks(self._chunk_size), layers)

    def _preconditioner(
        self, surrogate: Surrogate, layers: list[nn.Module], actor: list[nn.Parameter]
    ) -> KroneckerPreconditioner | None:
        if self.cg_preconditioner is None or not surrogate.has_closed_form:
            return None
        return KroneckerPreconditioner(surrogate, layers, actor, self.cg_damping)

    def _search(self, surrogate: Surrogate, actor: list[nn.Parameter], step: th.Tensor, target_kl: float) -> Search:
        """
        Move θ along the step as far as the trust region and the objective allow, or leave everything as it was.

        :param surrogate: L(θ) and D̄_KL(θ_old, θ)
        :param actor: θ
        :param step: βs, the longest step
        :param target_kl: δ
        :return: what was done
        """
        start = surrogate.start()
        if not (bool(th.isfinite(step).all()) and bool(step.any())):
            return Search(Outcome.SKIPPED, 0.0, 0, start)
        before = Snapshot(actor)
        theta_old = flatten(actor).detach()

        def evaluate(fraction: float) -> Point:
            assign(actor, theta_old + fraction * step)
            return surrogate.evaluate()

        search = backtracking_line_search(
            evaluate,
            start,
            target_kl=target_kl,
            shrink=self.line_search_shrinking_factor,
            max_iter=self.line_search_max_iter,
        )
        if search.outcome is Outcome.REJECTED:
            before.restore()
        return search

    def _fit_critic(self, rollout: Rollout, actor: list[nn.Parameter]) -> CriticFit:
        """
        Regress the values on the returns, in the parameters that the policy does not depend on.

        :param rollout: the rollout
        :param actor: θ, not to be touched
        :return: what the regression did
        """
        critic = critic_parameters(self.policy, self._values, rollout.select(slice(1)).inputs, actor)
        encode, head = value_function(self.policy, critic)
        if encode is not None:
            rollout = rollout.encoded(encode, self._chunk_size)
        if self.critic_method == "gauss_newton":
            return fit_gauss_newton(
                head,
                rollout.chunks(self._chunk_size),
                critic=critic,
                layers=factored_layers(self.policy, critic),
                chain=critic_chain(self.policy),
                damping=self.critic_damping,
                n_steps=self.n_critic_steps,
                cg_max_steps=self.critic_cg_max_steps,
                cg_residual_tol=self.cg_residual_tol,
            )
        return fit_minibatches(
            head,
            rollout.inputs,
            rollout.returns,
            critic=critic,
            optimizer=self.policy.optimizer,
            batch_size=self.batch_size,
            n_epochs=self.n_critic_updates,
        )

    def _record(
        self,
        surrogate: Surrogate,
        gradient: th.Tensor,
        solution: Solution,
        step_length: float,
        search: Search,
        critic: CriticFit,
    ) -> None:
        buffer = self.rollout_buffer
        step_length *= search.fraction
        record = self.logger.record
        record("train/policy_objective", search.point.objective)
        record("train/kl_divergence_loss", search.point.kl)
        record("train/value_loss", critic.value_loss)
        record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        record("train/is_line_search_success", float(search.outcome is Outcome.ACCEPTED))
        record("train/line_search", search.outcome.value, exclude="tensorboard")
        record("train/backtracks", search.backtracks)
        record("train/step_length", step_length)
        record("train/expected_improvement", step_length * float(gradient.dot(solution.x)))
        record("train/actual_improvement", search.point.objective - surrogate.start().objective)
        record("train/gradient_norm", float(gradient.norm()))
        record("train/cg_iterations", solution.iterations)
        record("train/cg_residual", solution.residual)
        record("train/cg_status", solution.status.value, exclude="tensorboard")
        record("train/is_critic_fit_success", float(critic.succeeded))
        record("train/failed_updates", self._failed_updates)
        record("train/entropy", surrogate.entropy)
        record("train/target_kl", self._target_kl_schedule(self._current_progress_remaining))
        if hasattr(self.policy, "log_std"):
            record("train/std", th.exp(self.policy.log_std).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "TRPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfTRPO:
        """
        Train.

        :param total_timesteps: environment steps to collect, over all environments; rollouts are always completed
        :param callback: SB3 callback, or a list of them
        :param log_interval: updates between two writes of the log
        :param tb_log_name: name of the run in TensorBoard
        :param reset_num_timesteps: start counting at 0; False to continue an earlier call
        :param progress_bar: show a progress bar (tqdm and rich)
        :return: the model
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _loaded(self, attributes: Attributes, keep: set[str]) -> None:
        if "kl_is_joint" not in attributes.names:
            self._convert_kl(keep)

    def _convert_kl(self, keep: set[str]) -> None:
        """Make arguments that refer to a KL averaged over action dimensions refer to the joint KL."""
        averaged = isinstance(self.action_space, (spaces.Box, spaces.MultiBinary))
        dimensions = get_action_dim(self.action_space) if averaged else 1
        names = [name for name in ("target_kl", "cg_damping") if name not in keep]
        changes = [f"{name}={getattr(self, name)} -> {getattr(self, name) * dimensions}" for name in names]
        for name in names:
            setattr(self, name, getattr(self, name) * dimensions)
        self._set_target_kl_schedule()
        warnings.warn(
            "the file is from sb3-contrib, whose KL is averaged over action dimensions; "
            f"converted to the joint KL of {dimensions} dimension(s): {', '.join(changes) or 'nothing to change'}",
            stacklevel=4,
        )
