"""The model card of an export: facts of the run, and a command that trains such a model again."""

import json
import re
import shlex

import yaml

from forescale.config.compose import compose
from forescale.config.schema import plain
from forescale.config.train import TrainJob
from forescale.inference.view import open_view


def test_it_has_the_facts_of_the_run(own_run, tmp_path, forescale):
    scores = tmp_path / "scores.jsonl"
    scores.write_text(forescale.prints("eval", own_run.path, "--json"))
    to = tmp_path / "out"
    words = [own_run.path, f"to={to}", "licence=apache-2.0", f"scores=[{scores}]"]
    forescale.prints("export", *words)
    text = (to / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0"
    view = open_view(own_run.path)
    last = view.metrics("validation").iloc[-1]
    assert f"| held-out loss | {last['loss']:.4f}" in text
    scored = json.loads(scores.read_text().splitlines()[0])
    assert f"loss {scored['loss']:.4f}" in text.split("## Scores")[1]
    assert view.identity["dataset"]["sources"]["data"]["corpus_hash"][:16] in text
    assert f"| tokens | {view.checkpoint().position.tokens:,} |" in text
    assert (to / "loss.svg").read_text().startswith("<?xml")
    assert {path.stat().st_mode & 0o777 for path in to.iterdir()} == {0o644}

    command = re.search(r"```sh\n(forescale train .*)\n```", text)[1]
    _, _, name, *rest = shlex.split(command)
    again = compose(TrainJob, [f"run.name={name}", *rest])
    assert plain(again) == plain(view.config)


def test_scores_of_another_run_are_refused(own_run, tmp_path, forescale):
    scores = tmp_path / "scores.jsonl"
    for content, problem in (
        ('{"run": "other", "loss": 1.0}', "has scores of 'other'"),
        ("no rows", "holds no scores"),
    ):
        scores.write_text(content)
        err = forescale.refuses("export", own_run.path, f"scores=[{scores}]", f"to={tmp_path}/a")
        assert problem in err
        assert not (tmp_path / "a").exists()
