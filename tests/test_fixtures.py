"""Files of earlier commits load, predict what they predicted, and train on. ``data/make_fixtures.py`` wrote them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch as th
from data.make_fixtures import CASES, N_ENVS, N_STEPS, as_arrays, predict
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo import TRPO, load_vec_normalize

FOLDER = Path(__file__).parent / "data" / "3440a56"
FILES = sorted(file.stem for file in FOLDER.glob("*.zip"))
MODELS = [name for name in FILES if not name.endswith("_checkpoint")]
CHECKPOINTS = [name for name in FILES if name.endswith("_checkpoint")]
#: Files that the commit which wrote them cannot load: it calls the array of a transposed image damaged.
NOT_LOADED: list[str] = []


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "predictions.npz") as file:
        return dict(file)


def case_of(name: str) -> str:
    return name.removesuffix("_checkpoint")


def entries(stored: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): values for key, values in stored.items() if key.startswith(prefix)}


def known_failures(names: list[str]) -> list:
    """Mark the names that are known not to load."""
    return [pytest.param(name, marks=[pytest.mark.xfail(strict=True)] if name in NOT_LOADED else []) for name in names]


def n_updates(model: TRPO) -> int:
    return model._n_updates


def check_training(model: TRPO) -> None:
    """Train on a further rollout."""
    before, steps = n_updates(model), model.num_timesteps
    model.learn(N_STEPS * N_ENVS, reset_num_timesteps=False)
    assert n_updates(model) > before
    assert model.num_timesteps == steps + N_STEPS * N_ENVS
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


def test_fixtures_cover_every_case() -> None:
    wanted = [name + ("" if kind == "model" else "_checkpoint") for name, case in CASES.items() for kind in case.kinds]
    assert sorted(wanted) == FILES


@pytest.mark.parametrize("name", known_failures(FILES))
def test_load_predicts_what_the_saved_model_predicted(name: str, stored: dict[str, np.ndarray]) -> None:
    case = case_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CASES[case].loader.load(FOLDER / f"{name}.zip", device="cpu")
    actions = predict(model, entries(stored, f"{case}/observations/"))
    expected = stored[f"{case}/actions"]
    assert actions.dtype == expected.dtype
    np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", known_failures(MODELS))
def test_load_with_an_environment_trains_on(name: str) -> None:
    case = CASES[name]
    env = case.make_env()
    if isinstance(env, VecNormalize):
        env = load_vec_normalize(FOLDER / f"{name}.zip", env.venv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = case.loader.load(FOLDER / f"{name}.zip", env, device="cpu")
        check_training(model)


@pytest.mark.parametrize("name", known_failures(CHECKPOINTS))
def test_resume_continues_where_the_checkpoint_was_written(name: str, stored: dict[str, np.ndarray]) -> None:
    case = case_of(name)
    model = CASES[case].loader.resume(FOLDER / f"{name}.zip", CASES[case].make_env(), device="cpu")
    assert model.num_timesteps == 2 * N_STEPS * N_ENVS
    check_training(model)
    observations = model.rollout_buffer.observations
    first = {key: values[0] for key, values in as_arrays(observations).items()}
    expected = entries(stored, f"{case}/last_observations/")
    for key, values in expected.items():
        np.testing.assert_array_equal(first[key].reshape(values.shape), values)
