"""Read files completely, with the report, or expect a refusal; write rows as JSON lines."""

import json

import pytest

from forescale.data.text.documents import ReadingReport
from forescale.data.text.files import Files
from forescale.ground.errors import UserError


def read(*paths, **options):
    """Return [(name, text)] of all documents, and the report."""
    report = ReadingReport()
    files = Files(paths, **options)
    documents = [(d.name, d.text) for unit in files.units() for d in files.read(unit, report)]
    return documents, report


def expect_refused(sentence, *paths, **options) -> str:
    """Check that reading raises a UserError that matches; return its text."""
    with pytest.raises(UserError, match=sentence) as caught:
        read(*paths, **options)
    return str(caught.value)


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
