"""
Small tasks for the spaces that Gymnasium's own tasks leave out. Import this module, then ``gym.make("Chase-v0")``.

Each is learned in about 30,000 steps, and none by a policy that ignores part of its observation.
"""

from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class Chase(gym.Env):
    """
    MultiDiscrete actions: run after targets on a grid, moving by −1, 0 or 1 along both axes at once.

    Every target caught is worth 1, and the next one appears elsewhere. A good return for 50 steps is about 15.
    """

    SIZE = 7
    action_space = spaces.MultiDiscrete([3, 3])
    observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position, self.target = self.np_random.integers(self.SIZE, size=(2, 2))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Step:
        self.position = np.clip(self.position + action - 1, 0, self.SIZE - 1)
        caught = bool((self.position == self.target).all())
        while (self.position == self.target).all():
            self.target = self.np_random.integers(self.SIZE, size=2)
        return self._observe(), float(caught), False, False, {}

    def _observe(self) -> np.ndarray:
        return (np.concatenate([self.position, self.target]) * 2 / (self.SIZE - 1) - 1).astype(np.float32)


class Hover(gym.Env):
    """
    MultiBinary actions: four thrusters, each on or off, hold a drifting mass over the origin of a plane.

    The reward is exp(−distance), so 100 steps are worth 100 at most; random thrusts earn about 3.
    """

    THRUST = 0.1 * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    action_space = spaces.MultiBinary(4)
    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-2.0, 2.0, 2)
        self.velocity = self.np_random.uniform(-0.3, 0.3, 2)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Step:
        self.velocity = self.velocity + action @ self.THRUST
        self.position = self.position + self.velocity
        return self._observe(), float(np.exp(-np.linalg.norm(self.position))), False, False, {}

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.position, self.velocity]).astype(np.float32)


class Errands(gym.Env):
    """
    Dict observations, two-dimensional Box actions: walk to the corner that is called for, then to the next.

    Only the two keys together say where to go. Every corner reached is worth 1, and so is every unit of distance that
    brings it nearer: paid at the corners alone, some runs never find all four. A good return for 100 steps is about 36.
    """

    CORNERS = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    observation_space = spaces.Dict({"position": spaces.Box(-1.0, 1.0, (2,), np.float32), "corner": spaces.Discrete(4)})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict]:
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1.0, 1.0, 2)
        self.corner = int(self.np_random.integers(4))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Step:
        before = self._distance()
        self.position = np.clip(self.position + 0.2 * np.clip(action, -1.0, 1.0), -1.0, 1.0)
        after = self._distance()
        reached = after < 0.5
        if reached:
            self.corner = (self.corner + int(self.np_random.integers(1, 4))) % 4
        return self._observe(), before - after + reached, False, False, {}

    def _distance(self) -> float:
        return float(np.linalg.norm(self.position - self.CORNERS[self.corner]))

    def _observe(self) -> dict[str, Any]:
        return {"position": self.position.astype(np.float32), "corner": self.corner}


class Catch(gym.Env):
    """
    Pixels: balls fall one after the other, and a paddle at the bottom of the image moves by −1, 0 or 1 cells.

    Catching a bright ball is worth 1, catching a dark one −1. What a position is worth depends on the ball's shade and on
    where ball and paddle are, for the best policy too, so the critic must see as well. A perfect return for the 40 steps
    (8 balls) is 4 on average.
    """

    SIZE, PIXELS = 6, 6
    PADDLE, DARK, BRIGHT = 180, 100, 255
    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(0, 255, (SIZE * PIXELS, SIZE * PIXELS, 1), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.paddle = int(self.np_random.integers(self.SIZE))
        self._drop_ball()
        return self._observe(), {}

    def step(self, action: int) -> Step:
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.SIZE - 1)
        self.row += 1
        reward = 0.0
        if self.row == self.SIZE - 1:
            if self.column == self.paddle:
                reward = 1.0 if self.bright else -1.0
            self._drop_ball()
        return self._observe(), reward, False, False, {}

    def _drop_ball(self) -> None:
        self.row, self.column = 0, int(self.np_random.integers(self.SIZE))
        self.bright = bool(self.np_random.integers(2))

    def _observe(self) -> np.ndarray:
        cells = np.zeros((self.SIZE, self.SIZE), np.uint8)
        cells[-1, self.paddle] = self.PADDLE
        cells[self.row, self.column] = self.BRIGHT if self.bright else self.DARK
        return cells.repeat(self.PIXELS, axis=0).repeat(self.PIXELS, axis=1)[:, :, None]


class Placement(gym.Env):
    """
    64 discrete actions, most of them invalid in the end: lay bricks of changing size on an 8 × 8 board until none fits.

    An action is the board's cell for the brick's upper left corner; it is valid where the whole brick lies on free cells.
    Every cell covered is worth 1/64, so the return is the covered share of the board. The next brick's height and width are
    shown beside the board.
    """

    SIZE = 8
    BRICKS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2))
    action_space = spaces.Discrete(SIZE * SIZE)
    observation_space = spaces.Box(0.0, 1.0, (SIZE * SIZE + len(BRICKS),), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.board = np.zeros((self.SIZE, self.SIZE), bool)
        self._draw_brick()
        return self._observe(), {}

    def step(self, action: int) -> Step:
        if not self.masks[action]:
            raise ValueError(f"action {action} is invalid")
        row, column = divmod(int(action), self.SIZE)
        height, width = self.BRICKS[self.brick]
        self.board[row : row + height, column : column + width] = True
        self._draw_brick()
        return self._observe(), height * width / self.SIZE**2, not self.masks.any(), False, {}

    def action_masks(self) -> np.ndarray:
        return self.masks

    def _draw_brick(self) -> None:
        self.brick = int(self.np_random.integers(len(self.BRICKS)))
        height, width = self.BRICKS[self.brick]
        fits = np.zeros((self.SIZE, self.SIZE), bool)
        windows = np.lib.stride_tricks.sliding_window_view(self.board, (height, width))
        fits[: windows.shape[0], : windows.shape[1]] = ~windows.any(axis=(2, 3))
        self.masks = fits.flatten()

    def _observe(self) -> np.ndarray:
        kind = np.eye(len(self.BRICKS))[self.brick]
        return np.concatenate([self.board.flatten(), kind]).astype(np.float32)


class Recall(gym.Env):
    """
    Memory: one of four cues is shown in the first step, and is to be named eight steps later, when a signal asks for it.

    The right answer is worth 1 and ends the episode. A policy that remembers has a return of 1, any other one of 0.25.
    """

    CUES, DELAY = 4, 8
    action_space = spaces.Discrete(CUES)
    observation_space = spaces.Box(0.0, 1.0, (CUES + 1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cue, self.time = int(self.np_random.integers(self.CUES)), 0
        return self._observe(), {}

    def step(self, action: int) -> Step:
        asked = self.time == self.DELAY
        self.time += 1
        return self._observe(), float(asked and action == self.cue), asked, False, {}

    def _observe(self) -> np.ndarray:
        observation = np.zeros(self.CUES + 1, np.float32)
        if self.time == 0:
            observation[self.cue] = 1.0
        observation[-1] = self.time == self.DELAY
        return observation


class PositionsOnly(gym.ObservationWrapper):
    """Leaves out the velocities: a policy must remember earlier observations."""

    def __init__(self, env: gym.Env, positions: tuple[int, ...]) -> None:
        super().__init__(env)
        self.positions = list(positions)
        space = env.observation_space
        self.observation_space = spaces.Box(space.low[self.positions], space.high[self.positions], dtype=space.dtype)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[self.positions]


def _without_velocities(name: str, positions: tuple[int, ...]) -> gym.Env:
    return PositionsOnly(gym.make(name), positions)


#: Not registered: RL Zoo registers other environments under these names, where velocities are zero.
WITHOUT_VELOCITIES = {
    "CartPoleNoVel-v1": partial(_without_velocities, "CartPole-v1", (0, 2)),
    "PendulumNoVel-v1": partial(_without_velocities, "Pendulum-v1", (0, 1)),
    "LunarLanderNoVel-v3": partial(_without_velocities, "LunarLander-v3", (0, 1, 4, 6, 7)),
    "HalfCheetahNoVel-v5": partial(_without_velocities, "HalfCheetah-v5", tuple(range(8))),
}
gym.register("Recall-v0", Recall)
gym.register("Placement-v0", Placement)
gym.register("Chase-v0", Chase, max_episode_steps=50)
gym.register("Hover-v0", Hover, max_episode_steps=100)
gym.register("Errands-v0", Errands, max_episode_steps=100)
gym.register("Catch-v0", Catch, max_episode_steps=40)
