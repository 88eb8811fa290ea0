"""Read files completely, with the report; write rows as JSON lines."""

import json

from forescale.data.text.documents import ReadingReport
from forescale.data.text.files import Files


def read(*paths, **options):
    """Return [(name, text)] of all documents, and the report."""
    report = ReadingReport()
    files = Files(paths, **options)
    documents = [(d.name, d.text) for unit in files.units() for d in files.read(unit, report)]
    return documents, report


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
