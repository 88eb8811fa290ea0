"""`forescale status`: derived from files, honest about what they show, and quick."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from forescale.config.duration import Duration
from forescale.monitor import follow
from forescale.monitor.follow import Memory
from forescale.monitor.run_text import ranks_of
from forescale.monitor.status import Status, Statuses
from forescale.resilience import outcome
from forescale.resilience.heartbeat import Heartbeat, RankStatus, write_node
from forescale.run.directory import Parent
from forescale.run.rows import RowWriter
from tests.trainer.monitor.changed_run import age_by, changed_rows, say_how_it_went
from tests.trainer.small_run import STEPS, certify, change_rows, make_run, train_row


def test_it_starts_without_torch(trained):
    code = (
        "import sys; from forescale.cli import main; "
        f"main(['status', {str(trained.path)!r}]); "
        f"main(['status', {f'run.root={trained.path.parent}'!r}]); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'deepspeed', 'numpy', 'pandas')))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "complete" in process.stdout


def test_all_runs_in_a_table(own_run, forescale, small_data):
    make_run(small_data, "runs", "another")
    code, out, _ = forescale("status")
    assert code == 0
    header, *rows = (re.split(r"  +", line.strip()) for line in out.splitlines())
    columns = "run state attempt step done loss bits/byte tokens/s MFU ETTR ETA saved seen"
    assert header == [*columns.split(), "last event"]
    assert sorted(row[0] for row in rows) == ["another", "small"]
    for row in rows:
        assert row[1:7] == ["complete", "1", "8/8", "100.0%", "0.7500", "2.2500"]


def test_one_run_has_its_last_rehearsal(own_run, forescale, tmp_path, monkeypatch):
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    job = Status(own_run).job
    line = "Rehearsed at 1970-01-01 00:00 UTC on 8 H100: peak 3.0"
    assert "ehears" not in forescale("status", "small")[1]
    certify(job, {"plan.gpus": 8, "machine.name": "H100"})
    assert line in forescale("status", "small")[1]
    assert "ehears" not in forescale("status")[1]
    certify(job, {"plan.gpus": 16, "machine.name": "H100"}, at=60.0).write_text("{}")
    _, out, _ = forescale("status", "small")
    assert line in out
    assert ".json is no certificate of a rehearsal: has no time; delete it, or its folder." in out


def test_a_narrow_terminal_gets_fewer_columns(own_run, forescale, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = forescale("status")
    header = out.splitlines()[0].split()
    assert header[:3] == ["run", "state", "step"]
    assert {"bits/byte", "loss", "tokens/s"} <= set(header)
    assert "2.2500" in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_table_without_ettr_reads_the_last_rows_alone(own_run, forescale, monkeypatch):
    """A month of rows is read only for what needs it. Damage further back hides nothing else."""
    monkeypatch.setattr(follow, "BLOCK", 300)  # as if the file were long
    monkeypatch.setattr(follow, "RECENT", 2)
    with changed_rows(own_run) as rows:
        rows[0]["crc"] = "00000000"
    _, wide, _ = forescale("status")
    assert re.search(r"small +complete .* - ", wide)
    assert "metrics.jsonl, line 1: the row is damaged" in wide
    monkeypatch.setattr(Memory, "ledger", lambda self, path, attempt=None: pytest.fail("all rows"))
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = forescale("status")
    assert {"8/8", "2.2500", "complete"} <= set(out.split())


def test_a_redraw_reads_a_run_again_when_a_file_of_it_has_changed(unfinished):
    statuses = Statuses()
    before = statuses.of(unfinished)
    assert (before.step, before.state) == (6, "running")
    assert statuses.of(unfinished) is before
    unfinished.attempts()[-1].metrics.add(train_row(unfinished.attempts()[-1], 7))
    assert statuses.of(unfinished).step == 7
    unfinished.attempts()[-1].event("ended", reason="interrupted", step=7, seconds={})
    assert statuses.of(unfinished).state == "interrupted"
    shutil.rmtree(unfinished.checkpoint_path(8))
    assert [c.position.step for c in statuses.of(unfinished).checkpoints] == [4]
    unfinished.new_attempt().start_from(Parent(4), unfinished)
    assert (statuses.of(unfinished).step, statuses.of(unfinished).lost().steps) == (4, 4 + 3)


def test_a_run_that_stops_writing_is_not_running_for_ever(unfinished, monkeypatch):
    """No file of it changes; time passes."""
    statuses = Statuses()
    assert statuses.of(unfinished).state == "running"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert statuses.of(unfinished).state == "crashed"
    assert statuses.of(unfinished).goodput.failures == 2


def test_a_large_run_has_its_bits_per_byte_in_80_columns(
    forescale, small_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    sizes = ("model.num_layers=1", "model.width=32", "model.num_heads=2")
    make_run(small_data, "runs", "llama-1b-web-3e-4", *sizes, "train.steps=238419")
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = forescale("status")
    header, row = out.splitlines()
    assert "bits/byte" in header
    assert {"llama-1b-web-3e-4", "8/238,419", "2.2500"} <= set(row.split())
    assert len(row) <= 80


def test_speed_and_time_left_are_without_evaluations_and_saves(unfinished):
    before = Status(unfinished)
    assert (before.step_seconds, before.seconds_left) == (2.0, 4.0)
    with changed_rows(unfinished) as rows:
        rows[-1]["seconds"] |= {"evaluation": 200.0, "checkpoint": 30.0, "startup": 9.0}
    after = Status(unfinished)
    assert (after.step_seconds, after.seconds_left) == (2.0, 4.0)
    assert after.tokens_per_second == before.tokens_per_second > 0


def test_a_run_whose_size_changes_has_its_history_and_the_speed_of_the_last(unfinished, forescale):
    """Four ranks made steps 1 to 4, of 2 s each; two make the next, which take twice as long."""
    for attempt, ranks in zip(unfinished.attempts(), (4, 2), strict=True):
        outcome.record_start(attempt.path, [], ranks, limit="memory ran out at [4] ranks")
    with changed_rows(unfinished) as rows:
        for row in rows:
            row["seconds"] = {"compute": 4.0 if row.get("attempt") == 2 else 2.0}
    status = Status(unfinished)
    window = status.job.tokens_per_window
    each = status.job.train.global_batch * window
    assert (status.step_seconds, status.tokens_per_second) == (4.0, each / 4)
    _, out, _ = forescale("status", "small", "--json")
    first, second = json.loads(out)["sizes"]
    assert [(s["first"], s["last"], s["ranks"]) for s in (first, second)] == [(1, 4, 4), (5, 6, 2)]
    rates = [(size["tokens_per_second"], size["of_a_rank"]) for size in (first, second)]
    assert rates == [(each / 2, each / 8), (each / 4, each / 8)]
    out = forescale("status", "small")[1]
    assert re.search(r"5 to 6 +2 +1 .*memory ran out at \[4\] ranks", out)
    assert " rank-hours: " in out
    forescale("report", "small")
    page = Path("report-small.html").read_text()
    assert "5 to 6" in page
    assert " rank-hours: " in page


def test_time_left_is_of_the_windows_that_are_left(unfinished):
    status = Status(unfinished)
    job, step = status.job, status.step
    whole = status.tokens_per_second
    ramp = {"global_batch": 16, "first_batch": 4, "batch_ramp": Duration(step)}
    job.train = replace(job.train, **ramp)
    windows = sum(job.batch_ramp.windows(s) for s in range(step)) / step
    assert status.tokens_per_second == pytest.approx(whole * windows / 4)
    left = sum(job.batch_ramp.windows(s) for s in range(step, job.total_steps))
    assert status.seconds_left == pytest.approx(2.0 * left / windows)


def test_json_has_every_documented_key(unfinished, forescale, small_data):
    bad = make_run(small_data, "runs", "bad")
    bad.config.write_text("{]")
    with changed_rows(unfinished) as rows:
        rows[-1]["loss"] = None  # as a row stores NaN
    code, out, err = forescale("status", "--json")
    assert (code, err) == (0, "")
    broken, small = json.loads(out)["runs"]
    page = (Path(__file__).parents[3] / "trainer/monitor/README.md").read_text()
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [key for cell in table for key in re.findall(r"`(\w+)`", cell)]
    assert set(small) == set(broken) == set(named)
    assert (broken["state"], broken["step"]) == ("unreadable", None)
    assert "is not valid YAML" in broken["error"]
    assert (small["state"], small["step"], small["total_steps"]) == ("running", 6, 8)
    assert (small["seconds_per_step"], small["seconds_left"], small["loss"]) == (2.0, 4.0, None)
    assert small["validation"] is None
    assert [c["step"] for c in small["checkpoints"]] == [4, 8]
    assert sum(small["seconds"].values()) == pytest.approx(small["wall_seconds"])
    code, out, _ = forescale("status", "small", "json=true")
    one = json.loads(out)
    assert (code, one["path"], one["lost_steps"]) == (0, "runs/small", 4)
    make_run(small_data, "runs", "whole")
    scored = json.loads(forescale("status", "whole", "--json")[1])["validation"]
    assert (scored["step"], scored["bits_per_byte"], scored["windows"]) == (8, 2.25, 7)


def test_one_damaged_run_does_not_hide_the_others(own_run, forescale, small_data):
    bad = make_run(small_data, "runs", "bad")
    bad.config.write_text("{]")
    code, out, _ = forescale("status")
    assert code == 0
    assert re.search(r"bad +unreadable", out)
    assert re.search(r"small +complete", out)
    assert "runs/bad/config.yaml, line 1: is not valid YAML" in out
    bad.metrics.resolve().write_text("x\n")
    assert forescale("status")[0] == 0


def test_a_run_without_its_last_evaluation_is_not_complete(own_run, forescale):
    """It is saved before it is evaluated, and was killed in between: the job must run again."""
    rows = own_run.metrics.resolve()
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    assert Status(own_run).state == "running"  # it has just written
    age_by(own_run, 1e4)
    assert Status(own_run).state == "interrupted"
    own_run.attempts()[-1].event("nothing_to_validate", step=STEPS)
    assert Status(own_run).state == "complete"


def test_the_page_of_one_run(own_run, forescale):
    code, out, _ = forescale("status", "small")
    assert code == 0
    assert "complete, step 8 of 8 (100.0%), 1,024 tokens, loss 0.7500" in out
    assert "Validation at step 8: 2.2500 bits per byte, loss 3.0000 ± 0.1000" in out
    assert re.search(r"^ +4 +512 +\d\.\d +2 +1 +1 +yes", out, re.MULTILINE)
    assert re.search(r"^ +1 +step 0", out, re.MULTILINE)
    assert "Time 16.0 s: compute 12.0 s (75.0%), data 4.0 s (25.0%)" in out
    assert "Events: 2 checkpoint_saved" in out


def test_what_is_promised_of_the_bits_is_on_the_page_and_in_the_audit(unfinished, forescale):
    first, second = unfinished.attempts()
    first.event("exactness", exact=True, what="Exact: as promised.")
    second.event("exactness", exact=False, what="Fast: up to rounding.")
    second.event("numerics_changed", step=4, key="exact", old=True, new=False)
    for out in (forescale("status", "small")[1], forescale("check", "runs/small")[1]):
        assert "Fast: up to rounding." in out, "the newest attempt's"
        assert "Exact: as promised." not in out
        assert "Not bit-exact from step 4: exact was True, then False." in out


def test_the_page_shows_where_the_time_went(own_run, forescale):
    say_how_it_went(own_run.attempts()[0], 0, spans=20.0)
    with changed_rows(own_run) as rows:
        rows[4]["seconds"]["checkpoint"] = 0.5
    _, out, _ = forescale("status", "small")
    assert re.search(r"^Time 20.0 s: compute 12.0 s \(60.0%\), data 4.0 s", out, re.MULTILINE)
    assert "ETTR 0.600" in out
    assert "0 failures" in out
    assert "checkpoint.every" not in out, "no failure has shown how often they come"
    say_how_it_went(own_run.attempts()[0], 1, spans=20.0)
    _, out, _ = forescale("status", "small")
    assert re.search(
        r"Saving stalls 0.25 s, .* a failure came every 20 s: checkpoint.every='\d+ steps?' .*; "
        r"it is 500 steps",
        out,
    )


def test_injected_faults_pins_damage_and_an_attempt_that_never_trained_are_said(own_run, forescale):
    rows = RowWriter(own_run.attempts()[0].path / "faults-rank-1.jsonl")
    rows.add({"fault": "kill@3:rank1", "time": 1.0, "at": "forward"})
    (own_run.checkpoints / "step-00000004.pin").touch()
    own_run.new_attempt()
    _, out, _ = forescale("status", "small")
    assert "Injected faults: kill@3:rank1" in out
    assert "did not begin to train" in out
    assert re.search(r"^ +4 +512 +\d\.\d +2 +1 +1 +yes +yes", out, re.MULTILINE)
    assert re.search(r"^ +8 +1,024 +\d\.\d +2 +1 +1 +yes +no", out, re.MULTILINE)
    (own_run.checkpoint_path(8) / "state.json").write_text("{]")
    code, out, _ = forescale("status", "small")
    assert (code, "Checkpoint 8 is damaged, because" in out, "{]" in out) == (0, True, False)


def test_theranks_of_a_running_run(unfinished, forescale):
    facts = dict(
        pid=1, began=0.0, time=time.time(), limit=60.0, quiet=60.0, starting=False, steps=20
    )
    pace = {"forward": 0.2, "backward": 9.0}
    ranks = [
        Heartbeat(
            rank=0, host="a", step=6, phase="compute", at="backward", here=4.0, pace=pace, **facts
        ),
        Heartbeat(
            rank=1, host="b", step=5, phase="data", at="data", here=4.5, pace={"data": 0.5}, **facts
        ),
    ]
    for beat in ranks:
        write_node(unfinished.attempts()[-1].path, beat.host, [RankStatus(beat, 0.0)])
    _, out, _ = forescale("status", "small")
    assert (
        "Ranks 2: 1 in backward, 1 in data; the last is rank 1 on b (step 5, data for 4.5 s); "
        "the slowest is rank 1 (500.0 ms per step alone)"
    ) in out
    age_by(unfinished, 3600)
    assert "Ranks 2" not in forescale("status", "small")[1]


def test_a_directory_without_runs(tmp_path, forescale):
    code, out, _ = forescale("status", f"run.root={tmp_path}")
    assert code == 0
    assert "start one with: forescale train" in out
    assert forescale("status", "nope", f"run.root={tmp_path}")[0] == 2


def test_the_table_of_checkpoints_says_what_ranks_divided():
    numerics = {"tensor_parallel": 2, "sequence_parallel": 4, "expert_parallel": 1}
    assert ranks_of({"world_size": 8, "numerics": numerics}) == "8 (tensor 2, sequence 4)"
    assert ranks_of({"world_size": 2}) == "2"


def preferred(row):
    """A row of held-out scores as a run of preferences has it."""
    if row["kind"] != "validation":
        return row
    return {k: x for k, x in row.items() if k != "bits_per_byte"} | {"rewards/accuracies": 0.625}


def test_a_run_of_preferences_has_its_accuracy_wherever_its_score_is_shown(
    own_run, forescale, small_data
):
    change_rows(own_run.metrics, lambda rows: [*map(preferred, rows)])
    make_run(small_data, "runs", "text")
    assert "accuracy 62.5%, loss 3.0000" in forescale("status", "small")[1]
    runs = json.loads(forescale("status", "--json")[1])["runs"]
    scored = {run["name"]: run["validation"] for run in runs}
    assert (scored["small"]["rewards/accuracies"], scored["small"]["bits_per_byte"]) == (
        0.625,
        None,
    )
    assert (scored["text"]["rewards/accuracies"], scored["text"]["bits_per_byte"]) == (None, 2.25)
    states = {}
    for names in (["small"], ["small", "text"], ["text"]):
        assert forescale("report", *names, "output=shown.html")[0] == 0
        html = Path("shown.html").read_text()
        table = html.split('<section id="summary">')[1].split("</section>")[0]
        states[len(names), names[0]] = re.sub(r"<[^>]*>|\s+", " ", table)
    assert re.search(r"held-out accuracy +62.5%", states[1, "small"])
    assert re.search(r"held-out accuracy +62.5% +- ", states[2, "small"])
    assert "accuracy" not in states[1, "text"]
