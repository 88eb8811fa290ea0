"""Files read to the end, with the report; rows as JSON lines."""

import json

from forescale.data.text.files import Files, Report


def read(*paths, **options):
    """[(name, text)] of all documents, and the report."""
    report = Report()
    return [(d.name, d.text) for d in Files(paths, **options).documents(report)], report


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
