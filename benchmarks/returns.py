"""
What the settings return: our TRPO in many cells, beside sb3-contrib's TRPO, SB3's PPO and Tianshou's TRPO.

    python benchmarks/returns.py --cells default --envs Hopper-v5 --seeds 0 1 2 --steps 1000000 --jobs 2

A cell is a set of constructor arguments, the same for every task, or a file of hyperparameters with an entry a task. Seeds
from 100 on were used for choosing, 0 to 9 for reporting. Each run adds a row to results/returns.csv, and its evaluations (the
deterministic policy, 10 episodes, observations normalized as in training) to results/returns_curves.csv.
"""

import argparse
import itertools
import runpy
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import stable_baselines3
import study
import torch as th
import yaml
from rl_zoo3.utils import get_callback_list
from sb3_contrib import TRPO as ContribTRPO
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization
from study import Evaluations, Run
from torch import nn

from sb3_trpo import TRPO, PolicyAverage

HERE = Path(__file__).parent
OURS = HERE.parent / "zoo_hyperparams"
RL_ZOO = Path(stable_baselines3.__file__).parents[1] / "rl_zoo3" / "hyperparams"

Cell = dict[str, Any]


def ours(n_envs: int, n_steps: int, target_kl: float | str, log_std_init: float = -0.5, **kwargs: Any) -> Cell:
    """Make a cell that is the same for every task."""
    policy_kwargs = {"log_std_init": log_std_init, **kwargs.pop("policy_kwargs", {})}
    return {
        "n_envs": n_envs,
        "normalize": True,
        "n_steps": n_steps,
        "target_kl": target_kl,
        "policy_kwargs": policy_kwargs,
        **kwargs,
    }


#: As in RL Zoo's files.
AVERAGE = {"sb3_trpo.averaging.PolicyAverage": {"decay": 0.9}}
RAW_OBSERVATIONS = {"norm_obs": False}
#: Rollout shape, δ, first log-std; and one thing changed at a time.
CELLS: dict[str, Cell] = {
    "default": {"normalize": True},  # one environment
    "8x256_kl.03": ours(8, 256, 0.03),
    "8x256_kl.02": ours(8, 256, 0.02),
    "8x256_kl.05": ours(8, 256, 0.05),
    "8x256_kl.03_std0": ours(8, 256, 0.03, log_std_init=0.0),
    "8x256_kl.03_std-1": ours(8, 256, 0.03, log_std_init=-1.0),
    "8x256_kl.03_std-1.5": ours(8, 256, 0.03, log_std_init=-1.5),
    "8x256_kl.03_std-2": ours(8, 256, 0.03, log_std_init=-2.0),
    "8x128_kl.02_std-1": ours(8, 128, 0.02, log_std_init=-1.0),
    "8x128_kl.02_std-2": ours(8, 128, 0.02, log_std_init=-2.0),
    "8x128_kl.02": ours(8, 128, 0.02),
    "8x128_kl.01": ours(8, 128, 0.01),
    "8x128_kl.03": ours(8, 128, 0.03),
    "8x64_kl.01": ours(8, 64, 0.01),
    "16x64_kl.0125": ours(16, 64, 0.0125),
    "16x64_kl.0125_max.2": ours(16, 64, 0.0125, max_state_kl=0.2),
    "2x512_kl.02": ours(2, 512, 0.02),
    "1x1024_kl.02": ours(1, 1024, 0.02),
    "2x1024_kl.03": ours(2, 1024, 0.03),
    "1x2048_kl.03_std-.5": ours(1, 2048, 0.03),
    "1x2048_kl.03_std-1": ours(1, 2048, 0.03, log_std_init=-1.0),
    "1x2048_kl.05_std0": ours(1, 2048, 0.05, log_std_init=0.0),
    "8x128_lin.04": ours(8, 128, "lin_0.04"),
    "8x2048_kl.03": ours(8, 2048, 0.03),
    "8x256_lin.06": ours(8, 256, "lin_0.06"),
    "8x256_kl.03_gae.9": ours(8, 256, 0.03, gae_lambda=0.9),
    "8x256_kl.03_gae.97": ours(8, 256, 0.03, gae_lambda=0.97),
    "8x256_kl.03_gamma.98_gae.9": ours(8, 256, 0.03, gamma=0.98, gae_lambda=0.9),
    "8x256_kl.03_damping.03": ours(8, 256, 0.03, cg_damping=0.03),
    "8x256_kl.03_damping.3": ours(8, 256, 0.03, cg_damping=0.3),
    "8x256_kl.03_critic.1x2": ours(8, 256, 0.03, critic_damping=0.1, n_critic_steps=2),
    "8x256_kl.03_critic.01": ours(8, 256, 0.03, critic_damping=0.01),
    "8x256_kl.03_vf128": ours(8, 256, 0.03, policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [128, 128]}}),
    "8x256_kl.03_vf256": ours(8, 256, 0.03, policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [256, 256]}}),
    "8x256_kl.03_gamma.95_gae.9": ours(8, 256, 0.03, gamma=0.95, gae_lambda=0.9),
    "8x256_kl.03_gamma.999_gae.98": ours(8, 256, 0.03, gamma=0.999, gae_lambda=0.98),
    "8x256_kl.03_gamma.9999": ours(8, 256, 0.03, gamma=0.9999),
    "8x256_kl.03_gamma.9999_gae.99": ours(8, 256, 0.03, gamma=0.9999, gae_lambda=0.99),
    "2x1024_kl.03_gamma.9999": ours(2, 1024, 0.03, gamma=0.9999),
    "8x256_kl.005": ours(8, 256, 0.005),
    # Observations as they are, rewards normalized.
    "8x256_kl.03_raw": ours(8, 256, 0.03, normalize=RAW_OBSERVATIONS),
    "8x256_kl.01_raw": ours(8, 256, 0.01, normalize=RAW_OBSERVATIONS),
    "8x256_kl.005_raw": ours(8, 256, 0.005, normalize=RAW_OBSERVATIONS),
    "8x256_kl.03_raw_max.2": ours(8, 256, 0.03, normalize=RAW_OBSERVATIONS, max_state_kl=0.2),
    "8x256_kl.03_max.2": ours(8, 256, 0.03, max_state_kl=0.2),
    "8x256_kl.03_average": ours(8, 256, 0.03, callback=AVERAGE),
    "8x256_lin.03_raw": ours(8, 256, "lin_0.03", normalize=RAW_OBSERVATIONS),
}
#: Cells with an entry for each task: class, file of hyperparameters.
FILES: dict[str, tuple[type[BaseAlgorithm], Path]] = {
    "tuned": (TRPO, OURS / "trpo.yml"),
    "sb3_contrib": (ContribTRPO, RL_ZOO / "trpo.yml"),
    "ppo": (PPO, RL_ZOO / "ppo.yml"),
}
TIANSHOU = "tianshou"
#: The better published TRPO at 1M steps: Tianshou's (mean of maxima, 10 seeds) or sb3-contrib's (RL Zoo, 3 seeds). Reacher's
#: returns are negative, so a ratio says nothing there.
PUBLISHED = {
    "Ant-v5": 3554,
    "HalfCheetah-v5": 4471,
    "Hopper-v5": 3372,
    "Walker2d-v5": 4502,
    "Swimmer-v5": 359,
    "Humanoid-v5": 810,
    "InvertedPendulum-v5": 1000,
    "InvertedDoublePendulum-v5": 8435,
}


def entry_of(path: Path, env_id: str) -> Cell:
    """Read the hyperparameters of a task, or of another version of it (``-v4`` for ``-v5``)."""
    entries: dict[str, Cell] = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = env_id.rpartition("-v")[0]
    others = (entry for other, entry in entries.items() if other.rpartition("-v")[0] == name)
    return dict(entries.get(env_id) or next(others, entries["default"]))


def decode(value: Any, key: str) -> Any:
    """Read RL Zoo's ``lin_0.1`` and its Python expressions."""
    if key in ("policy_kwargs", "normalize", "normalize_kwargs") and isinstance(value, str):
        return eval(value, {"nn": nn, "dict": dict})
    if isinstance(value, str) and value.startswith("lin_"):
        return LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0)
    return value


def settings_of(run: Run, more_cells: dict[str, Any]) -> tuple[type[BaseAlgorithm], Cell]:
    """Return the class and the settings of a run."""
    if run.cell in FILES:
        algorithm, path = FILES[run.cell]
        cell = entry_of(path, run.env)
    else:
        cell = dict((CELLS | more_cells)[run.cell])
        cell.update(cell.pop("per_env", {}).get(run.env, {}))
        algorithm = cell.pop("algorithm", TRPO)
    return algorithm, {key: decode(value, key) for key, value in cell.items()}


class Evaluation(BaseCallback):
    """Evaluates the deterministic policy between updates, once it is due; its average, if there is one."""

    def __init__(self, evaluations: Evaluations, env: VecEnv, average: PolicyAverage | None = None) -> None:
        super().__init__()
        self.evaluations, self.env, self.average = evaluations, env, average

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.evaluations.due(self.num_timesteps):
            with self.average.in_place() if self.average else nullcontext():
                self.evaluate()

    def _on_training_end(self) -> None:
        self.evaluate()

    def evaluate(self) -> None:
        self.evaluations.add(self.num_timesteps, self._returns)

    def _returns(self) -> list[float]:
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.env)
        returns, _ = evaluate_policy(self.model, self.env, study.N_EVAL_EPISODES, return_episode_rewards=True, warn=False)
        assert isinstance(returns, list)
        return returns


def train(run: Run, cells_from: Path | None = None, agents: Path | None = None) -> Evaluations:
    """Train one agent."""
    th.set_num_threads(1)
    if run.cell == TIANSHOU:
        return train_tianshou(run)
    algorithm, settings = settings_of(run, runpy.run_path(str(cells_from))["CELLS"] if cells_from else {})
    for name in ("n_timesteps", "normalize_kwargs", "env_wrapper"):
        settings.pop(name, None)
    normalize = settings.pop("normalize", False)
    options = normalize if isinstance(normalize, dict) else {}
    callbacks = get_callback_list({"callback": settings.pop("callback", None)})
    env: VecEnv = make_vec_env(run.env, settings.pop("n_envs", 1), seed=run.seed)
    eval_env: VecEnv = make_vec_env(run.env, study.N_EVAL_EPISODES, seed=run.seed + 1_000)
    if normalize:
        env = VecNormalize(env, **{"gamma": settings.get("gamma", 0.99), **options})
        eval_env = VecNormalize(eval_env, **{**options, "training": False, "norm_reward": False})
    model = algorithm(settings.pop("policy", "MlpPolicy"), env, seed=run.seed, device="cpu", **settings)
    evaluations = Evaluations(run)
    average = next((each for each in callbacks if isinstance(each, PolicyAverage)), None)
    model.learn(run.steps, callback=CallbackList([*callbacks, Evaluation(evaluations, eval_env, average)]))
    if agents is not None:
        folder = agents / f"{run.cell}_{run.env}_{run.seed}"
        model.save(folder / "model")
        if isinstance(env, VecNormalize):
            env.save(str(folder / "vecnormalize.pkl"))
    return evaluations


def train_tianshou(run: Run) -> Evaluations:
    """Train Tianshou's TRPO at the settings of its example for MuJoCo."""
    from sb3_trpo.zoo import tianshou_peer

    evaluations = Evaluations(run)

    def after_update(steps: int, evaluate: Any) -> None:
        if evaluations.due(steps) or steps >= run.steps:
            evaluations.add(steps, evaluate)

    tianshou_peer.train(run.env, run.seed, run.steps, study.N_EVAL_EPISODES, after_update)
    return evaluations


def print_table(out: Path, cells: list[str], steps: int, seeds: list[int]) -> None:
    """Print what the finished runs of so many steps say."""
    rows, curves = pd.read_csv(out), pd.read_csv(study.curves_path(out))
    rows = rows[(rows.steps == steps) & rows.seed.isin(seeds) & rows.cell.isin(cells)]
    curves = curves[(curves.steps == steps) & curves.seed.isin(seeds)]
    peers = rows[rows.cell == "sb3_contrib"].groupby("env").final_return.mean()

    print(f"{'task':26}{'cell':28}{'seeds':>5}{'final':>18}{'best':>8}{'final/best':>11}{'CPU s':>7}{'s to peer':>11}")
    for (env, cell), group in rows.groupby(["env", "cell"]):
        final, best = group.final_return, group.best_return.mean()
        spread = f"{final.mean():.1f} ± {final.std(ddof=0):.1f}"
        seconds = seconds_to(curves[(curves.cell == cell) & (curves.env == env)], peers.get(env))
        print(
            f"{env:26}{cell:28}{len(group):5}{spread:>18}{best:8.0f}{final.mean() / best:11.2f}"
            f"{group.cpu_seconds.mean():7.0f}{seconds:>11}"
        )
    print_interquartile_means(rows, cells)


def seconds_to(curves: pd.DataFrame, level: float | None) -> str:
    """Return the mean CPU seconds until an evaluation reached a level; the seeds that never did are counted apart."""
    if level is None:
        return "-"
    reached = curves[curves.mean_return >= level].groupby("seed").cpu_seconds.min()
    missed = curves.seed.nunique() - len(reached)
    return (f"{reached.mean():.0f}" if len(reached) else "-") + (f" ({missed} not)" if missed else "")


def print_interquartile_means(rows: pd.DataFrame, cells: list[str]) -> None:
    """Print them over the tasks that have a published value and that all cells have finished."""
    tasks = [env for env in PUBLISHED if set(rows[rows.env == env].cell) >= set(rows.cell)]
    rows = rows[rows.env.isin(tasks)].assign(score=lambda r: r.final_return / r.env.map(PUBLISHED))
    scores = {}
    for cell in [cell for cell in cells if cell in set(rows.cell)] if tasks else []:
        table = rows[rows.cell == cell].pivot_table(index="seed", columns="env", values="score").dropna()
        scores[cell] = table.to_numpy()
    scores = {cell: matrix for cell, matrix in scores.items() if len(matrix) > 1}  # one seed has no interval
    if scores:
        print(f"\nInterquartile mean of final / published, over {', '.join(tasks)}:")
        for cell, (mean, low, high) in study.interquartile_means(scores).items():
            print(f"{cell:28}{mean:.2f} [{low:.2f}, {high:.2f}] of {scores[cell].shape[0]} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["tuned"], help="names from CELLS and FILES, or tianshou")
    parser.add_argument("--envs", nargs="+", default=["HalfCheetah-v5"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="environment steps of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--cells-from", type=Path, help="Python file with further CELLS")
    parser.add_argument("--agents", type=Path, help="folder to save the agents in")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "returns.csv")
    parser.add_argument("--table", action="store_true", help="print what the finished runs say, and run nothing")
    args = parser.parse_args()

    if args.table:
        print_table(args.out, args.cells, args.steps, args.seeds)
        return
    grid = itertools.product(args.seeds, args.envs, args.cells)
    runs = [Run(cell, env, seed, args.steps) for seed, env, cell in grid]
    train_one = partial(train, cells_from=args.cells_from, agents=args.agents)
    sys.exit(study.perform_missing(runs, train_one, args.out, args.jobs) > 0)


if __name__ == "__main__":
    main()
