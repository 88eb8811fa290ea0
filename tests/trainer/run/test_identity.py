"""run.json: what it knows from the start, and what the first ranks add."""

import subprocess

from forescale.ground.storage import read_json, write_checked_json
from forescale.run import identity
from forescale.run.start import start
from tests.trainer.small_run import make_job


def test_runs_of_one_name_in_two_places_have_two_ids(small_data, tmp_path):
    """At wandb they are two curves, and each stays one however often it is resumed."""
    jobs = [make_job(small_data, tmp_path / root, "first") for root in ("here", "there")]
    ids = [read_json(start(job).run.identity)["wandb_id"] for job in jobs * 2]
    assert ids[:2] == ids[2:]
    assert len(set(ids)) == 2


def test_the_first_rank_adds_what_only_ranks_know_and_nothing_changes_later(small_data, tmp_path):
    run = start(make_job(small_data, tmp_path)).run
    stored = read_json(run.identity)
    known = identity.complete(run, 7, "H100")
    assert known == read_json(run.identity) == {**stored, "parameters": 7, "device": "H100"}
    assert identity.complete(run, 8, "cpu") == known
    old = {k: v for k, v in known.items() if k not in ("wandb_id", "git")}
    write_checked_json(run.identity, old)  # as an older version wrote it
    assert identity.complete(run, 8, "cpu")["wandb_id"] == read_json(run.identity)["wandb_id"]


def test_the_commit_of_the_users_own_repository_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "directory" not in identity.code_and_id()["git"]
    subprocess.run(["git", "init", "-q", "."], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert len(identity.code_and_id()["git"]["directory"]) == 40
