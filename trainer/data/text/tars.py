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
from typing import BinaryIO, cast

from forescale.data.text.documents import Document, Policy, ReadingReport, decoded
from forescale.data.text.inputs import PLAIN, clean
from forescale.data.text.lines import TextKey, json_document, lines_between, read_lines
from forescale.data.text.opening import Blocks, bare, open_stream, reading, shown, unpacked
from forescale.errors import UserError

_BLOCK = 1 << 16
_SUFFIXES = 8  # maximum number named in a message


class BrokenTarError(EOFError):
    """Damage of a tar; not a tarfile.HeaderError, which TarFile.next takes for the end of the
    archive."""


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


class _Tar(tarfile.TarFile):
    tarinfo = _Header
    at_end = False


def read_tar(
    name: str, where: str, key: str, report: ReadingReport, policy: Policy
) -> Iterator[Document]:
    """Yield a document for every .txt, .md, .py and .json member, and for every line of a .jsonl
    member.

    They are named like "00000.tar/000123.txt". Members may be compressed (.gz, .zst). Raises
    UserError for a damaged tar, and for one without any text member.
    """
    text_key = TextKey(key)
    plain, others = 0, Counter[str]()
    for path, f in _members(name, where, report):
        full, stem = f"{name}/{path}", bare(path)
        stream = io.BufferedReader(Blocks(where, unpacked(path, f)))
        if stem.endswith(PLAIN):
            plain += 1
            yield from decoded(full, stream.read(), report, policy)
        elif stem.endswith(".json"):
            yield from json_document(full, stream.read(), text_key, report, policy)
        elif stem.endswith(".jsonl"):
            yield from read_lines(full, lines_between(stream), text_key, report, policy)
        else:
            others[PurePosixPath(path).suffix or path] += 1
            report.add("other suffix", full)
    if not plain:
        text_key.check(shown(where), "member")
    if not plain and not text_key.rows:
        if not others:
            yield from decoded(name, b"", report, policy)
            return
        ends = ", ".join(suffix for suffix, _ in others.most_common(_SUFFIXES))
        what = f"holds no text: its members end in {ends}"
        raise UserError(shown(where), what, "expected .txt .md .py .json or .jsonl")


def _members(name: str, where: str, report: ReadingReport) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the regular files of a tar with their paths in it; each must be read before the
    next."""
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
                report.add("hidden", f"{name}/{path}")
            elif member.isreg():
                yield path, cast(BinaryIO, tar.extractfile(member))
            elif not member.isdir():
                report.add("no regular file", f"{name}/{path}")
        _expect_end(tar)


def _expect_end(tar: _Tar) -> None:
    """Check that after the zero block just read there is another one, and only zeros up to the
    end."""
    rest = cast(BinaryIO, tar.fileobj)
    if len(block := rest.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise BrokenTarError("its end is missing")
    while block:
        if block.strip(b"\0"):
            raise BrokenTarError("something follows its end: two tars joined?")
        block = rest.read(_BLOCK)
