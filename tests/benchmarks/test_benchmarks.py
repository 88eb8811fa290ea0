"""Each benchmark runs, at toy size, and a picture of a run is drawn. No time decides anything here,
what is allocated does."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from forescale.engine.compilation import compiler_missing
from forescale.models.flops import count
from forescale.models.mixers import MIXERS
from tests.benchmarks import bench_gpu, bench_loss, bench_mixers, draw_mixers, run
from tests.benchmarks.mixers import crossings, model_of
from tests.benchmarks.pairing import Result, interleaved
from tests.benchmarks.processes import isolated, peak_memory
from tests.gpu.kit import Outcome


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
    times, memory = bench_loss.compare(3, 256, 2048, 16, chunk=32, compiled=False, seconds=0.0)
    assert memory.ratios[0] < 0.5
    report = run.new_report(rounds=3)
    run.add(report, "loss", [times, memory], seconds=1.0)
    path = tmp_path / "report.json"
    run.write_json(path, report)
    facts = json.loads(path.read_text())
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["precision"] in ("bf16", "fp32")
    assert facts["machine"]["instructions"]
    assert facts["versions"]["torch"]
    result = facts["benchmarks"]["loss"]["results"][0]
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


@pytest.mark.parametrize("name", [*MIXERS, "mingru+attention", "window+attention"])
def test_mixers_are_compared_with_as_many_parameters(name):
    base = replace(bench_mixers.REAL.speed, max_sequence_length=512)
    model = model_of(name, base, bench_mixers.REAL.settings)
    assert tuple(m.kind for m in model.mixers) == tuple((name.split("+") * 2)[:2])
    assert count(model).total == pytest.approx(count(base).total, rel=0.01)


def test_curves_cross_where_they_are_equal():
    xs = [1, 10, 100, 1000]
    assert [*crossings(xs, [x**0.5 for x in xs], [30**0.5] * 4)] == pytest.approx([30])
    assert not [*crossings(xs, xs, [2 * x for x in xs])]


def test_a_picture_of_mixers_has_a_line_for_each(tmp_path):
    panel = draw_mixers.Panel("speed", "tokens", [1, 2], {"one": [3, 4], "two": [5, 4]}, mark=2)
    draw_mixers.draw([panel] * 4, tmp_path / "mixers.svg")
    drawn = (tmp_path / "mixers.svg").read_text()
    for colour in draw_mixers.COLOURS[:2]:
        assert drawn.count(f"stroke: {colour}") >= 4


def test_a_part_on_a_gpu_that_crashed_is_a_row_and_a_sentence():
    job = bench_gpu.Job("big", ())
    crash = Outcome(None, "its process ended with [-11]:\nillegal address", 3.0)
    measured = bench_gpu.Measured(job, 0.5, 0.4, {}, crash, {}, [f"ours: {crash.problem}"])
    device = {"gpu": "H100", "torch": "2", "copy_bytes_per_second": 1e12, "matmul_flops": 1e15}
    text = bench_gpu.table(device | {"launch_seconds": 5e-6}, [measured])
    assert "| big | ms | 500.0 |  | failed, see below |  |" in text
    assert "big: ours: its process ended with [-11]: illegal address" in text


def test_each_measured_ratio_names_the_commit_at_which_it_was_measured():
    text = (run.ROOT / "tests/README.md").read_text()
    rows = re.findall(r"^\|.*\| `(\w+)` \| ([^|]*) \|$", text, re.MULTILINE)
    assert len(rows) >= 10
    for name, commit in rows:
        assert name in run.NAMES
        assert re.fullmatch("[0-9a-f]{7,}", commit), name


@pytest.mark.slow  # 20 benchmarks, most of which train a model
@pytest.mark.timeout(1200)
def test_each_benchmark_runs_and_prints_finite_numbers(tmp_path):
    names = [name for name in run.NAMES if name != "compile" or compiler_missing() is None]
    words = [*names, "--toy", "--rounds", "1", "--json", "report.json"]
    command = [sys.executable, run.__file__, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    assert list(report) == names
    for benchmark, results in ((name, report[name]["results"]) for name in names):
        assert results, benchmark
        for result in results:
            assert result["name"] in done.stdout
            numbers = [number for row in result["rows"] for number in row]
            if benchmark == "ranks":  # 0 s where a row counts only bytes or files
                numbers = list(map(max, numbers, [size or 0 for size in result["facts"]["sizes"]]))
            assert numbers, result["name"]
            assert all(map(math.isfinite, numbers)), result["name"]
            if result["unit"] not in ("", "covered"):  # a slope; a share of intervals
                assert min(numbers) > 0, result["name"]
    ranks = {result["name"]: result["facts"]["sizes"] for result in report["ranks"]["results"]}
    assert ranks["files of beats, all nodes"] == [2]
    assert ranks["files of nodes' logs"] == [2]
    assert "failed" not in (tmp_path / "runs/gpu.md").read_text()
