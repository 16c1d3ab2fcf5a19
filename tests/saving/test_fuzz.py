"""Random damage to files, and random arguments: nothing but named errors.

``SB3_TRPO_FUZZ=2000`` sets how many files are damaged, and how many sets of arguments are tried.
"""

import base64
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo import TRPO, CorruptCheckpointError, NonFiniteError, UntrustedFileError, load_vec_normalize
from sb3_trpo.errors import MismatchError

COUNT = int(os.environ.get("SB3_TRPO_FUZZ", "150"))
SAMPLE = COUNT // 3
NAMED = (CorruptCheckpointError, UntrustedFileError, NonFiniteError)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "model.zip"
    env = VecNormalize(make_vec_env("Pendulum-v1", 2))
    model = TRPO("MlpPolicy", env, n_steps=8, batch_size=16, critic_method="minibatch", device="cpu").learn(16)
    model.save_checkpoint(path)
    return path.read_bytes()


def damage(contents: bytes, generator: random.Random) -> bytes:
    """Change a few bytes, leave some out, repeat some, or cut the rest off."""
    data = bytearray(contents)
    for _ in range(generator.choice([1, 1, 2, 8])):
        if not data:
            break
        place, length = generator.randrange(len(data)), generator.randrange(1, 64)
        kind = generator.randrange(6)
        if kind == 0:
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1:
            data[place : place + length] = generator.randbytes(length)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            data[place : place + 8] = b"\xff" * 8
        else:
            del data[place:]
    return bytes(data)


def damage_file(contents: bytes, generator: random.Random) -> bytes:
    return damage(contents, generator)


def damage_member(contents: bytes, generator: random.Random) -> bytes:
    """Damage a member, and give it the right check sum; parameters are themselves zip files."""
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = generator.choice(sorted(members))
    inner = name.endswith((".pth", ".npz")) and generator.random() < 0.5
    members[name] = damage_member(members[name], generator) if inner else damage(members[name], generator)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return file.getvalue()


def damage_entry(contents: bytes, generator: random.Random) -> bytes:
    """Damage a pickle inside the attributes, or swap the values of two attributes."""
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(members["data"])
    pickled = [name for name, entry in data.items() if isinstance(entry, dict) and ":serialized:" in entry]
    if generator.random() < 0.7:
        entry = data[generator.choice(pickled)]
        entry[":serialized:"] = base64.b64encode(damage(base64.b64decode(entry[":serialized:"]), generator)).decode()
    else:
        first, second = generator.sample(sorted(data), 2)
        data[first], data[second] = data[second], data[first]
    members["data"] = json.dumps(data).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member, part in members.items():
            archive.writestr(member, part)
    return file.getvalue()


@pytest.mark.parametrize("way", [damage_file, damage_member, damage_entry])
def test_damaged_files_end_in_named_errors(
    way: Callable[[bytes, random.Random], bytes],
    original: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator, counts, most = random.Random(way.__name__), Counter[str](), 0
    path = tmp_path / "model.zip"
    here = tmp_path / "here"  # where code in a file would leave its traces
    here.mkdir()
    monkeypatch.chdir(here)
    tracemalloc.start()
    for _ in range(COUNT // 3):
        path.write_bytes(way(original, generator))
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                TRPO.load(path, device="cpu")
                counts["loaded"] += 1
            except NAMED as error:
                counts[type(error).__name__] += 1
            try:
                TRPO.resume(path, VecNormalize(make_vec_env("Pendulum-v1", 2)), device="cpu")
                counts["resumed"] += 1
            except (*NAMED, MismatchError) as error:
                counts[f"resume: {type(error).__name__}"] += 1
            try:
                load_vec_normalize(path, make_vec_env("Pendulum-v1", 2))
            except NAMED:
                counts["normalizer refused"] += 1
        most = max(most, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    print(way.__name__, dict(counts), f"peak of {most / len(original):.1f} times the file")
    assert not list(here.iterdir())
    assert most < 4 * len(original) + 2**22


def test_files_damaged_by_structure_do_nothing(tmp_path: Path) -> None:
    """A small sample of the 20,000 files of ``benchmarks/results/fuzz_files.json``."""
    script = Path(__file__).parents[2] / "benchmarks" / "fuzz_files.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    command = [
        sys.executable,
        str(script),
        "--count",
        str(SAMPLE),
        "--first",
        "100000",
        "--output",
        str(tmp_path / "counts.json"),
    ]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=600)

    result = json.loads((tmp_path / "counts.json").read_text())
    assert result["problems"] == []
    assert result["counts"]["files"] == SAMPLE
    assert result["counts"]["outcome: UntrustedFileError"] > 0


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(0.0, 1.0),
    st.sampled_from(["kfac", "gauss_newton", "minibatch", "adam", "auto", np.float32(0.5), np.int64(4), (), 1j]),
)


LARGE = 64  # more steps, updates or iterations than this are allowed, and take too long for a test


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(arguments=st.dictionaries(st.sampled_from(sorted(TRPO.argument_rules)), VALUES, min_size=1, max_size=3))
def test_arguments_are_refused_by_name_or_train(arguments: dict[str, Any]) -> None:
    large = [name for name, value in arguments.items() if isinstance(value, (int, np.integer)) and value > LARGE]
    assume("n_steps" not in large)  # the constructor makes the buffer
    small = {"n_steps": 8, "batch_size": 8, "device": "cpu", "seed": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = ""
        try:
            model = TRPO("MlpPolicy", gym.make("Pendulum-v1"), **{**small, **arguments})
        except ValueError as error:
            refused = str(error)
        if refused:
            assert any(f"{name}=" in refused for name in arguments)
            return
        if not large:
            model.learn(2 * model.n_steps)
    assert all(bool(np.isfinite(p.detach().numpy()).all()) for p in model.policy.parameters())
