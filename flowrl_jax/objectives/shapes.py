"""Shape checks at the door of every loss: a broadcast would be a wrong loss, not an error."""

import jax


def check_shapes(
    logprobs: jax.Array, *, per_token: dict[str, jax.Array], per_response: dict[str, jax.Array]
) -> None:
    """Refuses arrays that do not fit the log-probabilities.

    Args:
        logprobs: `[B, T]`.
        per_token: arrays, by name, that must be `[B, T]`.
        per_response: arrays, by name, that must be `[B]`.

    Raises:
        ValueError: with the name, the shape and what it should be.
    """
    wanted = dict.fromkeys(per_token, logprobs.shape)
    wanted |= dict.fromkeys(per_response, logprobs.shape[:1])
    for name, array in (per_token | per_response).items():
        if array.shape != wanted[name]:
            raise ValueError(
                f"{name} has shape {array.shape}, but logprobs {logprobs.shape} ask for"
                f" {wanted[name]}"
            )
