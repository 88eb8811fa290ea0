"""A log that was changed is not read."""

import json

import pytest

from forescale.ground.errors import UserError
from forescale.trials.ledger import Ledger


@pytest.fixture
def log(tmp_path):
    ledger = Ledger(tmp_path / "log.jsonl")
    for i in range(4):
        ledger.add("pair", seed=i, gain=0.1 * i)
    return ledger.path


def test_rows_come_back_in_their_order(log):
    ledger = Ledger(log)
    assert [row["seed"] for row in ledger.of("pair")] == [0, 1, 2, 3]
    assert ledger.of("pair", seed=2)[0]["gain"] == pytest.approx(0.2)
    assert ledger.head == ledger.rows[-1]["hash"]


@pytest.mark.parametrize("change", ["edit", "remove", "swap"])
def test_a_changed_row_is_named(log, change):
    lines = log.read_text().splitlines()
    if change == "edit":
        row = json.loads(lines[1])
        row.pop("crc")
        lines[1] = json.dumps(row | {"gain": 0.5})
    elif change == "remove":
        del lines[1]
    else:
        lines[1], lines[2] = lines[2], lines[1]
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="row 2"):
        Ledger(log)
