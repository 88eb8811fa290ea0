"""`forescale eval tasks=`: what is printed, where it comes from, and what is refused."""

import errno
import hashlib
import importlib
import json
import subprocess
import sys
from functools import cache
from importlib.metadata import version

import pytest

from tests.trainer.inference.harness.task_files import make_tasks

GROUP = """\
group: all
task:
- choice
- {group: inner, task: [answer, rolling]}
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def first_right(answers):
    """Of the lines of answers=FILE: whether the right choice is the likeliest, by its nats."""
    names = []
    for one in answers:
        nats = [float(nats) for nats, _ in one["filtered_resps"]]
        names.append(nats.index(max(nats)) == one["target"])
    return names


def test_scores_come_with_their_intervals_and_their_source(trained, forescale, tmp_path):
    file = make_tasks(tmp_path / "tasks")["choice"]
    log = tmp_path / "missing" / "answers.jsonl"
    words = (f"tasks=[{file}]", "shots=[0,2]", "questions=5", f"answers={log}", "--json")
    code, out, err = forescale("eval", trained.path, "step=4", *words)
    assert code == 0, err
    assert "choice likelihoods: 20 texts" in err
    none, two = map(json.loads, out.splitlines())
    assert (none["run"], none["step"], none["task"]) == ("small", 4, "choice")
    assert (none["shots"], two["shots"], none["questions"]) == (0, 2, 5)
    assert none["task_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert none["lm_eval"] == version("lm_eval")
    assert none["task_version"] == "3"
    assert none["asked_sha256"] != two["asked_sha256"]
    assert none["cut_tokens"] < two["cut_tokens"]  # examples make texts longer than 32 tokens
    answers = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one["shots"] for one in answers] == [0] * 5 + [2] * 5
    for examples, part in ((none, answers[:5]), (two, answers[5:])):
        right, acc = first_right(part), examples["metrics"]["acc"]
        assert acc["value"] == sum(right) / 5
        assert acc["low"] < acc["value"] < acc["high"] or acc["value"] in (acc["low"], acc["high"])
    words = (f"tasks=[{file}]", "questions=5", "chat=true", "--json")
    asked_in_chat = json.loads(forescale("eval", trained.path, *words)[1])
    assert [one["chat"] for one in (none, asked_in_chat)] == [False, True]
    assert asked_in_chat["asked_sha256"] != none["asked_sha256"]
    forescale.refuses("eval", trained.path, f"tasks=[{file}]", f"answers={log}")


def test_each_task_of_a_group_says_what_it_lost_and_the_group_their_sum(
    trained, forescale, tmp_path, monkeypatch
):
    # Reading the list of lm_eval's own tasks, which a group may hold, takes ten seconds.
    from lm_eval.tasks import TaskManager

    init = TaskManager.__init__

    def without(manager, **how):
        init(manager, **how | {"include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", without)
    files = make_tasks(tmp_path / "tasks")
    names = ("choice", "answer", "rolling")
    alone = [
        json.loads(forescale("eval", trained.path, f"tasks=[{files[name]}]", "--json")[1])
        for name in names
    ]
    group = files["choice"].with_name("all.yaml")
    group.write_text(GROUP)
    out = forescale.prints("eval", trained.path, f"tasks=[{group}]", "--json")
    scores = {one["task"]: one for one in map(json.loads, out.splitlines())}
    for key in ("cut_texts", "cut_tokens"):
        expected = {one["task"]: one[key] for one in alone}
        assert {name: scores[name][key] for name in names} == expected
        assert scores["all"][key] == sum(expected.values())
    assert sum(one["cut_tokens"] > 0 for one in alone) > 1, "each has its own"


def test_answers_that_have_no_place_are_refused_before_a_question(trained, forescale, tmp_path):
    file = make_tasks(tmp_path / "tasks")["choice"]
    words = (f"tasks=[{file}]", f"answers={file}/answers.jsonl")
    err = forescale.refuses("eval", trained.path, *words)
    assert f"{file}: is a file, but a directory is needed" in err
    assert "likelihoods" not in err


def test_scores_are_printed_before_answers_are_written(trained, forescale, tmp_path, monkeypatch):
    file = make_tasks(tmp_path / "tasks")["rolling"]

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    results = importlib.import_module("forescale.inference.harness.scores")
    monkeypatch.setattr(results, "write_file", full)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = (f"tasks=[{file}]", "questions=1", "answers=~/there/answers.jsonl")
    code, out, err = forescale("eval", trained.path, *words)
    assert code != 0
    assert "bits_per_byte" in out
    assert str(tmp_path / "there" / "answers.jsonl") in err


def test_people_get_a_table(trained, forescale, tmp_path):
    files = make_tasks(tmp_path / "tasks")
    out = forescale.prints("eval", trained.path, f"tasks=[{files['answer']},{files['rolling']}]")
    assert f"Run small, step 8, in fp32, tasks of lm_eval {version('lm_eval')}" in out
    assert "  answer   0         6          exact_match" in out
    assert "answers.jsonl" not in out
    assert hashlib.sha256(files["rolling"].read_bytes()).hexdigest()[:12] in out
    assert "answer: 1 texts were longer than the model reads, and lost 9 tokens" in out
    assert "bootstrapping" not in out


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, (), "gone.yaml: there is no such file; name the .yaml file of a task"),
        (("task: answer\n", ""), (), "answer.yaml: is no task of lm_eval: it has neither"),
        (("task: answer", "task: [answer"), (), "answer.yaml: can't be read as YAML"),
        (("data.jsonl", "lost.jsonl"), (), "answer.yaml: its data can't be read (Unable to find"),
        (("path: json", "path: some/where"), (), "answer.yaml: needs the dataset some/where of"),
        (("generate_until", "guess"), (), "answer.yaml: lm_eval can't make a task of it"),
        (("max_gen_toks: 8", "max_gen_toks: 32"), (), "wants answers of 32 tokens, and the model"),
        (("max_gen_toks: 8", "num_beams: 4"), (), "answer: its generation_kwargs hold num_beams"),
        (
            ("max_gen_toks: 8", "max_gen_toks: 8, do_sample: true"),
            (),
            "generation_kwargs: do_sample is true, without a temperature above 0; set temperature",
        ),
        (("{{start}}", "{{start.a.b}}"), (), "lm_eval can't make a task of it (UndefinedError"),
        (
            ("{{start}}", "{{start if start|length < 10 else start.a.b}}"),
            (),
            "a template of it fails",
        ),
        (("x", "x"), ("shots=[2]",), "shots: the task answer always has 0 examples"),
        (("x", "x"), ("abilities=[copy]",), "tasks: abilities is given too; give one of them."),
    ],
)
def test_what_is_wrong_with_a_task_is_one_sentence(
    trained, forescale, tmp_path, change, words, message
):
    file = make_tasks(tmp_path / "tasks")["answer"]
    if change is None:
        file = tmp_path / "gone.yaml"
    else:
        file.write_text(file.read_text().replace(*change))
    err = forescale.refuses("eval", trained.path, f"tasks=[{file}]", *words)
    assert message in err


@pytest.mark.slow  # lm_eval reads its list of 14,000 tasks
def test_names_are_those_of_lm_eval(trained, forescale, monkeypatch):
    from lm_eval.tasks import TaskManager

    read_once = cache(TaskManager)  # each command would take 12 s to read it
    monkeypatch.setattr(
        "forescale.inference.harness.tasks.TaskManager",
        lambda include_path, include_defaults: read_once(include_defaults=include_defaults),
    )
    err = forescale.refuses("eval", trained.path, "tasks=[arc_eazy]")
    assert "tasks: 'arc_eazy' is neither a task of lm_eval nor a file; did you mean one of " in err
    assert "arc_easy" in err
    err = forescale.refuses("eval", trained.path, "tasks=[arc_easy]")
    assert "arc_easy: needs the dataset allenai/ai2_arc of the Hugging Face hub" in err


def test_without_lm_eval_it_says_what_to_install(trained):
    code = "import sys; sys.modules['lm_eval'] = None; from forescale.cli import main; "
    code += f"sys.exit(main(['eval', {str(trained.path)!r}, 'tasks=[x.yaml]']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    message = "needs lm_eval, which isn't installed; pip install 'forescale[harness]'."
    assert message in done.stderr
