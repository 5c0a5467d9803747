"""What can go wrong, by whose hand, and the exit code that says so.

Every error a user can meet is one of these: its message says what happened, where, the value that was seen and what to
do about it. The launchers print the message alone, without a traceback, and leave with `exit_code`.
"""

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_STOPPED = 75
"""Stopped on request and resumable (EX_TEMPFAIL): type the same command again."""


class VitruvianError(Exception):
    """Base of all errors that are reported as one line."""

    exit_code = EXIT_FAILURE


class ConfigError(VitruvianError):
    """The configuration is wrong: unknown key, wrong type, impossible combination."""

    exit_code = EXIT_USER


class DataError(VitruvianError):
    """Data that was read is missing, malformed or too often broken."""

    exit_code = EXIT_USER


class ArtifactError(VitruvianError):
    """An artifact is missing, damaged, ambiguous, or does not fit the stage that wants it."""

    exit_code = EXIT_USER


class CheckpointError(VitruvianError):
    """A resume point can't be read, or can't be continued as asked."""


class StorageError(VitruvianError):
    """The storage can't be reached, or what lies there is not what should."""


class Stopped(VitruvianError):
    """The stage was asked to stop, saved a resume point and left."""

    exit_code = EXIT_STOPPED


class StopNow(BaseException):
    """A signal asked a stage that doesn't train to stop. Not an Exception: reading an image catches all of those."""
