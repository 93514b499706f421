"""The errors that users see: one sentence, the value found, the cure. Anything else that is raised is our bug."""

import difflib
from collections.abc import Iterable


class FarssError(Exception):
    """Something went wrong that the user can understand. The command line prints it and exits with `exit_code`."""

    exit_code = 1


class UsageError(FarssError):
    """What the user gave cannot be used (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A key, a value or a combination of values in the configuration is wrong."""


class DataError(UsageError):
    """A data file is missing, unreadable, empty, or has no usable columns."""


class RowError(DataError):
    """A row of a table cannot be used; whoever read the table names its file (`farss.rows.naming`)."""


class ModelError(UsageError):
    """A model folder is missing or unreadable, or its architecture is not supported."""


class FolderError(UsageError):
    """An output folder belongs to another configuration, or holds something that is not ours."""


class NumericalError(FarssError):
    """A weight, an activation, a gradient or a loss is NaN or infinite."""


def first_line(error: BaseException) -> str:
    """What a library says of an error, for a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]


def nearest(name: str, known: Iterable[str]) -> str:
    """The cure for a wrong name: `did you mean X?`, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
