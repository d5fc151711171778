"""The errors a person can mend. ``main.py`` prints them as one line and leaves with their exit
code; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something about the input, the options or the machine; the message says what to do."""

    exit_code = 2


class OptionError(UserError):
    """An option that can't be used as it was given. The message names the option and the fix."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"--{option.replace('_', '-')}: {message}")
        self.option = option
        self.message = message

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Errors travel between processes.
        return type(self), (self.option, self.message)


class DataError(UserError):
    """A data set or a picture that can't be read; the message names the file."""


class CheckpointError(UserError):
    """A checkpoint that can't be read, or that belongs to another model or data set."""


class DivergedError(UserError):
    """Training met a loss or gradient that is not finite and was told to stop."""

    exit_code = 3


class PeerError(UserError):
    """Another process of the run failed, or is gone; the message names it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class OutOfMemoryError(UserError):
    """The device or the host has too little memory; the message says what helps."""
