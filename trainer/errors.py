"""What a user can mend, said in one sentence, and the exit codes that the launcher acts on.

Invariant: a fault of the user's (a key, a file, a full disk) leaves as a UserError and ends with
code 2, without a traceback; every other exception is ours and keeps its traceback.
"""

import errno

DONE = 0
CRASHED = 1  # any other fault: retried a few times
USER = 2  # the config or the input: never retried
INTERRUPTED = 75  # saved and resumable: the same command goes on
GAVE_UP = 76  # the same crash again and again, without a new checkpoint


class UserError(Exception):
    """Bad input. `where` names the key or file, `what` the fault, `todo` the mend."""

    code = USER  # that a command ends with

    def __init__(self, where: str, what: str, todo: str):
        super().__init__(where, what, todo)
        self.where, self.what, self.todo = str(where), what, todo

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.todo}."


_STORAGE = {
    errno.ENOSPC: ("the disk is full", "free some space and give the same command again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and give the same command again"),
    errno.EROFS: ("the file system is read-only", "choose a writable directory"),
    errno.EACCES: ("permission denied", "choose a directory that you may write to"),
    errno.EPERM: ("operation not permitted", "choose a directory that you may write to"),
    errno.ENOTDIR: ("a file stands where a directory is needed", "move it or choose another path"),
    errno.EEXIST: ("a file stands where a directory is needed", "move it or choose another path"),
    errno.EISDIR: ("a directory stands where a file is needed", "move it or choose another path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EIO: ("the storage reports an I/O error", "check the disk, then give the command again"),
}


def storage_error(error: OSError) -> UserError | None:
    """The sentence for a fault of the storage, or None if `error` is of another kind."""
    if error.errno not in _STORAGE:
        return None
    what, todo = _STORAGE[error.errno]
    return UserError(str(error.filename or "storage"), what, todo)
