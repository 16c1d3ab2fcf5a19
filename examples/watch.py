"""
Watch trained agents, in a window or as a GIF. They are in ``benchmarks/results/agents/``.

    python examples/watch.py Walker2d-v5
    python examples/watch.py HalfCheetah-v5 Walker2d-v5 --gif agents.gif
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_trpo import TRPO, load_vec_normalize

AGENTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "agents"
#: Environments without a camera that follows the agent.
FIXED_CAMERA = ("Reacher-v5",)
#: Frames per second, and height of a frame in pixels.
GIF_RATE, GIF_HEIGHT = 15, 140


def load_agent(folder: Path, render_mode: str | None = None, seed: int = 0) -> tuple[TRPO, VecEnv]:
    """
    Load an agent, and make its environment.

    :param folder: folder of the agent, named after the environment
    :param render_mode: Gymnasium's render mode
    :param seed: seed of the environment
    :return: the model, and the environment with the statistics that the agent was trained with
    """
    path = str(folder / "model.zip")
    camera: dict[str, Any] = {} if folder.name in FIXED_CAMERA else {"camera_name": "track"}
    env = load_vec_normalize(path, DummyVecEnv([lambda: gym.make(folder.name, render_mode=render_mode, **camera)]))
    env.training, env.norm_reward = False, False
    model = TRPO.load(path, env=env, device="cpu")
    env.seed(seed)  # after `load`, which seeds the environment as in training
    return model, env


def play(model: TRPO, env: VecEnv) -> Iterator[float]:
    """
    Play one episode with the deterministic policy.

    :param model: the agent
    :param env: its environment
    :return: the reward of each step
    """
    observations, done = env.reset(), False
    while not done:
        actions, _ = model.predict(observations, deterministic=True)  # type: ignore[arg-type]
        observations, rewards, dones, _ = env.step(actions)
        done = bool(dones[0])
        yield float(rewards[0])


def record(folder: Path, seed: int, skip: float, seconds: float) -> list[np.ndarray]:
    """
    Record an agent.

    :param folder: folder of the agent
    :param seed: seed of the environment
    :param skip: seconds to leave out at the start
    :param seconds: seconds to record
    :return: the frames
    """
    model, env = load_agent(folder, "rgb_array", seed)
    rate: int = env.get_attr("metadata")[0]["render_fps"]
    frames = []
    for step, _ in enumerate(play(model, env)):
        if step < skip * rate:
            continue
        if step >= (skip + seconds) * rate:
            break
        if step * GIF_RATE // rate != (step + 1) * GIF_RATE // rate:
            frames.append(np.asarray(env.render()))
    env.close()
    return frames


def write_gif(path: Path, recordings: list[list[np.ndarray]]) -> None:
    """
    Write recordings side by side.

    :param path: the file
    :param recordings: frames of each agent; the shortest recording sets the length
    """
    from PIL import Image  # gymnasium[mujoco] installs it

    frames = []
    for shown in zip(*recordings, strict=False):
        images = [Image.fromarray(frame) for frame in shown]
        sizes = [(image.width * GIF_HEIGHT // image.height, GIF_HEIGHT) for image in images]
        strip = np.hstack([np.asarray(image.resize(size)) for image, size in zip(images, sizes, strict=True)])
        frames.append(Image.fromarray(strip).quantize(64))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // GIF_RATE, loop=0, optimize=True)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the example.

    :param argv: the arguments, those of the process if ``None``
    """
    scores = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in AGENTS.glob("*/score.json")}
    parser = argparse.ArgumentParser(description="Watch trained agents.")
    parser.add_argument("envs", nargs="+", choices=sorted(scores), metavar="env", help=f"{', '.join(sorted(scores))}")
    parser.add_argument("--gif", type=Path, help="write a GIF instead of opening a window")
    parser.add_argument("--skip", type=float, default=2.0, help="seconds that the GIF leaves out at the start")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds in the GIF")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.gif is not None:
        recordings = [record(AGENTS / env, arguments.seed, arguments.skip, arguments.seconds) for env in arguments.envs]
        write_gif(arguments.gif, recordings)
        print(arguments.gif)
        return
    for name in arguments.envs:
        model, env = load_agent(AGENTS / name, "human", arguments.seed)
        print(f"{name}: return {sum(play(model, env)):.1f}, in the study {scores[name]['final_return']}")
        env.close()


if __name__ == "__main__":
    main()
