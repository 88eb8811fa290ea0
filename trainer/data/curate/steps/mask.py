"""`mask`: personal data are replaced by placeholders."""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_network
from typing import ClassVar

from forescale.data.curate.step import Draft
from forescale.ground.errors import UserError

Span = tuple[int, int]


@dataclass(frozen=True)
class Mask:
    """Replaces personal data by placeholders, drops nothing: mail addresses and public IP addresses
    as FineWeb does (Penedo et al. 2024, arXiv 2406.17557; datatrove 0.10, PIIFormatter), and IPv6
    addresses, phone numbers and secrets. The placeholders of a kind take turns, from the first in
    each document; a kind without placeholders stays. Attributes masked_mail, ... count what was
    replaced. Phone numbers are those like +49 30 1234567, (212) 555-0123 and 212-555-0123. Secrets
    are private keys in PEM and tokens of AWS, GitHub, GitLab, Google, Hugging Face, OpenAI, Slack
    and Stripe, which are told by their first characters."""

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "Penedo et al. 2024, arXiv 2406.17557; datatrove 0.10 (PIIFormatter)"

    # Defaults of mail and ipv4 are FineWeb's (PIIFormatter); 2001:db8:: is kept for documentation.
    mail: tuple[str, ...] = ("email@example.com", "firstname.lastname@example.org")
    ipv4: tuple[str, ...] = (
        *("22.214.171.124", "126.96.36.199", "188.8.131.52"),
        *("184.108.40.206", "220.127.116.11", "18.104.22.168"),
    )
    ipv6: tuple[str, ...] = ("2001:db8::1",)
    phone: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()

    def check(self) -> None:
        for name in _FINDERS:
            if isinstance(getattr(self, name), str):
                raise UserError(
                    f"mask.{name}", "is one text", "give a list of placeholders: [TEXT]"
                )

    def __call__(self, draft: Draft) -> str | None:
        for name, find in _FINDERS.items():
            placeholders = getattr(self, name)
            if placeholders and (spans := list(find(draft.text))):
                draft.text = _replaced(draft.text, spans, placeholders)
                draft.attributes[f"masked_{name}"] = len(spans)
        return None


def _replaced(text: str, spans: list[Span], placeholders: tuple[str, ...]) -> str:
    parts = []
    end = 0
    for i, (start, stop) in enumerate(spans):
        parts += [text[end:start], placeholders[i % len(placeholders)]]
        end = stop
    return "".join([*parts, text[end:]])


# Each repetition in a pattern is bounded, so time is linear in the length of the text.
_LOCAL = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+/=?^_`{|}~.-"
_LONGEST_LOCAL = 128  # RFC 5321: 64; addresses of lists are longer
_DOMAIN = re.compile(
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,10}"
    r"[A-Za-z](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])"
)


def _mails(text: str) -> Iterator[Span]:
    end = 0
    for domain in _DOMAIN.finditer(text):
        at = domain.start()
        before = text[max(end, at - _LONGEST_LOCAL) : at]
        local = before[len(before.rstrip(_LOCAL)) :].rpartition("..")[2]
        local = local.lstrip("!#$%&'*+/=?^`{|}~.-")
        if local and local[-1] != ".":
            end = domain.end()
            yield at - len(local), end


# IANA's special-purpose registries, and multicast. Not ipaddress.is_global: it differs by version.
_NOT_PUBLIC = sorted(
    (int(network[0]), int(network[-1]))
    for network in map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
            *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
        ),
    )
)
_STARTS = [start for start, _ in _NOT_PUBLIC]
_PUBLIC_V6 = ip_network("2000::/3")
_NOT_PUBLIC_V6 = [ip_network(text) for text in ("2001::/23", "2001:db8::/32", "3fff::/20")]
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\w)")
_IPV6 = re.compile(r"[23](?<![\w:.].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{1,34}(?![\w:])")


def _ipv4(text: str) -> Iterator[Span]:
    for match in _IPV4.finditer(text):
        number = int(IPv4Address(match[0]))
        i = bisect_right(_STARTS, number) - 1
        if number > _NOT_PUBLIC[i][1]:
            yield match.span()


def _ipv6(text: str) -> Iterator[Span]:
    for match in _IPV6.finditer(text):
        try:
            address = IPv6Address(match[0])
        except AddressValueError:
            continue
        if address in _PUBLIC_V6 and not any(address in network for network in _NOT_PUBLIC_V6):
            yield match.span()


_PHONE = re.compile(
    r"\+(?<![\w+].)[1-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,4}"
    r"(?:[ .-]?[0-9]{2,4}){1,4}(?![\w-]|\.[0-9])"
    r"|[2-9](?<![\w.+-].)[0-9]{2}(?P<mark>[-.])[2-9][0-9]{2}(?P=mark)[0-9]{4}(?![\w-]|\.[0-9])"
    r"|\((?<!\w.)[2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ][0-9]{4}(?![\w-]|\.[0-9])"
)


def _phones(text: str) -> Iterator[Span]:
    for match in _PHONE.finditer(text):
        if 8 <= sum(map(str.isdigit, match[0])) <= 15:  # ITU-T E.164: at most 15
            yield match.span()


_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_KEY_END = re.compile(r"-----END (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_LONGEST_KEY = 20_000  # characters; 16,384 bits in PEM have 12,700
_TOKEN = re.compile(
    r"(?:A(?:KIA|SIA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}|glpat-[A-Za-z0-9_-]{20,64}"
    r"|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z]{34}|xox[abeprs]-[A-Za-z0-9-]{10,250}"  # Google, HF, Slack
    r"|sk-(?:proj-|svcacct-|ant-)?[A-Za-z0-9_-]{32,200}|[sr]k_live_[A-Za-z0-9]{16,99})"
)


def _secrets(text: str) -> Iterator[Span]:
    spans = [token.span() for token in _TOKEN.finditer(text) if _begins(text, token.start())]
    for key in _KEY.finditer(text):
        last = _KEY_END.search(text, key.end(), key.end() + _LONGEST_KEY)
        spans.append((key.start(), last.end() if last else key.end()))
    end = 0
    for start, stop in sorted(spans):
        if start >= end:
            yield start, stop
            end = stop


def _begins(text: str, place: int) -> bool:
    """Return whether no letter or digit stands before a place."""
    return not place or not (text[place - 1].isalnum() or text[place - 1] in "_-")


_FINDERS = {"secret": _secrets, "mail": _mails, "ipv4": _ipv4, "ipv6": _ipv6, "phone": _phones}
