"""Trust Region Policy Optimization, and the natural policy gradient, for Stable-Baselines3."""

from pathlib import Path

from sb3_trpo.maskable import MaskableTRPO
from sb3_trpo.npg import NPG
from sb3_trpo.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_trpo.recurrent import RecurrentTRPO
from sb3_trpo.trpo import TRPO

__version__ = (Path(__file__).parent / "version.txt").read_text(encoding="utf-8").strip()

__all__ = ["NPG", "TRPO", "CnnPolicy", "MaskableTRPO", "MlpPolicy", "MultiInputPolicy", "RecurrentTRPO", "__version__"]
