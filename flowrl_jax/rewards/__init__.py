"""Rewards: judgements of a response that tasks are made of."""
