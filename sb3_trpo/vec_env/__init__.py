"""Vectorized environments: watched subprocesses and EnvPool."""
