"""A state that cannot be captured or restored is reported; it ends no training, and no worker."""

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_trpo import TRPO, CorruptCheckpointError, ResumableEnv, UntrustedFileError, WatchedSubprocVecEnv
from sb3_trpo.errors import MismatchError, WorkerError
from sb3_trpo.saving.env_state import capture, restore
from sb3_trpo.saving.unpickling import RefusedError

N_STEPS, N_ENVS = 16, 2


class Lander(gym.Wrapper):
    """An environment with an object that cannot be pickled, as Box2D's world is."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.world = (body for body in ())


class Tool:
    """A user's own class."""


class WithTool(gym.Wrapper):
    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.tool = Tool()


class Described(gym.Wrapper):
    """An environment with methods of its own, which may fail."""

    fails: str = ""

    def get_state(self) -> Any:
        if self.fails == "get":
            raise KeyError("no world")
        return {"steps": 3}

    def set_state(self, state: Any) -> None:
        if self.fails == "set":
            raise KeyError("another world")


class FailsToGet(Described):
    fails = "get"


class FailsToLook(gym.Wrapper):
    @property
    def get_state(self) -> Any:
        raise RuntimeError("no world yet")


class FailsToSet(Described):
    fails = "set"


def cartpole(*wrappers: Callable[[gym.Env], gym.Env]) -> gym.Env:
    env: gym.Env = gym.make("CartPole-v1")
    for wrapper in wrappers:
        env = wrapper(env)
    return env


def watched(*wrappers: Any) -> VecEnv:
    return WatchedSubprocVecEnv([functools.partial(cartpole, *wrappers)] * N_ENVS, start_method="fork", timeout=60.0)


def resumable(*wrappers: Any) -> VecEnv:
    return SubprocVecEnv([functools.partial(cartpole, *wrappers, ResumableEnv)] * N_ENVS, start_method="fork")


def bare_workers(*wrappers: Any) -> VecEnv:
    return SubprocVecEnv([functools.partial(cartpole, *wrappers)] * N_ENVS, start_method="fork")


def dummy(*wrappers: Any) -> VecEnv:
    return DummyVecEnv([functools.partial(cartpole, *wrappers)] * N_ENVS)


def dummy_resumable(*wrappers: Any) -> VecEnv:
    return dummy(*wrappers, ResumableEnv)


def make(env: VecEnv) -> TRPO:
    return TRPO("MlpPolicy", env, n_steps=N_STEPS, seed=0, device="cpu")


def write(env: VecEnv, path: Path) -> TRPO:
    model = make(env).learn(N_STEPS * N_ENVS)
    model.save_checkpoint(path)
    return model


@pytest.mark.parametrize("venv", [watched, resumable, dummy, dummy_resumable])
@pytest.mark.parametrize(("wrapper", "reason"), [(Lander, "'world' of Lander"), (FailsToGet, "get_state.*no world")])
def test_checkpoint_of_environments_that_cannot_be_captured_ends_no_training(
    venv: Callable[..., VecEnv], wrapper: Any, reason: str, tmp_path: Path
) -> None:
    env, other = VecNormalize(venv(wrapper)), VecNormalize(venv(wrapper))
    model = write(env, tmp_path / "checkpoint.zip")
    model.learn(N_STEPS * N_ENVS, reset_num_timesteps=False)

    with pytest.warns(UserWarning, match=reason) as caught:
        resumed = TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu")
    assert len(caught) == 1
    assert other.obs_rms.count > 1 + N_STEPS  # the statistics are restored nevertheless
    assert resumed.learn(N_STEPS * N_ENVS, reset_num_timesteps=False).num_timesteps == 2 * N_STEPS * N_ENVS
    env.close(), other.close()


def test_checkpoint_of_a_wrapper_that_cannot_be_pickled_keeps_the_statistics_of_others(tmp_path: Path) -> None:
    class Sealed(VecEnvWrapper):
        def __init__(self, venv: VecEnv) -> None:
            super().__init__(venv)
            self.stream = (number for number in ())

        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            return self.venv.step_wait()

    env, other = (Sealed(VecNormalize(dummy())) for _ in range(2))
    write(env, tmp_path / "checkpoint.zip")
    with pytest.warns(UserWarning, match="wrapper 0:Sealed cannot be pickled"):
        TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu")
    assert np.array_equal(other.venv.obs_rms.mean, env.venv.obs_rms.mean)
    assert not np.array_equal(other.venv.obs_rms.mean, np.zeros(4))


@pytest.mark.parametrize("venv", [watched, resumable, dummy, dummy_resumable])
def test_resume_refuses_what_may_run_code_wherever_the_environments_are(venv: Callable[..., VecEnv], tmp_path: Path) -> None:
    env, other = venv(WithTool), venv(WithTool)
    write(env, tmp_path / "checkpoint.zip")
    with pytest.raises(UntrustedFileError, match=r"checkpoint\.zip.*Tool.*trust=True"):
        TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu")
    assert TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu", trust=True).learn(1).num_timesteps > 0
    env.close(), other.close()


@pytest.mark.parametrize("venv", [watched, resumable, dummy])
def test_resume_names_another_environment_wherever_it_is(venv: Callable[..., VecEnv], tmp_path: Path) -> None:
    env, other = venv(), venv(Described)
    write(env, tmp_path / "checkpoint.zip")
    with pytest.raises(MismatchError, match=r"made of \['Described'\]"):
        TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu")
    env.close(), other.close()


@pytest.mark.parametrize("venv", [watched, resumable, dummy])
def test_resume_names_a_set_state_that_raises(venv: Callable[..., VecEnv], tmp_path: Path) -> None:
    env, other = venv(FailsToSet), venv(FailsToSet)
    write(env, tmp_path / "checkpoint.zip")
    with pytest.raises(MismatchError, match=r"set_state\(\) of FailsToSet raised KeyError\('another world'\)"):
        TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu")
    env.close(), other.close()


PLACES = [watched, resumable, dummy, dummy_resumable]


@pytest.mark.parametrize("first", PLACES)
@pytest.mark.parametrize("second", PLACES)
def test_resume_takes_environments_from_workers_into_this_process_and_back(
    first: Callable[..., VecEnv], second: Callable[..., VecEnv], tmp_path: Path
) -> None:
    env, other = first(), second()
    model = write(env, tmp_path / "checkpoint.zip")
    resumed = TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu")
    for step in range(50):  # past the ends of episodes, which draw from the environments' generators
        actions = np.array([step % 2, 1])
        assert np.array_equal(env.step(actions)[0], other.step(actions)[0])
    assert np.array_equal(model._last_obs, resumed._last_obs)
    env.close(), other.close()


@pytest.mark.parametrize(("first", "second"), [(bare_workers, dummy), (dummy, bare_workers), (bare_workers, bare_workers)])
def test_resume_takes_states_of_an_environments_own_from_workers_and_back(
    first: Callable[..., VecEnv], second: Callable[..., VecEnv], tmp_path: Path
) -> None:
    env, other = first(Described), second(Described)
    write(env, tmp_path / "checkpoint.zip")
    assert TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu").num_timesteps == N_STEPS * N_ENVS
    env.close(), other.close()


def test_resume_in_workers_out_of_reach_says_what_to_wrap(tmp_path: Path) -> None:
    write(dummy(), tmp_path / "checkpoint.zip")
    other = bare_workers()
    with pytest.raises(MismatchError, match=r"wrap each in sb3_trpo\.ResumableEnv"):
        TRPO.resume(tmp_path / "checkpoint.zip", other, device="cpu")
    other.close()


@pytest.mark.parametrize(
    ("wrapper", "message"), [(FailsToGet, r"get_state\(\).*ResumableEnv"), (FailsToLook, "when asked for its state")]
)
def test_get_state_that_raises_in_a_bare_worker_names_the_remedy(wrapper: Any, message: str, tmp_path: Path) -> None:
    env = bare_workers(wrapper)
    model = make(env).learn(N_STEPS * N_ENVS)
    with pytest.raises(WorkerError, match=message):
        model.save_checkpoint(tmp_path / "checkpoint.zip")
    for process in env.processes:
        process.join()


class OwnVecEnv(VecEnv):
    """A vectorized environment of the user's own, whose environments are out of reach; what is asked of them may raise."""

    def __init__(self, *fails: str, state: Any = 1) -> None:
        self.inner, self.state = dummy(), state
        self.fails: tuple[str, ...] = ()
        super().__init__(N_ENVS, self.inner.observation_space, self.inner.action_space)
        self.fails = fails

    def reset(self) -> Any:
        return self.inner.reset()

    def step_async(self, actions: np.ndarray) -> None:
        self.inner.step_async(actions)

    def step_wait(self) -> Any:
        return self.inner.step_wait()

    def close(self) -> None:
        self.inner.close()

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def _ask(self, name: str, answer: Any) -> Any:
        if name in self.fails:
            raise RuntimeError(f"{name} failed")
        return [answer] * N_ENVS

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Any:
        return self._ask("env_is_wrapped", answer=False)

    def get_attr(self, attr_name: str, indices: Any = None) -> Any:
        return self._ask("get_attr", answer=len)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> Any:
        return self._ask(method_name, self.state)


@pytest.mark.parametrize(
    ("venv", "reason"),
    [
        (lambda: OwnVecEnv("env_is_wrapped", "get_attr"), "out of reach"),
        (lambda: OwnVecEnv("get_attr"), "out of reach"),
        (lambda: OwnVecEnv("get_state"), r"get_state\(\).*get_state failed"),
        (lambda: OwnVecEnv(state=lambda: 1), "cannot be pickled"),
    ],
)
def test_checkpoint_of_vectorized_environments_that_raise_ends_no_training(
    venv: Callable[[], VecEnv], reason: str, tmp_path: Path
) -> None:
    model = write(venv(), tmp_path / "checkpoint.zip")
    model.learn(N_STEPS * N_ENVS, reset_num_timesteps=False)
    with pytest.warns(UserWarning, match=reason):
        TRPO.resume(tmp_path / "checkpoint.zip", venv(), device="cpu")


@pytest.mark.parametrize("name", ["env_is_wrapped", "get_attr", "set_state"])
def test_resume_into_vectorized_environments_that_raise_is_a_mismatch(name: str, tmp_path: Path) -> None:
    write(OwnVecEnv(), tmp_path / "checkpoint.zip")
    with pytest.raises(MismatchError, match="set_state failed" if name == "set_state" else "out of reach"):
        TRPO.resume(tmp_path / "checkpoint.zip", OwnVecEnv(name, "get_attr" if name == "env_is_wrapped" else ""), device="cpu")


@pytest.mark.parametrize("member", ["policy.pth", "data", "sb3_trpo_resume.pkl", "vec_normalize.npz"])
def test_resume_names_the_file_and_its_damaged_member(member: str, tmp_path: Path) -> None:
    path, damaged = tmp_path / "checkpoint.zip", tmp_path / "damaged.zip"
    write(VecNormalize(dummy()), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(damaged, "w") as target:
        for name in source.namelist():
            contents = source.read(name)
            target.writestr(name, contents[: len(contents) // 2] if name == member else contents)
    with pytest.raises(CorruptCheckpointError, match=rf"damaged\.zip: '{member}'"):
        TRPO.resume(damaged, VecNormalize(dummy()), device="cpu")


@pytest.mark.parametrize("name", ["step", "__setstate__"])
def test_restore_sets_no_methods(name: str) -> None:
    env, other = cartpole(), cartpole()
    env.reset(), other.reset()
    vars(env)[name] = 1
    with pytest.raises(RefusedError, match=name):
        restore(other, capture(env))
