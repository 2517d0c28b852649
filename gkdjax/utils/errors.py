"""What can go wrong, by whose turn it is to act: each class carries the process's exit code."""


class GkdjaxError(Exception):
    """Base of all errors that end a run with one readable message and no traceback."""

    exit_code = 1


class UserError(GkdjaxError, ValueError):
    """The user can mend it: a config value, a data row, a model directory."""

    exit_code = 2


class TrainingFailure(GkdjaxError):
    """A numerical or data failure in the middle of a run."""

    exit_code = 3


class Preempted(GkdjaxError):
    """Asked to stop (SIGTERM); the state is saved, and the same command continues."""

    exit_code = 75


class TeacherRefused(UserError):
    """A server said no, and would say it again: a wrong key, model, address or request."""


class WrongAnswer(TrainingFailure):
    """A server's answer that cannot be what it is said to be; it is neither stored nor used."""


class TeacherUnreachable(GkdjaxError):
    """A server stayed away longer than the config allows."""

    exit_code = 4


class CoordinatorUnreachable(GkdjaxError):
    """The processes of a run did not find each other in the time that they were given."""

    exit_code = 4


def one_line(error: BaseException, longest: int = 300) -> str:
    """What another library's error says, for a message of ours: in one line, cut at `longest`."""
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."
