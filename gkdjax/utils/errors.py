"""Errors by who has to act; each class carries the exit code of the process."""


class GkdjaxError(Exception):
    """Base of all errors that end a run with one readable message and no traceback."""

    exit_code = 1


class UserError(GkdjaxError, ValueError):
    """The user can mend it: a config value, a data row, a model directory."""

    exit_code = 2


class NotWritten(UserError):
    """A disk that takes no more: it is full, over a quota, broken, or may only be read.

    Once a run has a checkpoint it ends with `Preempted` instead.
    """


class TrainingFailure(GkdjaxError):
    """A numerical or data failure in the middle of a run."""

    exit_code = 3


class Preempted(GkdjaxError):
    """Asked to stop; the state is saved, and the same command continues."""

    exit_code = 75


class Interrupted(Preempted):
    """Asked to stop by Ctrl-C."""

    exit_code = 130


class TeacherRefused(UserError):
    """A server refused, and would refuse again: a wrong key, model, address or request."""


class WrongAnswer(TrainingFailure):
    """A server's answer that cannot be right; it is neither stored nor used."""


class TeacherUnreachable(GkdjaxError):
    """A server stayed away longer than the config allows."""

    exit_code = 4


class StorageUnreachable(GkdjaxError):
    """Object storage stayed away; the same command goes on from what was saved there."""

    exit_code = 75


class CoordinatorUnreachable(GkdjaxError):
    """The processes of a run did not find each other in time."""

    exit_code = 4


def one_line(error: BaseException, longest: int = 300) -> str:
    """Shortens another library's message to one line of at most `longest` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."
