"""
Does the trust region hold? The first updates on two MuJoCo tasks, ours and sb3-contrib's, at the same target_kl.

    python benchmarks/trust_region.py

The logged KL stands beside the joint KL computed here by hand: copies of the policy before and after the update, the
closed form for diagonal Gaussians in float64, summed over action dimensions, averaged over the states of the rollout.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import sb3_contrib
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

import sb3_trpo

ENVS = ("Humanoid-v5", "HalfCheetah-v5")
ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"sb3_trpo": sb3_trpo.TRPO, "sb3_contrib": sb3_contrib.TRPO}
TARGET_KL = 0.01
N_ENVS, N_STEPS, N_UPDATES = 2, 1024, 4


def gaussian(policy: ActorCriticPolicy, states: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Means, shape (n_states, d), and standard deviations, shape (d,), of the MLP policy's actions in float64."""
    policy = copy.deepcopy(policy).double()
    return policy.action_net(policy.mlp_extractor.forward_actor(states)), policy.log_std.exp()


@th.no_grad()
def joint_kl(p: ActorCriticPolicy, q: ActorCriticPolicy, states: th.Tensor) -> float:
    """Mean over states of KL(p‖q) = Σ_d log(σ_q/σ_p) + (σ_p² + (μ_p − μ_q)²) / (2σ_q²) − ½."""
    (mean_p, std_p), (mean_q, std_q) = gaussian(p, states), gaussian(q, states)
    per_dimension = (std_q / std_p).log() + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5
    return float(per_dimension.sum(dim=1).mean())


def first_updates(env_id: str, name: str, seed: int) -> list[dict[str, Any]]:
    """Train for a few updates, and return what each logged and did."""
    updates: list[dict[str, Any]] = []

    class Watched(ALGORITHMS[name]):  # type: ignore[misc]
        def train(self) -> None:
            before = copy.deepcopy(self.policy)
            # As the policy sees them: flat, and rounded to float32. Their order does not matter to a mean.
            states = th.as_tensor(self.rollout_buffer.observations).float().reshape(N_STEPS * N_ENVS, -1).double()
            super().train()
            updates.append(
                {
                    "env": env_id,
                    "algorithm": name,
                    "seed": seed,
                    "update": len(updates) + 1,
                    "logged_kl": float(self.logger.name_to_value["train/kl_divergence_loss"]),
                    "joint_kl": joint_kl(before, self.policy, states),
                    "reverse_joint_kl": joint_kl(self.policy, before, states),
                    "action_dimensions": self.action_space.shape[0],
                }
            )

    env = make_vec_env(env_id, N_ENVS, seed=seed)
    model = Watched("MlpPolicy", env, n_steps=N_STEPS, target_kl=TARGET_KL, seed=seed, device="cpu")
    model.learn(N_UPDATES * N_ENVS * N_STEPS)
    env.close()
    return updates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "trust_region.json")
    args = parser.parse_args()
    th.set_num_threads(1)

    print(f"target_kl = {TARGET_KL}")
    print(f"{'task':16}{'algorithm':14}{'update':>6}{'logged KL':>12}{'joint KL':>12}{'joint / target':>16}")
    updates = []
    for env_id in ENVS:
        for name in ALGORITHMS:
            for row in first_updates(env_id, name, args.seed):
                updates.append(row)
                numbers = f"{row['logged_kl']:12.6f}{row['joint_kl']:12.6f}{row['joint_kl'] / TARGET_KL:16.4f}"
                print(f"{env_id:16}{name:14}{row['update']:6}{numbers}", flush=True)
    for name in ALGORITHMS:
        largest = max(row["joint_kl"] for row in updates if row["algorithm"] == name)
        print(f"largest joint KL of {name}: {largest!r}")

    settings = {"target_kl": TARGET_KL, "n_envs": N_ENVS, "n_steps": N_STEPS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"settings": settings, "updates": updates}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
