"""Errors a user can mend."""


class InputError(ValueError):
    """A wrong input, described in one line: the value, the rule and the remedy.

    Entry points print the line on stderr and exit with code 2, before anything compiles.
    """
