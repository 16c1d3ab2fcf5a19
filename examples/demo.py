"""
TRPO on CartPole: train until solved, evaluate, save, load, plot the learning curve.

Run it with ``make demo``, or with ``python examples/demo.py`` where the extra ``demo`` is installed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_trpo import TRPO

ENV_ID = "CartPole-v1"
N_ENVS = 4
#: CartPole-v1 counts as solved at a mean return of 475 (of 500, the longest episode).
SOLVED = 475.0
#: Training stops when no episode of an evaluation falls short. A lower threshold would accept a policy that was lucky once.
STOP_AT = 500.0
#: Deterministic episodes of each evaluation, during training and after it.
N_EVAL_EPISODES = 20


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Read the command line.

    :param argv: the arguments, those of the process if ``None``
    :return: ``out`` (a path), ``timesteps`` and ``seed``
    """
    parser = argparse.ArgumentParser(description=f"Train TRPO on {ENV_ID} until it is solved.")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for the model and the plot")
    parser.add_argument("--timesteps", type=int, default=200_000, help="maximum number of environment steps")
    parser.add_argument("--seed", type=int, default=7)
    return parser.parse_args(argv)


def train(out: Path, timesteps: int, seed: int) -> TRPO:
    """
    Train until an evaluation reaches :data:`STOP_AT`, or for ``timesteps`` steps.

    :param out: folder for the training episodes (``train/*.monitor.csv``) and the evaluations (``evaluations.npz``)
    :param timesteps: maximum number of environment steps
    :param seed: seed of the environments, the policy and the minibatches
    :return: the trained model
    """
    train_env = make_vec_env(ENV_ID, n_envs=N_ENVS, seed=seed, monitor_dir=str(out / "train"))
    eval_env = make_vec_env(ENV_ID, n_envs=N_EVAL_EPISODES, seed=seed + 1_000)
    model = TRPO("MlpPolicy", train_env, n_steps=512, seed=seed, device="cpu")
    evaluation = EvalCallback(
        eval_env,
        callback_on_new_best=StopTrainingOnRewardThreshold(STOP_AT),
        n_eval_episodes=N_EVAL_EPISODES,
        eval_freq=model.n_steps,  # once per update
        log_path=str(out),
        verbose=0,
    )
    model.learn(timesteps, callback=evaluation, progress_bar=True)
    train_env.close()
    eval_env.close()
    return model


def same_actions(model: TRPO, other: TRPO, seed: int) -> bool:
    """
    Compare two models over one episode of the first one.

    :param model: the model that acts
    :param other: the model to compare with
    :param seed: seed of the environment
    :return: True if all deterministic actions are equal
    """
    env = gym.make(ENV_ID)
    observation, _ = env.reset(seed=seed)
    done, same = False, True
    while same and not done:
        action, _ = model.predict(observation, deterministic=True)
        same = np.array_equal(action, other.predict(observation, deterministic=True)[0])
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    env.close()
    return same


def plot_learning_curve(out: Path) -> Path:
    """
    Plot the return of each training episode and the evaluations against environment steps.

    :param out: the folder that :func:`train` wrote to
    :return: the path of the plot
    """
    from matplotlib.figure import Figure  # an extra; a Figure without pyplot needs no display
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, path in enumerate(sorted((out / "train").glob("*.monitor.csv"))):
        # Two lines of header, then one line per episode: return, length, seconds.
        episodes = np.loadtxt(path, delimiter=",", skiprows=2, ndmin=2).reshape(-1, 3)
        steps = np.cumsum(episodes[:, 1]) * N_ENVS
        axes.plot(steps, episodes[:, 0], ".", ms=3, color="tab:gray", alpha=0.5, label=None if i else "training episodes")
    with np.load(out / "evaluations.npz") as evaluations:
        steps, returns = evaluations["timesteps"], evaluations["results"]
    axes.fill_between(steps, returns.min(axis=1), returns.max(axis=1), color="tab:blue", alpha=0.15, lw=0)
    axes.plot(steps, returns.mean(axis=1), "o-", ms=3, color="tab:blue", label="evaluation, deterministic: mean and range")
    axes.axhline(SOLVED, color="tab:green", ls="--", lw=1, label=f"solved ({SOLVED:.0f})")
    axes.set(title=f"TRPO on {ENV_ID}", xlabel="environment steps", ylabel="return", xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside lower center", ncols=3)
    picture = out / "learning_curve.png"
    figure.savefig(picture, dpi=150)
    return picture


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the demo.

    :param argv: the arguments, those of the process if ``None``
    :return: 0 if CartPole is solved and the loaded model acts like the saved one, else 1
    """
    arguments = parse_arguments(argv)
    missing = [name for name in ("matplotlib", "rich", "tqdm") if find_spec(name) is None]
    if missing:
        print(f"The demo also needs {', '.join(missing)}: pip install '.[demo]'", file=sys.stderr)
        return 1
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)  # the networks are small: more threads would wait for one another

    print(f"Training TRPO on {ENV_ID} until it is solved, for at most {arguments.timesteps:,} steps ...")
    start = time.perf_counter()
    model = train(out, arguments.timesteps, arguments.seed)
    print(f"Trained for {model.num_timesteps:,} steps in {time.perf_counter() - start:.0f} s.")

    test_env = make_vec_env(ENV_ID, n_envs=N_EVAL_EPISODES, seed=arguments.seed + 2_000)
    returns, _ = evaluate_policy(model, test_env, N_EVAL_EPISODES, deterministic=True, return_episode_rewards=True)
    test_env.close()
    mean = float(np.mean(returns))
    print(f"Mean return over {N_EVAL_EPISODES} deterministic episodes: {mean:.1f} (solved at {SOLVED:.0f}).")

    saved = out / "trpo_cartpole.zip"
    model.save(saved)
    same = same_actions(model, TRPO.load(saved, device="cpu"), arguments.seed)
    print(f"Saved {saved}; loaded back, it {'gives the same actions' if same else 'gives OTHER ACTIONS'}.")

    print(f"Learning curve: {plot_learning_curve(out)}")
    if mean < SOLVED:
        print(f"Not solved: {mean:.1f} < {SOLVED:.0f}.", file=sys.stderr)
    return 0 if mean >= SOLVED and same else 1


if __name__ == "__main__":
    sys.exit(main())
