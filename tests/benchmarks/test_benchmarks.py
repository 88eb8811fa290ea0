"""The benchmarks' machinery, at toy size: no time decides anything here, what is allocated does."""

import json

import pytest

from tests.benchmarks import bench_loss, bench_ranks, run
from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated, peak_memory


def test_sides_take_turns_and_warm_up_first():
    turns = []

    def side(name: str):
        def take() -> float:
            turns.append(name)
            return float(len(turns))

        return take

    assert interleaved(2, side("a"), side("b")) == [(3.0, 4.0), (5.0, 6.0)]
    assert turns == list("ababab")


def test_chunks_need_less_memory_and_the_report_holds_every_pair(tmp_path):
    times, memory = bench_loss.compare(3, 256, 2048, 16, chunk=32, compiled=False)
    assert memory.ratios[0] < 0.5
    report = run.new_report(rounds=3)
    run.add(report, "loss", [times, memory], seconds=1.0)
    path = tmp_path / "report.json"
    run.write_json(path, report)
    written = json.loads(path.read_text())
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["torch"]
    result = written["benchmarks"]["loss"]["results"][0]
    assert len(result["rows"]) == 3
    assert all(a > 0 and b > 0 for a, b in result["rows"])
    assert result["ratio"]["min"] <= result["ratio"]["median"] <= result["ratio"]["max"]


def test_a_result_reads_well():
    pairs = [(98.0, 100.0), (97.0, 100.0), (99.0, 100.0)]
    result = Result("loop", "tokens/s", ("ours", "bare"), pairs, "at least 0.97", {"word": 12.5})
    assert str(result) == (
        "loop: 0.980 (0.970–0.990, 3); ours 98 tokens/s; bare 100 tokens/s; asked at least 0.97\n"
        "    word: 12.5"
    )


def test_a_process_of_its_own_answers_or_tells_why_not():
    assert isolated(peak_memory) > 1_000_000
    with pytest.raises(RuntimeError, match="could not convert string to float: 'x'"):
        isolated(float, "x")


@pytest.mark.slow  # 64 simulated ranks
def test_ranks_are_simulated_and_every_row_has_its_cells(capsys):
    results = bench_ranks.measure(1, worlds=(16, 32))
    assert len(capsys.readouterr().out.split("|")) == 6  # the table's head
    table = {r.name: r for r in results}
    assert table["files of beats, all nodes"].facts["sizes"] == (2, 4)
    assert table["files of ranks' logs"].facts["sizes"] == (16, 32)
    for result in results:
        seconds, sizes = result.rows[0], result.facts["sizes"]
        assert all(a or b for a, b in zip(seconds, sizes, strict=True)), result.name
        assert len(str(result).split("|")) == 6
