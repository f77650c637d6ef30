"""What the kernels of decoding that cannot do all refuse."""

from typing import Any

from flowrl_jax.errors import InputError
from flowrl_jax.models import decode_native, decode_triton

_REFUSALS = {"triton": decode_triton.refusal, "native": decode_native.refusal}


def refusal(kernel: str, **case: Any) -> str:
    """Why a kernel cannot decode; empty where it can.

    Args:
        kernel: a value of `model.decode_kernel`.
        case: as far as it is known: `head_dim`, of a head; `softcap`, of the scores, 0 for none;
            `dtype`, of activations; `kept`, of keys and values, that of activations by default.
    """
    return _REFUSALS[kernel](**case) if kernel in _REFUSALS else ""


def require_support(kernel: str, **case: Any) -> None:
    """Refuses to take a kernel for what it cannot do.

    Args:
        kernel: as in `refusal`.
        case: as in `refusal`.

    Raises:
        InputError: with the reason and the remedy.
    """
    reason = refusal(kernel, **case)
    if reason:
        raise InputError(f"model.decode_kernel={kernel!r} {reason}: use 'auto' or 'xla'")
