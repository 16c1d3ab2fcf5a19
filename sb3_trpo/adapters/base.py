"""What rollouts and updates ask of a family of policies; one adapter class for each family."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_trpo.adapters.models import ValueFunction, actor_model, critic_model, critic_parameters, value_function
from sb3_trpo.optim.batch import Inputs, RolloutBatch
from sb3_trpo.optim.objective import Model
from sb3_trpo.policies import has_images
from sb3_trpo.rollouts.acting import ActingPolicy


class Critic(NamedTuple):
    """
    The value regression of one update.

    :param values: inputs of the batch ↦ V(s), shape ``(n_states,)``
    :param model: the same for Gauss-Newton steps, with the parameters to train
    :param batch: the rollout; its inputs are features where the critic does not train the features extractor
    :param has_features: whether they are
    """

    values: ValueFunction
    model: Model
    batch: RolloutBatch
    has_features: bool


class PolicyAdapter(ActingPolicy):
    """
    How one family of policies is built, called during a rollout, and seen by the update.

    :param policy: the policy
    :param buffer: the rollout buffer
    """

    #: States in one forward pass, and in the sample that curvature is computed from, where there are images and the user
    #: leaves them open; None for all. 256 states take some 100 MB with NatureCNN.
    image_chunk: ClassVar[int | None] = 256
    image_sample: ClassVar[int | None] = 256
    #: Class that policies of this family derive from, and the library that has it.
    policy_base: ClassVar[type[BasePolicy]]
    #: Rollout buffers for flat and for Dict observations, from which a user's own derive.
    buffer_bases: ClassVar[tuple[type[RolloutBuffer], type[RolloutBuffer]]]

    @classmethod
    def check_policy(cls, policy: type) -> None:
        """
        Check that a policy class belongs to the family.

        :param policy: the class
        :raises ValueError: it does not
        """
        if not issubclass(policy, cls.policy_base):
            raise ValueError(
                f"policy={policy.__name__} is not allowed: it must derive from sb3-contrib's {cls.policy_base.__name__}"
            )

    @classmethod
    def make_policy(cls, model: OnPolicyAlgorithm) -> Any:
        """
        Make the policy of an algorithm.

        :param model: the algorithm, without its networks
        """
        policy_class: Any = model.policy_class
        spaces_of_env = (model.observation_space, model.action_space)
        own = cls.policy_arguments(model.use_sde)
        return policy_class(*spaces_of_env, model.lr_schedule, **own, **model.policy_kwargs).to(model.device)

    @staticmethod
    def policy_arguments(use_sde: bool) -> dict[str, Any]:
        """
        Return the arguments that policies of this family take, beside the spaces and the learning rate.

        :param use_sde: whether gSDE is used
        """
        return {"use_sde": use_sde}

    @classmethod
    def make_buffer(cls, model: OnPolicyAlgorithm) -> Any:
        """
        Make the rollout buffer of an algorithm.

        :param model: the algorithm, with its policy
        :raises ValueError: the user's class of buffers does not derive from the usual one
        """
        buffer_class: Any = cls.find_buffer_class(model.rollout_buffer_class, model.observation_space)
        return buffer_class(
            model.n_steps,
            model.observation_space,
            model.action_space,
            *cls.buffer_arguments(model.policy, model.n_steps, model.n_envs),
            device=model.device,
            gamma=model.gamma,
            gae_lambda=model.gae_lambda,
            n_envs=model.n_envs,
            **model.rollout_buffer_kwargs,
        )

    @classmethod
    def find_buffer_class(cls, given: type[RolloutBuffer] | None, observation_space: spaces.Space[Any]) -> type[RolloutBuffer]:
        """
        Return the class of the rollout buffer.

        :param given: the user's, or None
        :param observation_space: the environment's observation space
        :raises ValueError: the user's class does not derive from the usual one
        """
        usual = cls.buffer_bases[isinstance(observation_space, spaces.Dict)]
        if given is not None and not issubclass(given, usual):
            raise ValueError(
                f"rollout_buffer_class={given.__name__} is not allowed: it must derive from sb3-contrib's {usual.__name__}"
            )
        return given or usual

    @staticmethod
    def buffer_arguments(policy: Any, n_steps: int, n_envs: int) -> tuple[Any, ...]:
        """
        Return the arguments that buffers of this family take after the spaces.

        :param policy: the policy
        :param n_steps: steps of each environment in a rollout
        :param n_envs: number of environments
        """
        return ()

    @classmethod
    def chunk_size(cls, given: int | None, observation_space: spaces.Space[Any]) -> int | None:
        """
        Return the most states in one forward pass; None for all.

        :param given: the user's choice, or None
        :param observation_space: the environment's observation space
        """
        return cls.image_chunk if given is None and has_images(observation_space) else given

    @classmethod
    def curvature_size(cls, given: int | None, observation_space: spaces.Space[Any]) -> int | None:
        """
        Return the most states that a curvature matrix is computed from; None for all.

        :param given: the user's choice, or None
        :param observation_space: the environment's observation space
        """
        return cls.image_sample if given is None and has_images(observation_space) else given

    @abstractmethod
    def collect_by_sb3(
        self, model: Any, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_steps: int
    ) -> bool:
        """
        Collect a rollout by the loop of SB3's or sb3-contrib's own algorithm for this family.

        :param model: the algorithm
        :param env: the training environment
        :param callback: called at every step, and at the rollout's start and end
        :param rollout_buffer: buffer to fill
        :param n_steps: steps to take in each environment
        :return: False if the callback stopped the training
        """

    def evaluate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """
        Evaluate states and actions.

        :param batch: some or all states of :meth:`read`
        :return: values and log-probabilities, one for each state
        """
        return self.values(self.critic_batch(batch).inputs), self.distribution(batch.inputs).log_prob(batch.actions)

    @abstractmethod
    def distribution(self, inputs: Inputs) -> Distribution:
        """
        Return π(·|s).

        :param inputs: inputs of a batch of :meth:`read`
        """

    def values(self, inputs: Inputs) -> th.Tensor:
        """
        Return V(s), shape ``(n_states,)``.

        :param inputs: inputs of a batch of :meth:`critic_batch`
        """
        return self.policy.predict_values(inputs).flatten()

    def critic_batch(self, batch: RolloutBatch) -> RolloutBatch:
        """
        Return the rollout with the inputs that the critic takes.

        :param batch: a batch of :meth:`read`
        """
        return batch

    def actor(self, batch: RolloutBatch) -> Model:
        """
        Return the policy as a function of θ.

        :param batch: the rollout
        """
        return actor_model(self.policy, self.distribution, batch.select(slice(1)).inputs)

    def critic(self, batch: RolloutBatch, actor: Sequence[nn.Parameter], chunk_size: int | None) -> Critic:
        """
        Return the value function as a function of the parameters that the policy does not depend on.

        :param batch: the rollout
        :param actor: θ
        :param chunk_size: most states in one forward pass; None for all
        """
        batch = self.critic_batch(batch)
        parameters = critic_parameters(self.policy, self.values, batch.select(slice(1)).inputs, actor)
        encode, values = value_function(self.policy, self.values, parameters)
        if encode is not None:
            batch = batch.encoded(encode, chunk_size)
        return Critic(values, critic_model(self.policy, values, parameters), batch, encode is not None)
