"""Errors a user can mend."""


class InputError(ValueError):
    """A wrong input, described in one line: the value, the rule and the remedy.

    Entry points print the line on stderr and exit with code 2, before anything compiles.
    """


def require(holds: bool, message: str) -> None:
    """Refuses an input.

    Args:
        holds: whether it keeps the rule.
        message: of the error otherwise.

    Raises:
        InputError: it does not.
    """
    if not holds:
        raise InputError(message)
