"""Text in pieces, for what can't take it whole: cut after lines, or else between characters."""

from collections.abc import Iterator


def cut(text: bytes, start: int, size: int) -> int:
    """The end of a piece of UTF-8 that begins at `start` and holds at most `size` bytes: after a
    line, or where the second half of the piece has no line end, between two characters."""
    end = start + size
    if end >= len(text):
        return len(text)
    if (line := text.rfind(b"\n", start + size // 2, end)) >= 0:
        return line + 1
    while text[end] & 0xC0 == 0x80 and end > start:
        end -= 1
    return end if end > start else len(text)


def pieces(text: bytes, size: int) -> Iterator[str]:
    """The text in pieces of at most `size` bytes (4 or more); joined they are the text."""
    start = 0
    while True:
        end = cut(text, start, size)
        yield text[start:end].decode("utf-8")
        if end == len(text):
            return
        start = end
