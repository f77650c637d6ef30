"""Experiments that compare objectives, run by `python -m flowrl_jax.experiments.NAME`."""
