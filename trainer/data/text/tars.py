"""Text members of a webdataset tar, read from beginning to end.

Invariant: a tar gives all its members or raises UserError. webdataset and tarfile silently take a
damaged header, or the end of a file that was truncated between two members, for the end of the
archive; here only the two zero blocks that end every archive count as its end.
"""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from forescale.data.text.documents import Document, Intake
from forescale.data.text.formats import TextKey, read_json, read_lines, read_plain
from forescale.data.text.opening import (
    KNOWN,
    Blocks,
    Total,
    bare,
    clean,
    is_text,
    kind_of,
    open_stream,
    printable,
    reading,
    unpacked,
)
from forescale.ground.errors import UserError

_BLOCK = 1 << 16
_HEADER = 1 << 20  # bytes of all headers of one member
_SUFFIXES = 8  # maximum number named in a message


class BrokenTarError(EOFError):
    """Damage of a tar; TarFile.next takes a tarfile.HeaderError for the end of the archive."""


class _Headers:
    """The file of a tar, which gives at most _HEADER bytes of headers for one member: a header can
    claim any length, and tarfile would hold it."""

    def __init__(self, f: BinaryIO):
        self._f = f
        self.left: int | None = None  # bytes of headers that may still be read; None: of members

    def __getattr__(self, name: str) -> Any:
        return getattr(self._f, name)

    def read(self, size: int) -> bytes:
        if self.left is not None:
            self.left -= size
            if self.left < 0:
                raise BrokenTarError(f"a header has more than {_HEADER:,} bytes")
        return self._f.read(size)


class BoundedTar(tarfile.TarFile):
    """A tar, open for reading. A member whose headers are too long raises BrokenTarError."""

    def __init__(self, name: Any = None, mode: Any = "r", fileobj: Any = None, **options: Any):
        super().__init__(name, mode, cast(Any, _Headers(fileobj)), **options)

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member, or None at the end."""
        headers = cast(_Headers, self.fileobj)
        headers.left = _HEADER
        try:
            return super().next()
        finally:
            headers.left = None


class _Header(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            tar.at_end = True
            raise
        except (tarfile.HeaderError, ValueError) as e:
            raise BrokenTarError(str(e)) from e


class _Tar(BoundedTar):
    tarinfo = _Header
    at_end = False


def read_tar(intake: Intake, name: str, where: str) -> Iterator[Document]:
    """Yield a document for every member of text or .json, and for every line of a .jsonl member.

    They are named like "00000.tar/000123.txt". Members may be compressed (.gz, .zst). Raises
    UserError for a damaged tar, and for one without any text member.
    """
    text_key = TextKey(intake.key)
    plain, others, total = 0, Counter[str](), Total(where)
    for path, f in _members(intake, name, where):
        full, kind = f"{name}/{path}", kind_of(path, intake.suffixes)
        stream: io.BufferedReader = io.BufferedReader(Blocks(where, unpacked(path, f, total)))
        if kind in ("plain", "html", "bare"):
            if kind == "bare" and not is_text(stream):
                others["no suffix"] += 1
            else:
                plain += 1
            yield from read_plain(intake, full, where, stream, kind)
        elif bare(path).endswith(".json"):
            yield from read_json(intake, full, where, stream, text_key)
        elif kind == "lines":
            yield from read_lines(intake, full, where, stream, text_key)
        else:
            others[PurePosixPath(path).suffix or path] += 1
            intake.report.add("other suffix", full)
    if plain:
        return
    text_key.check(printable(where), "member")
    if others and not text_key.rows:
        ends = ", ".join(suffix for suffix, _ in others.most_common(_SUFFIXES))
        problem = f"holds no text: its members end in {ends}"
        raise UserError(printable(where), problem, f"expected {KNOWN}")
    if not text_key.rows:
        yield from intake.documents(name, b"")


def _members(intake: Intake, name: str, where: str) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the regular files of a tar with their paths; each must be read before the next."""
    with (
        open_stream(name, where) as f,
        reading(where),
        # Without an encoding, names would be decoded by this machine's locale.
        _Tar.open(fileobj=f, mode="r|", encoding="utf-8") as tar,
    ):
        while not tar.at_end and (member := tar.next()):
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise all headers stay in memory
            path = clean(member.name.removeprefix("./"))
            if PurePosixPath(path).name.startswith("."):
                intake.report.add("hidden", f"{name}/{path}")
            elif member.isreg():
                yield path, cast(BinaryIO, tar.extractfile(member))
            elif not member.isdir():
                intake.report.add("no regular file", f"{name}/{path}")
        # After the zero block just read there must be another one, and only zeros up to the end.
        rest = cast(BinaryIO, tar.fileobj)
        if len(block := rest.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise BrokenTarError("its end is missing")
        while block:
            if block.strip(b"\0"):
                raise BrokenTarError("something follows its end: two tars joined?")
            block = rest.read(_BLOCK)
