"""UserError, for problems that the user can fix, and the exit codes that the launcher acts on.

Invariant: a problem of the user's (a wrong key, a missing file, a full disk) is raised as a
UserError and ends the command with code 2 and one sentence, without a traceback. Every other
exception is a bug of this project and keeps its traceback.
"""

import errno

DONE = 0
CRASHED = 1  # any other error: the launcher tries again a few times
USER = 2  # the config or the input is wrong: never tried again
INTERRUPTED = 75  # saved: the same command resumes
GAVE_UP = 76  # too many crashes in a row without a new checkpoint


class UserError(Exception):
    """Wrong input. where: the key or file; what: what is wrong; todo: what to do."""

    code = USER  # exit code of the command

    def __init__(self, where: str, what: str, todo: str):
        super().__init__(where, what, todo)
        self.where, self.what, self.todo = str(where), what, todo

    def __str__(self) -> str:
        end = "" if self.todo.endswith("?") else "."
        return f"{self.where}: {self.what}; {self.todo}{end}"


_STORAGE = {
    errno.ENOSPC: ("the disk is full", "free some space and run the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run the same command again"),
    errno.EROFS: ("the file system is read-only", "choose a writable directory"),
    errno.EACCES: ("permission denied", "choose a directory that you may write to"),
    errno.EPERM: ("operation not permitted", "choose a directory that you may write to"),
    errno.ENOTDIR: ("is a file, but a directory is needed", "move it or choose another path"),
    errno.EEXIST: ("is a file, but a directory is needed", "move it or choose another path"),
    errno.EISDIR: ("is a directory, but a file is needed", "move it or choose another path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EIO: (
        "the storage reports an I/O error",
        "check the disk, then run the same command again",
    ),
}


def storage_error(error: OSError) -> UserError | None:
    """Return the UserError for a failure of the storage, or None for any other OSError."""
    if error.errno not in _STORAGE:
        return None
    what, todo = _STORAGE[error.errno]
    return UserError(str(error.filename or "storage"), what, todo)
