"""Addresses of servers, and what is secret in them: passwords, tokens and signatures.

An address with a secret is refused where it would be stored. It is written with the name of an
environment variable instead, which is read at each request, and never stored:

    https://$FORESCALE_SECRET_LOGIN@host/data     FORESCALE_SECRET_LOGIN=user:password
    https://host/data?$FORESCALE_SECRET_SAS       FORESCALE_SECRET_SAS='sv=...&sig=...'

Invariant: `masked` removes every secret that `secret_in` finds, and whole queries besides.
"""

import os
import re
from urllib.parse import parse_qsl, quote

PREFIX = "FORESCALE_SECRET_"
_NAME = re.compile(r"\$(" + PREFIX + r"\w+)")
_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://\S+")
# Parameters of a query that give access: of S3, Google, Azure, Hugging Face, CloudFront and others.
_GIVES_ACCESS = (
    r"(sig(nature)?|[\w-]*(token|secret|passw|pwd|credential|auth|api.?key|access.?key)[\w-]*"
    r"|[\w-]*key|jwt|session|x-(amz|goog)-[\w-]+|policy|key-pair-id|hmac|code)"
)
_SIGNED = re.compile(_GIVES_ACCESS, re.IGNORECASE)
_IN_TEXT = re.compile(r"(?<=://)[^\s/'\"<>|]*@")
_ONLY_NAME = r"(?!\$" + PREFIX + r"\w+(?![\w&=%]))"
_QUERY = re.compile(r"(://[^\s?'\"<>|]*)\?" + _ONLY_NAME + r"[^\s'\"<>|]*[^\s'\"<>|.,;:)\]}]")
_PARAMETER = re.compile(r"([?&]" + _GIVES_ACCESS + r"=)[^\s&'\"]+", re.IGNORECASE)
_SHORTEST = 4  # characters of a value that is looked for in texts


def secret_in(text: str) -> str | None:
    """Return what is secret in a text that is an address ("a password", ...), else None."""
    if not _ADDRESS.fullmatch(text):
        return None
    protocol, _, rest = _NAME.sub("", text).partition("://")
    place, _, query = rest.partition("#")[0].partition("?")
    user, at, _ = place.partition("/")[0].rpartition("@")
    if at and (user.partition(":")[2] or (user and protocol in ("http", "https"))):
        return "a user or a password"
    for name, value in parse_qsl(query):
        if _SIGNED.fullmatch(name) and value:
            return f"a secret ({name})"
    return None


def masked(text: str) -> str:
    """Return text without the users, passwords and queries of the addresses in it, for messages and
    files; nor the values of the variables that addresses name, wherever they stand."""
    for name, value in os.environ.items():
        if name.startswith(PREFIX) and len(value) >= _SHORTEST:
            for written in (value, value.removeprefix("?"), with_secrets(f"${name}@")[:-1]):
                text = text.replace(written, f"${name}")
    text = _QUERY.sub(r"\1?...", _IN_TEXT.sub(_without_user, text))
    return _PARAMETER.sub(r"\1...", text)


def _without_user(found: re.Match[str]) -> str:
    """A name of a variable is no secret."""
    return found[0] if _NAME.fullmatch(found[0][:-1]) else ""


def with_secrets(address: str) -> str:
    """Return an address with the variables that it names filled in, for a request alone. Raises
    LookupError with the name of one that is not set."""

    def value(found: re.Match[str]) -> str:
        if not (text := os.environ.get(found[1])):
            raise LookupError(found[1])
        if address[found.end() : found.end() + 1] == "@":
            user, mark, password = text.partition(":")
            return quote(user, safe="%") + mark + quote(password, safe="%")
        return text.removeprefix("?")

    return _NAME.sub(value, address)
