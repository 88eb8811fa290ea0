"""`urls`: documents of some sites are dropped, or only those of some are kept."""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.inputs import entries
from forescale.ground.errors import UserError

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//(?:[^/?#@]*@)?", re.IGNORECASE)
_DEFAULT_PORT = re.compile(r":(?:80|443)?$")
_NO_LETTER = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Urls:
    """Drops documents whose site or URL is in a list of `block`, is in none of `allow`, or whose
    URL has an entry of `substrings` inside. A list is a file of domains and URLs, one a line; a
    domain stands for its subdomains too. Substrings are compared by letters a to z and digits
    alone, as in datatrove 0.10 (URLFilter, FineWeb's), without its lists. Documents without a URL
    stay."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "lists of the user; substrings as in datatrove 0.10 (URLFilter)"
    FILES: ClassVar[tuple[str, ...]] = ("block", "allow", "substrings")

    block: tuple[str, ...] = ()  # files
    allow: tuple[str, ...] = ()  # files
    substrings: tuple[str, ...] = ()  # files

    def check(self) -> None:
        for name in ("block", "allow", "substrings"):
            if isinstance(getattr(self, name), str):
                raise UserError(f"urls.{name}", "is one text", "give a list of files: [FILE, ...]")
        if not (self.block or self.allow or self.substrings):
            problem = "has no list, so it keeps every document"
            raise UserError("urls", problem, "give files as block, allow or substrings")
        self._lists()

    def __call__(self, draft: Draft) -> str | None:
        if not draft.url:
            return None
        block, allow, substrings = self._lists()
        host, page = _parts(draft.url)
        if block:
            if _has_domain(block[0], host):
                return "blocked domain"
            if page in block[1]:
                return "blocked url"
        if allow and not (_has_domain(allow[0], host) or page in allow[1]):
            return "not an allowed url"
        if substrings and substrings.search(_NO_LETTER.sub("", draft.url.lower())):
            return "blocked substring"
        return None

    def _lists(self) -> tuple["Index | None", "Index | None", re.Pattern[str] | None]:
        return (
            _index("urls.block", tuple(self.block)) if self.block else None,
            _index("urls.allow", tuple(self.allow)) if self.allow else None,
            _pattern(tuple(self.substrings)) if self.substrings else None,
        )


Index = tuple[frozenset[str], frozenset[str]]  # domains, and URLs as host and path


def _parts(url: str) -> tuple[str, str]:
    """Return the host of a URL, and the host with path and query: without scheme, user, www.,
    fragment, usual port and last slash."""
    match = _URL.match(url)
    rest = url[match.end() if match else 0 :].partition("#")[0]
    end = min((place for mark in "/?" if (place := rest.find(mark)) >= 0), default=len(rest))
    host = _DEFAULT_PORT.sub("", rest[:end].lower()).rstrip(".").removeprefix("www.")
    if not host.isascii():
        with suppress(UnicodeError):  # no name that the network knows is compared as it stands
            host = host.encode("idna").decode()
    return host.partition(":")[0], host + rest[end:].rstrip("/")


def _has_domain(domains: frozenset[str], host: str) -> bool:
    labels = host.split(".")
    return any(".".join(labels[i:]) in domains for i in range(max(len(labels) - 8, 0), len(labels)))


@lru_cache(4)
def _index(setting: str, paths: tuple[str, ...]) -> Index:
    domains: set[str] = set()
    pages: set[str] = set()
    for path in paths:
        for entry in entries(setting, path):
            host, page = _parts(entry)
            if _URL.match(entry) or page != host:
                pages.add(page)
            else:
                domains.add(host)
    return frozenset(domains), frozenset(pages)


@lru_cache(4)
def _pattern(paths: tuple[str, ...]) -> re.Pattern[str] | None:
    lines = {line.lower() for path in paths for line in entries("urls.substrings", path)}
    texts = sorted({_NO_LETTER.sub("", line) for line in lines} - {""})
    return re.compile("|".join(texts)) if texts else None
