"""Files that ask for more than a model: bombs, endless networks and buffers, attributes that no file may set."""

import functools
import io
import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage
from support.arguments import effective

from sb3_trpo import NPG, TRPO, CorruptCheckpointError, MaskableTRPO, RecurrentTRPO, UntrustedFileError, load_vec_normalize
from sb3_trpo.saving.attribute_rules import allowed_attributes
from sb3_trpo.saving.env_state import restore
from sb3_trpo.saving.unpickling import RefusedError

N_STEPS = 16


def make(env: Any = "CartPole-v1", **kwargs: Any) -> TRPO:
    return TRPO("MlpPolicy", env, **effective({"n_steps": N_STEPS, "batch_size": 8, "seed": 0, "device": "cpu", **kwargs}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.zip"
    make().learn(N_STEPS).save(path)
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, changes: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    members = {**members_of(path), **changes}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)


def change_attributes(path: Path, **changes: Any) -> None:
    data = {**json.loads(members_of(path)["data"]), **changes}
    rewrite(path, {"data": json.dumps(data).encode()})


# ---- images, wrappers, numbers of NumPy


@pytest.mark.parametrize("channel_last", [True, False])
def test_load_reads_models_of_images_that_were_trained(channel_last: bool, tmp_path: Path) -> None:
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=3, discrete=True, channel_first=not channel_last)
    model = TRPO("CnnPolicy", env, n_steps=4, device="cpu").learn(4)
    model.save(tmp_path / "model")

    loaded = TRPO.load(tmp_path / "model", device="cpu")
    assert np.array_equal(loaded._last_obs, model._last_obs)
    assert loaded._last_obs.strides == model._last_obs.strides
    assert th.equal(loaded.policy.action_net.weight, model.policy.action_net.weight)


@pytest.mark.filterwarnings("ignore:.*VecNormalize")
def test_load_reads_models_of_wrapped_environments(tmp_path: Path) -> None:
    env = make_vec_env(lambda: FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False), 2)
    model = TRPO("CnnPolicy", VecTransposeImage(VecFrameStack(env, 3)), n_steps=4, device="cpu").learn(8)
    model.save(tmp_path / "images")
    assert TRPO.load(tmp_path / "images", device="cpu").observation_space == model.observation_space

    model = make(VecNormalize(VecFrameStack(make_vec_env("Pendulum-v1", 2), 2))).learn(2 * N_STEPS)
    model.save(tmp_path / "vectors")
    assert np.array_equal(TRPO.load(tmp_path / "vectors", device="cpu")._last_original_obs, model._last_original_obs)


def test_load_reads_numpys_numbers_among_the_arguments(tmp_path: Path) -> None:
    kwargs = {"optimizer_kwargs": {"eps": np.float64(1e-6), "betas": (np.float64(0.8), 0.9)}, "log_std_init": np.float32(0.5)}
    model = make("Pendulum-v1", policy_kwargs=kwargs, critic_method="minibatch").learn(N_STEPS)
    model.save(tmp_path / "model")

    loaded = TRPO.load(tmp_path / "model", env="Pendulum-v1", device="cpu").learn(N_STEPS)
    assert loaded.policy.optimizer.param_groups[0]["eps"] == 1e-6


@pytest.mark.parametrize("wrapper", [gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward])
def test_resume_reads_gymnasiums_normalizers(wrapper: Any, tmp_path: Path) -> None:
    model = make(make_vec_env("Pendulum-v1", 1, wrapper_class=wrapper)).learn(N_STEPS)
    model.save_checkpoint(tmp_path / "model")
    model.learn(N_STEPS, reset_num_timesteps=False)

    resumed = TRPO.resume(tmp_path / "model", make_vec_env("Pendulum-v1", 1, wrapper_class=wrapper), device="cpu")
    resumed.learn(N_STEPS, reset_num_timesteps=False)
    assert th.equal(resumed.policy.action_net.weight, model.policy.action_net.weight)


@pytest.mark.parametrize("algorithm", [TRPO, NPG, RecurrentTRPO, MaskableTRPO])
def test_allowed_attributes_are_those_that_save_writes(algorithm: type[Any], tmp_path: Path) -> None:
    policy = "MlpLstmPolicy" if algorithm is RecurrentTRPO else "MlpPolicy"
    env = "CartPole-v1"
    if algorithm is MaskableTRPO:
        from sb3_contrib.common.envs import InvalidActionEnvDiscrete

        env = InvalidActionEnvDiscrete(dim=8, n_invalid_actions=2)
    model = algorithm(policy, env, n_steps=N_STEPS, device="cpu").learn(N_STEPS)
    model.save(tmp_path / "model.zip")

    written = json.loads(members_of(tmp_path / "model.zip")["data"]).keys()
    fresh = algorithm(policy, None, _init_setup_model=False)
    assert written - allowed_attributes(fresh) == {"tensorboard_log"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithm.load(tmp_path / "model", device="cpu")


# ---- zips that unpack to more than they say


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archive_refuses_other_compressions(method: int, saved: Path) -> None:
    rewrite(saved, {}, method)
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        TRPO.load(saved, device="cpu")


def test_archive_reads_deflated_files(saved: Path) -> None:
    rewrite(saved, {}, zipfile.ZIP_DEFLATED)
    assert TRPO.load(saved, device="cpu").n_steps == N_STEPS


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    return file.getvalue()


def npy(shape: tuple[int, ...], data: bytes = b"", descr: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})
    return file.getvalue() + data


@pytest.mark.parametrize(
    "members",
    [
        {"settings.npy": bytes(2**25)},
        {"settings.npy": npy((2**40,))},
        {"settings.npy": npy((1,), bytes(8), "|O")},
        {"settings.npy": b"\x80\x05N."},
        {"reward/mean.npy": npy((), bytes(8))},
    ],
    ids=["zeros", "claims_2**40_numbers", "objects", "pickle", "other_name"],
)
def test_statistics_are_checked_before_they_are_unpacked(members: dict[str, bytes], tmp_path: Path) -> None:
    make(VecNormalize(make_vec_env("CartPole-v1"))).save(tmp_path / "model.zip")
    rewrite(tmp_path / "model.zip", {"vec_normalize.npz": zipped(members)})

    with pytest.raises(CorruptCheckpointError, match=r"vec_normalize\.npz"):
        TRPO.load(tmp_path / "model.zip", device="cpu")
    with pytest.raises(CorruptCheckpointError, match=r"vec_normalize\.npz"):
        load_vec_normalize(tmp_path / "model.zip", make_vec_env("CartPole-v1"))


def test_parameters_cannot_claim_a_longer_storage(saved: Path) -> None:
    file = io.BytesIO()
    th.save({"weight": th.zeros(3)}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = members["archive/data.pkl"]
    assert pickled.count(b"K\x03") == 2  # elements of the storage, and of the tensor
    members["archive/data.pkl"] = pickled.replace(b"K\x03", b"M\xff\xff")
    rewrite(saved, {"policy.pth": zipped(members)})

    with pytest.raises(CorruptCheckpointError, match="claims"):
        TRPO.load(saved, device="cpu")


# ---- sizes that the file decides


def untrusted(saved: Path, **changes: Any) -> str:
    change_attributes(saved, **changes)
    with pytest.raises((CorruptCheckpointError, UntrustedFileError)) as error:
        TRPO.load(saved, device="cpu")
    assert len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"net_arch": [60_000, 60_000]},
        {"net_arch": [2**40, 2**40]},
        {"net_arch": [8] * 30_000},
        {"net_arch": [[[[8]]]]},
        {"net_arch": [8]},
        {"optimizer_class": 1},
        {"features_extractor_kwargs": {"features_dim": 10**12}},
        {"unknown": 1},
    ],
)
def test_networks_are_compared_before_they_are_made(kwargs: dict[str, Any], saved: Path) -> None:
    size = saved.stat().st_size
    untrusted(saved, policy_kwargs=kwargs)
    assert saved.stat().st_size < size + 200_000


def test_networks_have_a_number_of_layers(tmp_path: Path) -> None:
    model = RecurrentTRPO("MlpLstmPolicy", "CartPole-v1", n_steps=N_STEPS, device="cpu")
    model.save(tmp_path / "model.zip")
    change_attributes(tmp_path / "model.zip", policy_kwargs={"n_lstm_layers": 10**9})

    with pytest.raises(CorruptCheckpointError, match="layers"):
        RecurrentTRPO.load(tmp_path / "model.zip", device="cpu")


def test_huge_buffers_need_trust_or_a_number(saved: Path) -> None:
    assert "rollout buffer" in untrusted(saved, n_steps=10**12)
    assert TRPO.load(saved, device="cpu", n_steps=N_STEPS).n_steps == N_STEPS
    change_attributes(saved, n_steps=2**20)
    assert TRPO.load(saved, device="cpu").n_steps == 2**20


def test_huge_spaces_are_refused(tmp_path: Path) -> None:
    model = make()
    model.observation_space = spaces.MultiBinary(10**9)
    model.save(tmp_path / "model.zip")
    with pytest.raises((UntrustedFileError, CorruptCheckpointError)):
        TRPO.load(tmp_path / "model.zip", device="cpu")


def test_policies_of_sb3_before_1_7_are_loaded(tmp_path: Path) -> None:
    env = FakeImageEnv(screen_height=40, screen_width=40, n_channels=1, discrete=False)
    model = TRPO("CnnPolicy", env, n_steps=4, device="cpu")
    names = [name for name in model.policy.state_dict() if name.startswith("features_extractor.")]
    del model.policy.pi_features_extractor, model.policy.vf_features_extractor
    model.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match=r"SB3 < 1\.7"):
        loaded = TRPO.load(tmp_path / "model.zip", device="cpu")
    state = loaded.policy.state_dict()
    for name in names:
        assert th.equal(state[f"vf_{name}"], state[name])
        assert th.equal(state[name], model.policy.state_dict()[name])


# ---- attributes


@pytest.mark.parametrize("name", ["predict", "_setup_model", "set_parameters", "_loaded", "env", "policy", "__class__", "a b"])
def test_a_file_cannot_replace_what_belongs_to_the_class(name: str, saved: Path) -> None:
    assert "no file may set" in untrusted(saved, **{name: "x"})


@pytest.mark.filterwarnings("ignore:tensorboard_log=.* is not used")
def test_a_file_does_not_say_where_to_write(saved: Path, tmp_path: Path) -> None:
    change_attributes(saved, tensorboard_log=str(tmp_path / "elsewhere"))

    assert TRPO.load(saved, device="cpu").tensorboard_log is None
    with pytest.warns(UserWarning, match=r"tensorboard_log=.*trust=True") as found:
        assert TRPO.load(saved, env="CartPole-v1", device="cpu").tensorboard_log is None
    assert [warning.filename for warning in found] == [__file__]
    assert TRPO.load(saved, device="cpu", trust=True).tensorboard_log == str(tmp_path / "elsewhere")
    assert TRPO.load(saved, device="cpu", tensorboard_log="logs").tensorboard_log == "logs"


@pytest.mark.parametrize(("name", "value"), [("_mine", 1), ("mine", th.nn.Tanh), ("mine", {"a": [th.nn.Tanh]})])
def test_unknown_attributes_are_left_out_with_a_warning(name: str, value: Any, tmp_path: Path) -> None:
    model = make()
    setattr(model, name, value)
    model.save(tmp_path / "model.zip")
    with pytest.warns(UserWarning, match=rf"\['{name}'\].*trust=True") as found:
        assert not hasattr(TRPO.load(tmp_path / "model.zip", device="cpu"), name)
    assert [warning.filename for warning in found] == [__file__]
    assert getattr(TRPO.load(tmp_path / "model.zip", device="cpu", trust=True), name) == value


def test_plain_data_of_the_users_own_is_loaded(tmp_path: Path) -> None:
    mine = {"numbers": [1, 2.5, None, True], "text": "a", "arrays": {"b": np.arange(3), "c": np.float32(1)}, "pair": (1, "x")}
    model = make()
    model.mine = mine  # type: ignore[attr-defined]
    model.save(tmp_path / "model.zip")
    loaded: Any = TRPO.load(tmp_path / "model.zip", device="cpu")
    assert repr(loaded.mine) == repr(mine)


def test_custom_objects_replace_only_what_there_is(saved: Path) -> None:
    model = TRPO.load(saved, device="cpu", custom_objects={"gamma": 0.5, "mine": 1.0})
    assert model.gamma == 0.5
    assert not hasattr(model, "mine")


def test_a_users_own_attributes_are_loaded_by_their_own_class(tmp_path: Path) -> None:
    class Mine(TRPO):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.mine = 0
            super().__init__(*args, **kwargs)

    model = Mine("MlpPolicy", "CartPole-v1", n_steps=N_STEPS, device="cpu")
    model.mine = 7
    model.save(tmp_path / "mine")
    assert Mine.load(tmp_path / "mine", device="cpu").mine == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_envs", "many"),
        ("num_timesteps", [1]),
        ("seed", -1),
        ("learning_rate", "x" * 10**6),
        ("target_kl", [[[1]]]),
        ("policy_class", "MlpPolicy"),
        ("ep_info_buffer", 3),
        ("use_sde", 1),
        ("observation_space", None),
        ("n_steps", 0),
    ],
)
def test_attributes_of_another_type_are_refused(name: str, value: Any, saved: Path) -> None:
    assert name in untrusted(saved, **{name: value})


@pytest.mark.parametrize("name", ["step", "__class__", "unwrapped", "a b"])
def test_a_state_cannot_replace_what_belongs_to_an_environment(name: str) -> None:
    env = gym.make("CartPole-v1").unwrapped
    state = [{"class": type(env).__name__, "values": {name: 1}, "physics": {}}]

    with pytest.raises(RefusedError, match=name):
        restore(env, pickle.dumps(state))
    assert name not in vars(env)


# ---- what the messages say


class Extractor(FlattenExtractor):
    pass


@pytest.mark.parametrize("activation", [functools.partial(th.nn.LeakyReLU, 0.2), lambda: th.nn.LeakyReLU(0.2)])
def test_a_refusal_says_the_call_that_loads_the_file(activation: Any, tmp_path: Path) -> None:
    kwargs = {"activation_fn": activation, "net_arch": [8]}
    make(policy_kwargs=kwargs).save(tmp_path / "model.zip")

    call = r"TRPO\.load\('.*model\.zip', custom_objects=\{'policy_kwargs': \{'activation_fn': \.\.\., 'net_arch': \.\.\.\}\}\)"
    with pytest.raises(UntrustedFileError, match=call) as error:
        TRPO.load(tmp_path / "model.zip", device="cpu")
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    loaded = TRPO.load(tmp_path / "model.zip", device="cpu", custom_objects={"policy_kwargs": kwargs})
    assert loaded.policy_kwargs == kwargs


def test_a_class_of_the_users_own_module_is_named(tmp_path: Path) -> None:
    kwargs = {"features_extractor_class": Extractor}
    make(policy_kwargs=kwargs).save(tmp_path / "model.zip")

    with pytest.raises(
        UntrustedFileError, match=r"Extractor.*custom_objects=\{'policy_kwargs': \{'features_extractor_class': "
    ):
        TRPO.load(tmp_path / "model.zip", device="cpu")
    loaded = TRPO.load(tmp_path / "model.zip", device="cpu", custom_objects={"policy_kwargs": kwargs})
    assert type(loaded.policy.features_extractor) is Extractor
