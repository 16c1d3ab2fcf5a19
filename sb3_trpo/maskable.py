"""Trust Region Policy Optimization for tasks where some actions are invalid at times."""

from typing import Any, ClassVar, TypeVar

import numpy as np
from gymnasium import spaces
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)
from sb3_contrib.common.maskable.utils import is_masking_supported
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_trpo.adapters.base import PolicyAdapter
from sb3_trpo.adapters.maskable import MaskableAdapter
from sb3_trpo.threads import training_threads
from sb3_trpo.trpo import TRPO

SelfMaskableTRPO = TypeVar("SelfMaskableTRPO", bound="MaskableTRPO")

MlpPolicy = MaskableActorCriticPolicy


class CnnPolicy(MaskableActorCriticCnnPolicy):
    """
    sb3-contrib's maskable CNN policy, with a features extractor each for actor and critic unless told otherwise.

    :param args: as sb3-contrib's ``MaskableActorCriticCnnPolicy``
    :param kwargs: as sb3-contrib's ``MaskableActorCriticCnnPolicy``; for ``share_features_extractor`` see
        :class:`~sb3_trpo.policies.CnnPolicy`
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("share_features_extractor", False)
        super().__init__(*args, **kwargs)


class MultiInputPolicy(MaskableMultiInputActorCriticPolicy):
    """
    sb3-contrib's maskable policy for Dict observations, with a features extractor each for actor and critic.

    :param args: as sb3-contrib's ``MaskableMultiInputActorCriticPolicy``
    :param kwargs: as sb3-contrib's ``MaskableMultiInputActorCriticPolicy``; for ``share_features_extractor`` see
        :class:`~sb3_trpo.policies.CnnPolicy`
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("share_features_extractor", False)
        super().__init__(*args, **kwargs)


class MaskableTRPO(TRPO):
    """
    TRPO with invalid actions masked, on the policies, buffers and wrappers of sb3-contrib's ``MaskablePPO``.

    The environment says which actions are valid, by a method ``action_masks()`` of its own or by sb3-contrib's
    ``ActionMasker``. The masks that an action was chosen under are part of the old and of every new distribution: invalid
    actions have no probability, and no share in KL and Fisher matrix.

    Takes the arguments of :class:`TRPO`, for Discrete, MultiDiscrete and one-dimensional MultiBinary actions.

    :param policy: policy class, or its name: ``MlpPolicy``, ``CnnPolicy``, ``MultiInputPolicy``
    :param env: as :class:`TRPO`
    :param args: as :class:`TRPO`, from ``learning_rate`` on
    :param kwargs: as :class:`TRPO`
    :raises ValueError: an argument is out of range; the message names it, its value and what is allowed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    adapter_class: ClassVar[type[PolicyAdapter]] = MaskableAdapter
    policy: MaskableActorCriticPolicy  # type: ignore[assignment]
    rollout_buffer: MaskableRolloutBuffer | MaskableDictRolloutBuffer
    #: Whether actions are masked while collecting; set by :meth:`learn`.
    use_masking = True

    @property
    def adapter(self) -> MaskableAdapter:
        """See :attr:`TRPO.adapter`."""
        return MaskableAdapter(self.policy, self.rollout_buffer, self.use_masking)

    def _setup_networks(self) -> None:
        if not isinstance(self.action_space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
            raise ValueError(
                f"the action space {self.action_space} is not allowed: it must be Discrete, MultiDiscrete or MultiBinary"
            )
        super()._setup_networks()

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
        use_masking: bool | None = None,
    ) -> bool:
        """
        Fill the buffer by acting with the policy, on valid actions only.

        :param env: as :meth:`TRPO.collect_rollouts`
        :param callback: as :meth:`TRPO.collect_rollouts`
        :param rollout_buffer: as :meth:`TRPO.collect_rollouts`
        :param n_rollout_steps: as :meth:`TRPO.collect_rollouts`
        :param use_masking: whether to mask invalid actions; None for what :meth:`learn` was told
        :return: as :meth:`TRPO.collect_rollouts`
        :raises ValueError: the environment does not say which actions are valid
        """
        if use_masking is not None:
            self.use_masking = use_masking
        if self.use_masking and not is_masking_supported(env):
            raise ValueError(
                "use_masking=True is not allowed with this environment: it must have a method action_masks, of its own or by "
                "sb3-contrib's ActionMasker"
            )
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose an action, or one for each environment; with the number of torch threads that ``learn`` uses.

        :param observation: observations
        :param state: not used; handed back
        :param episode_start: not used
        :param deterministic: the most likely action instead of a sample
        :param action_masks: which actions are valid; None for all
        :return: actions, and ``state``
        """
        with training_threads(self.policy):
            return self.policy.predict(observation, state, episode_start, deterministic, action_masks=action_masks)

    def learn(  # type: ignore[override] # the order of arguments is that of MaskablePPO
        self: SelfMaskableTRPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> SelfMaskableTRPO:
        """
        Train.

        :param total_timesteps: as :class:`TRPO`
        :param callback: as :class:`TRPO`
        :param log_interval: as :class:`TRPO`
        :param tb_log_name: as :class:`TRPO`
        :param reset_num_timesteps: as :class:`TRPO`
        :param use_masking: whether to mask invalid actions while collecting
        :param progress_bar: as :class:`TRPO`
        :return: the model
        """
        self.use_masking = use_masking
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
