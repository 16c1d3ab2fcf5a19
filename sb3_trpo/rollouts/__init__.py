"""Collecting experience: action sampling, environment stepping, evaluation of the rollout."""
