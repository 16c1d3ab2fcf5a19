"""Damage model files by their structure, and count what loading them does.

Half of the files are checkpoints, the others files of ``VecNormalize.save``. Each is changed in one to three places:
operations of a pickle, states of data types and of random generators, names of attributes, values, members of a zip. Every
load runs in a process with limits of memory and time and under an audit hook, which reports each attempt to run, write or
connect to anything; calls that leave a mark are among the operations.

    python benchmarks/fuzz_files.py --count 20000 --output benchmarks/results/fuzz_files.json
"""

import argparse
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_damage import Generator, change_pickle, damaged
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_trpo import TRPO, CorruptCheckpointError, NonFiniteError, UntrustedFileError, load_vec_normalize
from sb3_trpo.errors import MismatchError

NAMED = (CorruptCheckpointError, UntrustedFileError, NonFiniteError, MismatchError)
#: Limits of one file: seconds of CPU time, bytes of address space beyond what the process has at its start.
SECONDS, ADDRESS_SPACE = 20, 2**31
#: What a load may take: so many times the file, and 64 MB.
TIMES_FILE, BEYOND_FILE = 4, 64_000_000
BATCH = 2000
#: Audit events that no load may cause.
EVENTS = (
    "os.",
    "subprocess.",
    "shutil.",
    "socket.",
    "ctypes.",
    "pty.",
    "webbrowser.",
    "ftplib.",
    "urllib.",
    "exec",
    "compile",
)
HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv", "os.walk")


# ---- the process that loads


def _peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _load(path: Path, with_resume: bool) -> str:
    try:
        model = TRPO.load(path, device="cpu")
    except NAMED as error:
        outcome = type(error).__name__
    except ValueError as error:
        if "holds a model of" not in str(error):
            raise
        outcome = "another algorithm"
    else:
        model.predict(np.zeros((1, *model.observation_space.shape), np.float32))
        for _ in range(3):
            model.action_space.sample(), model.observation_space.sample()
        outcome = "loaded"
    if with_resume:
        try:
            TRPO.resume(path, VecNormalize(make_vec_env("Pendulum-v1", 1)), device="cpu")
        except NAMED as error:
            return f"resume: {type(error).__name__}"
        except ValueError as error:
            if "holds a model of" not in str(error):
                raise
            return "resume: another algorithm"
        np.random.random(2000), random.random()  # noqa: NPY002 - what was resumed is the legacy generator
        return "resumed"
    return outcome


def worker(folder: Path, start: int, end: int) -> None:
    """
    Load damaged files, and print a line of JSON for each.

    :param folder: where the whole file and the normalizer are, and where marks would be left
    :param start: number of the first file
    :param end: number after the last one
    """
    original, normalizer = (folder / "original.zip").read_bytes(), (folder / "normalizer.pkl").read_bytes()
    events: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "compile" and arguments[1] == "<unknown>":
            return  # NumPy reads the header of an array with ast.literal_eval
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if watching and (written or (event.startswith(EVENTS) and event not in HARMLESS)):
            events.append(event)

    path = folder / f"{start}.zip"
    path.write_bytes(original)
    _load(path, True)  # imports what it imports
    sys.addaudithook(watch)
    size = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
    for number in range(start, end):
        if number % 2:
            way, contents = "normalizer", change_pickle(normalizer, Generator(number))
        else:
            way, contents = damaged(original, number)
        path.write_bytes(contents)
        print(json.dumps({"number": number, "way": way}), flush=True)
        del events[:]
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_memory()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watching = True
            try:
                outcome = load_normalizer(path) if way == "normalizer" else _load(path, way == "resumption")
            except Exception as error:  # noqa: BLE001 - what else may come is what is counted
                outcome = f"unnamed: {type(error).__name__}: {error}"[:200]
            watching = False
            memory = _peak_memory() - before
        signal.setitimer(signal.ITIMER_PROF, 0)
        marks = sorted(file.name for file in Path.cwd().iterdir())
        result = {"outcome": outcome, "events": sorted({*events, *marks}), "memory": memory, "size": len(contents)}
        print(json.dumps(result), flush=True)


def load_normalizer(path: Path) -> str:
    """
    Load a damaged file of ``VecNormalize.save``.

    :param path: the file
    :return: what happened
    """
    try:
        normalizer = load_vec_normalize(path, make_vec_env("Pendulum-v1", 1))
    except NAMED as error:
        return type(error).__name__
    normalizer.observation_space.sample(), normalizer.action_space.sample()
    return "loaded"


# ---- the process that counts


def _originals(folder: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 1, seed=0))
    model = TRPO("MlpPolicy", env, n_steps=8, batch_size=8, critic_method="minibatch", seed=0, device="cpu").learn(16)
    model.save_checkpoint(folder / "original.zip")
    env.save(str(folder / "normalizer.pkl"))
    (folder / "here").mkdir()


def run_batch(folder: Path, start: int, end: int, counts: Counter[str], problems: list[dict[str, Any]]) -> int:
    """
    Load files in a process of their own.

    :param folder: where the whole file is
    :param start: number of the first file
    :param end: number after the last one
    :param counts: what happened, by name; added to
    :param problems: what should not have happened; added to
    :return: number of the file to go on with
    """
    command = [sys.executable, __file__, "--worker", str(folder), str(start), str(end)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder / "here")
    assert process.stdout is not None
    current: dict[str, Any] = {}
    while select.select([process.stdout], [], [], 10 * SECONDS)[0] and (line := process.stdout.readline()):
        result = json.loads(line)
        if "number" in result:
            current = result
            continue
        count(current, result, counts, problems)
        current = {"number": current["number"] + 1}
    if process.poll() is None and current.get("number", start) != end:
        process.kill()
    status = process.wait()
    if "way" in current:  # it did not come back from this one
        hung = status in (-signal.SIGPROF, -signal.SIGKILL)
        counts["hangs" if hung else "crashes"] += 1
        problems.append({**current, "status": status})
        return int(current["number"]) + 1
    if status != 0:
        raise RuntimeError(f"a worker failed before its first file, with status {status}")
    return end


def count(current: dict[str, Any], result: dict[str, Any], counts: Counter[str], problems: list[dict[str, Any]]) -> None:
    """
    Count what a file did.

    :param current: number of the file, and the way in which it was changed
    :param result: what happened
    :param counts: what happened, by name; added to
    :param problems: what should not have happened; added to
    """
    outcome = result["outcome"].partition(":")[0] if result["outcome"].startswith("unnamed") else result["outcome"]
    counts["files"] += 1
    counts[f"way: {current['way']}"] += 1
    counts[f"outcome: {outcome}"] += 1
    counts["executions"] += bool(result["events"])
    counts["unnamed errors"] += outcome == "unnamed"
    too_large = result["memory"] > TIMES_FILE * result["size"] + BEYOND_FILE
    counts["memory beyond the bound"] += too_large
    counts["most memory beyond the file, MB"] = max(
        counts["most memory beyond the file, MB"], (result["memory"] - TIMES_FILE * result["size"]) // 10**6
    )
    if result["events"] or too_large or outcome == "unnamed":
        problems.append({**current, **result})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="number of files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--output", type=Path, help="where to write the counts")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.worker[0]), *map(int, arguments.worker[1:]))
        return
    counts, problems, started = Counter[str](), list[dict[str, Any]](), time.perf_counter()
    for name in ("executions", "crashes", "hangs", "memory beyond the bound", "unnamed errors"):
        counts[name] = 0
    with tempfile.TemporaryDirectory() as name:
        _originals(Path(name))
        number, last = arguments.first, arguments.first + arguments.count
        while number < last:
            number = run_batch(Path(name), number, min(number + BATCH, last), counts, problems)
            result = {"counts": dict(sorted(counts.items())), "problems": problems[:50]}
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({**result, "seconds": round(time.perf_counter() - started)}, indent=2))


if __name__ == "__main__":
    main()
