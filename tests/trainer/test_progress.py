"""Progress of a build: amounts, rates, time left; plain lines if there is no terminal."""

from forescale.progress import Meter, Rates, amount, log_line, shown


def test_a_rate_covers_the_last_30_seconds_and_gives_the_time_left():
    rates = Rates(now=100.0)
    assert rates.text(1000, "bytes") == ""  # nothing was measured yet
    for second in range(61):
        fast = max(0, second - 30)  # ten times as fast in the second half
        rates.see(100.0 + second, 1_000_000 * (second + 9 * fast), 250_000 * (second + 9 * fast))
    assert rates.text(400_000_000, "bytes") == "10.0 MB/s, 2,500,000 tokens/s, 7 s left"
    done = 1_000_000 * (60 + 9 * 30)
    # At the end of a phase the rate covers the whole phase.
    assert rates.text(done, "bytes") == "5.5 MB/s, 1,375,000 tokens/s"


def test_a_few_slow_units_give_a_rate_and_no_time_left_yet():
    rates = Rates(now=0.0)
    rates.see(20.0, 1, 0)
    assert rates.text(8, "fits") == "0.05 fits/s"
    rates.see(24.0, 4, 0)
    assert rates.text(8, "fits") == "0.17 fits/s, 24 s left"


def test_amounts_are_readable():
    assert amount(12_000_000, 40_000_000, "bytes") == "12.0 of 40.0 MB (30%)"
    assert amount(1_234, 1_234, "bytes") == "1,234 bytes"
    assert amount(5_000, None, "documents") == "5,000 documents"


def test_without_a_terminal_there_are_plain_lines(capsys):
    with shown(every=0) as progress:
        meter = Meter(progress, "tokenise", 3_000_000, "bytes")
        meter(1_500_000, 400_000)
        meter(1_400_000, 400_000)
        meter.end()
        log_line(progress, "a sentence")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "tokenise: 1.5 of 3.0 MB",
        "tokenise: 2.9 of 3.0 MB",
        "tokenise: 3.0 MB",
        "a sentence",
    ]
    assert not any("\x1b" in line or "\r" in line for line in lines)
