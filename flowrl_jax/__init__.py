"""FlowRL in JAX: reinforcement learning of language models by matching a reward distribution."""
