"""What happens to saved files: strangers' code in them, damage to them, faults while they are written."""

import base64
import io
import json
import os
import pickle
import random
import resource
import signal
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from support.arguments import effective

from sb3_trpo import (
    TRPO,
    CorruptCheckpointError,
    NonFiniteError,
    UntrustedFileError,
    load_vec_normalize,
    save_vec_normalize,
)
from sb3_trpo.saving.unpickling import RefusedError, restricted_loads

N_STEPS = 16


def make(algorithm: type[Any] = TRPO, env: Any = "CartPole-v1", **kwargs: Any) -> Any:
    kwargs = {
        "n_steps": N_STEPS,
        "seed": 0,
        "device": "cpu",
        **({} if algorithm is A2C else {"batch_size": N_STEPS}),
        **kwargs,
    }
    return algorithm("MlpPolicy", env, **effective(kwargs, algorithm))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.zip"
    make().learn(N_STEPS).save(path)
    return path


def rewrite(path: Path, changes: dict[str, bytes | None]) -> None:
    """Change members of a zip file; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in {**members, **changes}.items():
            if contents is not None:
                archive.writestr(name, contents)


def change_entry(path: Path, name: str, pickled: bytes) -> None:
    """Put a pickle in the place of an attribute."""
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    data[name] = {":type:": "?", ":serialized:": base64.b64encode(pickled).decode()}
    rewrite(path, {"data": json.dumps(data).encode()})


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call

    def __call__(self) -> None:
        """So that the pickler takes one for a function."""


# ---- code in files


def nested(trap: Calls) -> Calls:
    return Calls(pickle.loads, pickle.dumps(trap))


def cloudpickled(trap: Calls) -> Calls:
    return Calls(cloudpickle.loads, pickle.dumps(trap))


def by_getattr(trap: Calls) -> Calls:
    return Calls(Calls(getattr, Calls(__import__, "os"), "mkdir"), *trap.call[1])


def by_eval(trap: Calls) -> Calls:
    return Calls(eval, f"__import__('os').mkdir({trap.call[1][0]!r})")


def in_a_container(trap: Calls) -> Any:
    return {"net_arch": [64, {"pi": (trap,)}]}


@pytest.mark.parametrize("disguise", [lambda trap: trap, nested, cloudpickled, by_getattr, by_eval, in_a_container])
@pytest.mark.parametrize("entry", ["policy_kwargs", "_last_obs", "anything"])
def test_code_in_an_entry_does_not_run(disguise: Callable[[Calls], Any], entry: str, saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    change_entry(saved, entry, pickle.dumps(disguise(Calls(os.mkdir, str(mark)))))

    with pytest.raises(UntrustedFileError, match=entry) as refusal:
        TRPO.load(saved, device="cpu")
    assert str(saved) in str(refusal.value)
    assert "global" in str(refusal.value)
    assert "trust=True" in str(refusal.value)
    assert not mark.exists()

    replaced = TRPO.load(saved, device="cpu", custom_objects={entry: {}})
    assert not mark.exists()
    assert getattr(replaced, entry) == {}

    if disguise is not in_a_container and entry == "anything":
        TRPO.load(saved, device="cpu", trust=True)
        assert mark.exists()


def test_a_function_needs_trust_or_a_replacement(tmp_path: Path) -> None:
    make(learning_rate=lambda progress: 1e-3 * progress, critic_method="minibatch").save(tmp_path / "model")

    with pytest.raises(UntrustedFileError, match=r"'learning_rate'.*cloudpickle.*custom_objects.*trust=True"):
        TRPO.load(tmp_path / "model", device="cpu")
    assert TRPO.load(tmp_path / "model", device="cpu", trust=True).lr_schedule(0.5) == 5e-4
    assert TRPO.load(tmp_path / "model", device="cpu", custom_objects={"learning_rate": 0.1}).lr_schedule(0.5) == 0.1


def test_a_class_of_the_users_own_needs_trust(tmp_path: Path) -> None:
    class Extractor(FlattenExtractor):
        pass

    make(policy_kwargs={"features_extractor_class": Extractor}).save(tmp_path / "model")

    with pytest.raises(UntrustedFileError, match="policy_kwargs"):
        TRPO.load(tmp_path / "model", device="cpu")
    assert TRPO.load(tmp_path / "model", device="cpu", trust=True).policy_kwargs["features_extractor_class"] is not None


def test_sb3s_classes_may_be_named_but_not_called() -> None:
    assert restricted_loads(pickle.dumps(th.nn.ReLU)) is th.nn.ReLU
    with pytest.raises(RefusedError, match="Linear"):
        restricted_loads(pickle.dumps(Calls(th.nn.Linear, 10, 10)))


def build(target: bytes, state: bytes) -> bytes:
    """A pickle that fills in what the first one makes with what the second one makes."""
    return target[:-1] + state[2:-1] + pickle.BUILD + pickle.STOP


@pytest.mark.parametrize("kind", [gym.spaces.Box, th.nn.ReLU, np.ndarray, TRPO.policy_aliases["MlpPolicy"]])
def test_a_class_itself_cannot_be_changed(kind: type) -> None:
    poisoned = build(pickle.dumps(kind, protocol=2), pickle.dumps((None, {"poison": 1}), protocol=2))

    with pytest.raises(RefusedError):
        restricted_loads(poisoned)
    assert not hasattr(kind, "poison")


def test_numpys_data_types_cannot_be_changed() -> None:
    code = pickle.dumps(np.dtype(">f4"))

    assert restricted_loads(code) == np.dtype(">f4")
    assert np.dtype("f4").isnative


def array_maker() -> Any:
    """What pickles of arrays call, under its name in this version of NumPy."""
    return np.empty(0).__reduce__()[0]


@pytest.mark.parametrize(
    "bomb",
    [
        pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + (2**40).to_bytes(8, "little") + b"x.",
        pickle.PROTO + b"\x05" + pickle.LONG_BINPUT + b"\xff\xff\xff\xff.",
        pickle.dumps(Calls(bytearray, 2**40)),
        pickle.dumps(Calls(array_maker(), np.ndarray, (2**40,), b"b")),
    ],
)
def test_a_small_pickle_cannot_ask_for_much_memory(bomb: bytes) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, hard))
    try:
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            restricted_loads(bomb)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth", "another.pth"])
@pytest.mark.parametrize("trust", [False, True])
def test_code_in_parameters_never_runs(member: str, trust: bool, saved: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    th.save({"weight": Calls(os.mkdir, str(tmp_path / "it ran"))}, file)
    rewrite(saved, {member: file.getvalue()})

    # With trust, torch reads the file, and older versions do not name the call.
    is_named = not trust or th.__version__ >= "2.6"
    expected = UntrustedFileError if is_named else CorruptCheckpointError
    with pytest.raises(expected, match=rf"{member}.*{'mkdir' if is_named else 'Weights only'}"):
        TRPO.load(saved, device="cpu", trust=trust)
    assert not (tmp_path / "it ran").exists()


def normalized(n_envs: int = 1) -> VecNormalize:
    return VecNormalize(make_vec_env("CartPole-v1", n_envs))


def test_code_in_a_normalizer_does_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "normalizer.pkl"
    path.write_bytes(pickle.dumps(Calls(os.mkdir, str(mark))))

    with pytest.raises(UntrustedFileError, match=r"normalizer.pkl.*mkdir"):
        load_vec_normalize(path, make_vec_env("CartPole-v1"))
    assert not mark.exists()


def same_statistics(first: VecNormalize, second: VecNormalize) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for a, b in ((first.obs_rms, second.obs_rms), (first.ret_rms, second.ret_rms))
        for name in ("mean", "var", "count")
    )


def test_an_ordinary_normalizer_is_loaded(tmp_path: Path) -> None:
    env = normalized()
    make(env=env).learn(N_STEPS).save(tmp_path / "model")
    env.save(str(tmp_path / "theirs.pkl"))
    save_vec_normalize(env, str(tmp_path / "ours.pkl"))

    for path in (tmp_path / "theirs.pkl", tmp_path / "ours.pkl", tmp_path / "model.zip", tmp_path / "model"):
        assert same_statistics(load_vec_normalize(path, make_vec_env("CartPole-v1")), env)
    assert same_statistics(VecNormalize.load(str(tmp_path / "ours.pkl"), make_vec_env("CartPole-v1")), env)


@pytest.mark.parametrize("algorithm", [TRPO, sb3_contrib.TRPO])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_ordinary_files_need_no_trust(algorithm: type[Any], env: str, tmp_path: Path) -> None:
    kwargs = {"activation_fn": th.nn.ReLU, "optimizer_class": th.optim.RMSprop, "net_arch": {"pi": [8], "vf": [4]}}
    critic = {"critic_method": "minibatch"} if algorithm is TRPO else {}
    model = make(algorithm, env, policy_kwargs=kwargs, use_sde=env == "Pendulum-v1", tensorboard_log=tmp_path, **critic)
    model.learn(N_STEPS).save(tmp_path / "model")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = TRPO.load(tmp_path / "model", device="cpu")
    assert loaded.policy_kwargs == {**model.policy_kwargs}
    assert loaded.action_space == model.action_space


def test_sb3_reads_our_files(saved: Path) -> None:
    data, parameters, _ = load_from_zip_file(saved, device="cpu")

    assert data["n_steps"] == N_STEPS
    assert parameters.keys() == {"policy", "policy.optimizer"}
    model = make(seed=1)
    model.set_parameters(saved, device="cpu")
    assert th.equal(model.policy.action_net.weight, parameters["policy"]["action_net.weight"])


# ---- faults while saving


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_attribute_that_cannot_be_pickled_is_named_and_the_old_file_kept(saved: Path) -> None:
    before = listing(saved.parent)
    model = make()
    model.handle = threading.Lock()

    with pytest.raises(pickle.PicklingError, match=r"'handle'.*exclude=\['handle'\]"):
        model.save(saved)
    assert listing(saved.parent) == before
    model.save(saved, exclude=["handle"])
    assert TRPO.load(saved, device="cpu").n_steps == N_STEPS


@pytest.mark.parametrize("what", ["model", "checkpoint", "normalizer"])
def test_a_full_disk_leaves_the_old_file(what: str, tmp_path: Path) -> None:
    model = make(env=normalized()).learn(N_STEPS)
    path = tmp_path / "file.zip"
    save: dict[str, Callable[[], None]] = {
        "model": lambda: model.save(path),
        "checkpoint": lambda: model.save_checkpoint(path),
        "normalizer": lambda: save_vec_normalize(model.get_vec_normalize_env(), str(path)),
    }
    save[what]()
    before = listing(tmp_path)
    model.learn(N_STEPS)  # so that the new file would be another
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the system says EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))
    try:
        with pytest.raises(OSError, match="large"):
            save[what]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert listing(tmp_path) == before


def test_a_file_survives_kills_while_saving(tmp_path: Path) -> None:
    """50 processes that save in a loop are killed at random moments; each leaves a whole file."""
    path, model, generator = tmp_path / "model.zip", make(), random.Random(0)
    started = time.perf_counter()
    model.save(path)
    seconds = time.perf_counter() - started
    for _ in range(50):
        child = os.fork()
        if child == 0:
            while True:
                model.num_timesteps += 1
                model.save(path)
        time.sleep(generator.uniform(0.5, 3.0) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = TRPO.load(path, device="cpu").num_timesteps
        seconds *= 1.0 if saved > model.num_timesteps else 1.1  # a child's first save may be slow
        model.num_timesteps = saved
    assert model.num_timesteps > 0  # or else no kill came after a save


def test_links_folders_and_permissions_are_as_with_sb3(tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "new" / "folder" / "model")
    assert TRPO.load(tmp_path / "new" / "folder" / "model").n_steps == N_STEPS

    (tmp_path / "link.zip").symlink_to(tmp_path / "target.zip")
    model.save(tmp_path / "link.zip")
    assert (tmp_path / "link.zip").is_symlink()
    assert (tmp_path / "target.zip").is_file()

    (tmp_path / "taken.zip").mkdir()
    with pytest.warns(UserWarning, match="folder"):
        model.save(tmp_path / "taken.zip")
    assert (tmp_path / "taken.zip_2").is_file()

    (tmp_path / "plain").touch()
    assert (tmp_path / "target.zip").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- damaged files


def cut(contents: bytes) -> bytes:
    return contents[: len(contents) // 2]


def flip(contents: bytes) -> bytes:
    """Change a bit in the middle of the first member."""
    return contents[:400] + bytes([contents[400] ^ 1]) + contents[401:]


@pytest.mark.parametrize(
    ("damage", "member"),
    [(cut, "data"), (flip, "data"), (lambda _: b"", None), (lambda _: b"PK", None), (lambda _: b"\x80\x05N.", None)],
)
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], member: str | None, saved: Path) -> None:
    saved.write_bytes(damage(saved.read_bytes()))

    with pytest.raises(CorruptCheckpointError) as error:
        TRPO.load(saved, device="cpu")
    assert (error.value.path, error.value.member) == (saved, member)
    assert str(saved) in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("member", ["data", "policy.pth", "policy.optimizer.pth"])
@pytest.mark.parametrize("contents", [None, b"", b"{}", b"[1]", b"\x80\x05"])
def test_a_damaged_member_is_named(member: str, contents: bytes | None, saved: Path) -> None:
    rewrite(saved, {member: contents})

    with pytest.raises(CorruptCheckpointError, match=member) as error:
        TRPO.load(saved, device="cpu")
    assert error.value.member == member


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TRPO.load(tmp_path / "nothing")


@pytest.mark.parametrize("inner", [False, True])
def test_a_file_that_unpacks_to_much_more_is_refused(inner: bool, saved: Path) -> None:
    zeros, file = bytes(2**27), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("policy/data.pkl", zeros)
    if inner:
        rewrite(saved, {"policy.pth": file.getvalue()})
    else:
        saved.write_bytes(file.getvalue())

    with pytest.raises(CorruptCheckpointError, match="unpack to"):
        TRPO.load(saved, device="cpu")


def test_parameters_cannot_claim_elements_that_are_not_there(saved: Path) -> None:
    file = io.BytesIO()
    th.save({"weight": th.zeros(1).expand(2**40)}, file)
    rewrite(saved, {"policy.pth": file.getvalue()})

    with pytest.raises(CorruptCheckpointError, match="claims"):
        TRPO.load(saved, device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["policy", "optimizer"])
def test_weights_that_are_not_finite_are_refused(value: float, where: str, tmp_path: Path) -> None:
    model = make(critic_method="minibatch").learn(N_STEPS)
    with th.no_grad():
        if where == "policy":
            model.policy.value_net.bias[0] = value
        else:
            next(iter(model.policy.optimizer.state.values()))["exp_avg"].fill_(value)
    model.save(tmp_path / "model")

    with pytest.raises(NonFiniteError, match=r"model.*(value_net.bias|exp_avg).*allow_non_finite"):
        TRPO.load(tmp_path / "model", device="cpu")
    assert TRPO.load(tmp_path / "model", device="cpu", allow_non_finite=True).n_steps == N_STEPS


# ---- the wrong file, the wrong argument, the wrong environment


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_another_algorithms_file_is_refused(algorithm: type[Any], tmp_path: Path) -> None:
    make(algorithm).save(tmp_path / "model")

    with pytest.raises(ValueError, match=f"{algorithm.__name__}, not of TRPO"):
        TRPO.load(tmp_path / "model", device="cpu")


def test_a_subclass_is_the_same_algorithm(saved: Path, tmp_path: Path) -> None:
    class Mine(TRPO):
        pass

    assert type(Mine.load(saved, device="cpu")) is Mine
    Mine.load(saved, device="cpu").save(tmp_path / "mine")
    assert type(TRPO.load(tmp_path / "mine", device="cpu")) is TRPO


def test_a_misspelt_keyword_is_an_error(saved: Path) -> None:
    with pytest.raises(TypeError, match=r"'targetkl'.*'target_kl'"):
        TRPO.load(saved, device="cpu", targetkl=0.1)
    assert TRPO.load(saved, device="cpu", target_kl=0.1, tensorboard_log="logs", _n_updates=0).target_kl == 0.1


def test_an_environment_may_be_named_and_versions_printed(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TRPO.load(saved, env="CartPole-v1", device="cpu", print_system_info=True)

    assert model.learn(N_STEPS).num_timesteps == N_STEPS
    assert "SAVED MODEL SYSTEM INFO" in capsys.readouterr().out


def trained(env: VecEnv, path: Path) -> Path:
    make(env=env).learn(N_STEPS).save(path)
    return path


def test_an_environment_normalized_in_another_way_is_reported(tmp_path: Path) -> None:
    plain: VecEnv = make_vec_env("CartPole-v1")
    with_it, without = trained(normalized(), tmp_path / "with"), trained(plain, tmp_path / "without")

    with pytest.warns(UserWarning, match="does not have it"):
        TRPO.load(with_it, env=plain, device="cpu")
    with pytest.warns(UserWarning, match=r"loaded without.*load_vec_normalize"):
        TRPO.load(with_it, device="cpu")
    with pytest.warns(UserWarning, match="statistics"):
        TRPO.load(with_it, env=normalized(), device="cpu")
    with pytest.warns(UserWarning, match="trained without"):
        TRPO.load(without, env=normalized(), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TRPO.load(with_it, env=load_vec_normalize(with_it, make_vec_env("CartPole-v1")), device="cpu")
        TRPO.load(without, env=plain, device="cpu")
        TRPO.load(without, device="cpu")


def test_loading_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    make(env="Pendulum-v1", use_sde=True, seed=3).save(tmp_path / "model")
    random.seed(7), np.random.seed(7), th.manual_seed(7)  # noqa: NPY002
    expected = random.random(), np.random.random(), th.rand(1)  # noqa: NPY002

    random.seed(7), np.random.seed(7), th.manual_seed(7)  # noqa: NPY002
    TRPO.load(tmp_path / "model", env=DummyVecEnv([lambda: gym.make("Pendulum-v1")]), device="cpu")
    assert (random.random(), np.random.random(), th.rand(1)) == expected  # noqa: NPY002
