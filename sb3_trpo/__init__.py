"""Trust Region Policy Optimization, and the natural policy gradient, for Stable-Baselines3."""

from pathlib import Path

from sb3_trpo.callbacks import CheckpointCallback, latest_checkpoint
from sb3_trpo.errors import CorruptCheckpointError, NonFiniteError, RankError, UntrustedFileError, WorkerError
from sb3_trpo.export import export_onnx
from sb3_trpo.maskable import MaskableTRPO
from sb3_trpo.npg import NPG
from sb3_trpo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_trpo.recurrent import RecurrentTRPO
from sb3_trpo.saving.env_state import ResumableEnv
from sb3_trpo.saving.vec_normalize import load_vec_normalize, save_vec_normalize
from sb3_trpo.trpo import TRPO
from sb3_trpo.vec_env.subproc import WatchedSubprocVecEnv

__version__ = (Path(__file__).parent / "version.txt").read_text(encoding="utf-8").strip()

__all__ = [
    "NPG",
    "TRPO",
    "CheckpointCallback",
    "CnnPolicy",
    "CorruptCheckpointError",
    "MaskableTRPO",
    "MlpPolicy",
    "MultiInputPolicy",
    "NonFiniteError",
    "RankError",
    "RecurrentTRPO",
    "ResumableEnv",
    "UntrustedFileError",
    "WatchedSubprocVecEnv",
    "WorkerError",
    "__version__",
    "export_onnx",
    "latest_checkpoint",
    "load_vec_normalize",
    "save_vec_normalize",
]
