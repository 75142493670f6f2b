"""The two ways a command can end badly, each with its exit code."""


class InputError(ValueError):
    """Something the user gave is wrong: one line naming the thing, its value and what is allowed.

    The command line prints the message and exits with 2. Nothing has been overwritten when it is raised.
    """


class RunError(RuntimeError):
    """A run failed although its input was right; the command line exits with 1."""
