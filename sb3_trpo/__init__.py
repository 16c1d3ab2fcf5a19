"""Trust Region Policy Optimization, and the natural policy gradient, for Stable-Baselines3."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_trpo.averaging import PolicyAverage as PolicyAverage
    from sb3_trpo.callbacks import CheckpointCallback as CheckpointCallback
    from sb3_trpo.callbacks import latest_checkpoint as latest_checkpoint
    from sb3_trpo.errors import CorruptCheckpointError as CorruptCheckpointError
    from sb3_trpo.errors import NonFiniteError as NonFiniteError
    from sb3_trpo.errors import RankError as RankError
    from sb3_trpo.errors import UntrustedFileError as UntrustedFileError
    from sb3_trpo.errors import WorkerError as WorkerError
    from sb3_trpo.export import export_onnx as export_onnx
    from sb3_trpo.maskable import MaskableTRPO as MaskableTRPO
    from sb3_trpo.npg import NPG as NPG
    from sb3_trpo.policies import CnnPolicy as CnnPolicy
    from sb3_trpo.policies import MlpPolicy as MlpPolicy
    from sb3_trpo.policies import MultiInputPolicy as MultiInputPolicy
    from sb3_trpo.recurrent import RecurrentTRPO as RecurrentTRPO
    from sb3_trpo.saving.env_state import ResumableEnv as ResumableEnv
    from sb3_trpo.saving.vec_normalize import load_vec_normalize as load_vec_normalize
    from sb3_trpo.saving.vec_normalize import save_vec_normalize as save_vec_normalize
    from sb3_trpo.trpo import TRPO as TRPO
    from sb3_trpo.vec_env.subproc import WatchedSubprocVecEnv as WatchedSubprocVecEnv

__version__ = (Path(__file__).parent / "version.txt").read_text(encoding="utf-8").strip()

#: Public name -> its module, imported when the name is first used: the command line answers without loading torch.
_MODULES = {
    "CheckpointCallback": "callbacks",
    "CnnPolicy": "policies",
    "CorruptCheckpointError": "errors",
    "MaskableTRPO": "maskable",
    "MlpPolicy": "policies",
    "MultiInputPolicy": "policies",
    "NPG": "npg",
    "NonFiniteError": "errors",
    "PolicyAverage": "averaging",
    "RankError": "errors",
    "RecurrentTRPO": "recurrent",
    "ResumableEnv": "saving.env_state",
    "TRPO": "trpo",
    "UntrustedFileError": "errors",
    "WatchedSubprocVecEnv": "vec_env.subproc",
    "WorkerError": "errors",
    "export_onnx": "export",
    "latest_checkpoint": "callbacks",
    "load_vec_normalize": "saving.vec_normalize",
    "save_vec_normalize": "saving.vec_normalize",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
