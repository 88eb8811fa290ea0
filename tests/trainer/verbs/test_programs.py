"""Verbs that do something say to programs what they did: each document fits its schema (the fixture
`forescale` compares them), and is true."""

import json
from pathlib import Path

import pytest

from forescale.run.directory import Run
from forescale.verbs import VERBS
from tests.trainer.scaling.study.test_smoke import PLAN


@pytest.fixture
def ask(forescale):
    """Return the document of a command that ends with code 0."""
    return lambda *words: json.loads(forescale.prints(*words, "--json"))


def test_of_a_run(own_run, ask, tmp_path):
    pinned = ask("pin", "small", "step=4")
    assert (Path(pinned["checkpoint"]), pinned["changed"]) == (own_run.checkpoint_path(4), True)
    assert ask("pin", "small", "step=4", "off=true")["pinned"] is False
    listed = ask("prune", "small")
    assert not listed["deleted"]
    assert all(Path(path).is_dir() for path in [*listed["keep"], *listed["delete"]])
    assert Path(ask("report", "small")["file"]).is_file()
    assert ask("check", "small")["faults"] == []
    mean = ask("average", "small", "last=2")
    assert len(mean["steps"]) == 2
    assert Run(mean["path"]).checkpoint_steps() == [0]
    assert Path(ask("export", "small", "to=out")["path"], "config.json").is_file()
    page = ask("inspect", "small", "tokens=9")
    assert len(page["pieces"]) == len(page["losses"]) == 9


def test_pruning_names_what_is_gone(own_run, ask):
    before = {*own_run.checkpoint_steps()}
    done = ask("prune", "small", "keep=2", "yes=true")
    gone = {str(own_run.checkpoint_path(step)) for step in before - {*own_run.checkpoint_steps()}}
    assert gone <= {*done["delete"]}
    assert not any(Path(path).exists() for path in done["delete"])


def test_damage_is_a_document_and_exit_code_2(own_run, forescale):
    file = next(own_run.checkpoint_path(8).glob("*.bin"), own_run.tokenizer)
    file.write_bytes(file.read_bytes()[:-1])
    code, out, _ = forescale("check", "small", "--json")
    assert code == 2
    assert json.loads(out)["faults"]


def test_of_a_log_each_line(own_run, forescale):
    log = own_run.attempts()[-1].path / "rank-0.log"
    log.write_text("one\ntwo\nthree")
    out = forescale.prints("logs", "small", "follow=false", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["line"] for line in lines if "line" in line] == ["one", "two", "three"]


def test_of_a_dataset(small_data, ask, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 200)
    words = ("shards", tmp_path / "a.txt", f"output={tmp_path / 'd'}", "tokenizer=bytes")
    built, again = ask(*words, "workers=1"), ask(*words, "workers=1")
    assert (built["existed"], again["existed"]) == (False, True)
    assert built["corpus_hash"] == ask("shards", "show", built["path"])["corpus_hash"]
    assert sum(built["tokens"].values()) > 2200


def test_of_this_machine_and_of_the_manual(ask):
    assert {one["level"] for one in ask("doctor")["findings"]} <= {"ok", "note", "fault"}
    assert "complete" in ask("completion", "bash")["script"]
    assert " [--json]\n" in ask("pin", "--help")["text"]
    assert "  75  interrupted" in ask("help")["text"]


def test_of_a_study(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = ask("study", "plan", *PLAN[:-2])  # without a target, whose precision takes time
    cells = ask("study", "status")["cells"]
    assert 0 < len(cells) <= planned["cells"]
    name = cells[0]["cell"]
    assert ask("study", "exclude", f"cells=[{name}]", "why=slow")["excluded"] == [name]
    after = ask("study", "sync")["cells"]
    assert [cell["status"] for cell in after if cell["cell"] == name] == ["excluded"]


@pytest.mark.parametrize("verb", VERBS)
def test_of_each_verb_a_mistake_is_an_object(verb, forescale):
    code, out, err = forescale(verb, "zzz.yyy=1", "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"], error["verb"]) == (2, 2, verb)
    assert error["problem"] in err
