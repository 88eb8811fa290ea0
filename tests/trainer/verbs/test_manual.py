"""Every verb explains itself, in two screens and in full; a bad command gets a sentence."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest

from forescale.cli import VERBS
from forescale.config.compose import CONF
from forescale.config.help import SCREENS, first_sentence
from forescale.verbs import load

help_verb = importlib.import_module("forescale.verbs.help")


def pages() -> list[tuple[str, ...]]:
    """The command lines before --help: each verb, its words with other keys, its actions."""
    verbs = [(name, load(name)) for name in VERBS]
    words = [(name, word) for name, verb in verbs for word in getattr(verb, "JOBS", {})]
    return [
        *((name,) for name in VERBS),
        *words,
        *((n, a) for n, v in verbs for a in v.JOB.ACTIONS),
    ]


@pytest.mark.parametrize("words", pages(), ids=" ".join)
def test_help_fits_two_screens_and_leads_to_everything(words, forescale):
    out = forescale.prints(*words, "--help")
    assert out.startswith(f"forescale {' '.join(words)} ")
    assert len(out.splitlines()) <= SCREENS
    lines = [line for line in out.splitlines() if not line.startswith("  forescale ")]
    assert max(map(len, lines)) <= 100
    everything = forescale(*words, "--help", "all")[1]
    if everything != out:
        assert f"forescale {' '.join(words)} --help all" in out
        assert out.count("\n  ") > 10, "the keys that most users set"
    assert not re.search(r"README|\b(tests|models|trainer|conf)/\w", everything), "an installation"


def test_a_section_shows_its_keys_and_its_choices(forescale):
    out = forescale("train", "--help", "engine")[1]
    assert " engine.stage " in out
    assert "optimizer state is sharded over the ranks, at no extra" in out
    assert "train.tokens" not in out
    assert forescale("train", "--help", "train.tokens")[1].count("train.") >= 2
    assert "forescale train --help engine" in forescale.refuses("train", "--help", "engin")
    assert "--help model.mixer.window" in forescale("train", "--help", "mixer.window")[2]
    out = forescale("train", "--help", "model.mixer")[1]
    assert "\nWith model.mixer=window\n! model.mixer.window " in out


def test_a_first_word_with_keys_of_its_own_has_a_page_of_its_own(forescale):
    out = forescale("submit", "eval", "--help", "all")[1]
    assert out.startswith("forescale submit eval [RUN|PATH] ")
    assert "\n  steps " in out
    assert "train.steps" not in out
    assert "steps=" not in forescale("submit", "train", "--help", "all")[1].partition("Keys")[2]


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        ("train --help engine extra", "engine extra: --help shows one section"),
        ("submit nonsense --help", "nonsense: is not what forescale submit takes first"),
        ("study points.csv --help", "points.csv: is not what forescale study takes first"),
        ("import onnx --help", "did you mean forescale import hf?"),
    ],
)
def test_a_page_that_is_not_there_is_a_sentence(words, mistake, forescale):
    assert mistake in forescale.refuses(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        "report RUN output=/proc/a/b.html",
        "plan plan.to=/proc/a/b.html",
        "drill json=/proc/a/b.json",
        "export RUN to=/proc/a",
        "shards HERE output=/proc/a",
        "shards HERE output=/proc/a/b",
    ],
)
def test_an_output_that_can_not_be_written_is_a_sentence(words, trained, forescale):
    words = words.replace("RUN", str(trained.path)).replace("HERE", __file__)
    err = forescale.refuses(*words.split())
    assert re.match("forescale: /proc.*: takes no files .*; choose another place", err)


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_the_text_of_a_choice_is_a_whole_sentence(path):
    assert first_sentence(path)[-1] in ".?"


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_key_is_a_sentence(verb, forescale):
    err = forescale.refuses(verb, "zzz.yyy=1")
    assert "zzz.yyy: no such key" in err


def test_the_manual_has_a_topic_for_each_page_of_the_project(forescale):
    out = forescale.prints("help")
    for topic in help_verb.TOPICS:
        assert f"\n  {topic} " in out
    root = Path(__file__).parents[3]
    pages = {
        path.read_text()
        for top in ("trainer", "models", "slurm", "conf")
        for path in (root / top).rglob("README.md")
    }
    assert {help_verb.page_of(topic) for topic in help_verb.TOPICS} >= pages
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "README.md" in data["package-data"]["*"]
    assert {*help_verb.TOPICS.values()} <= {"", *data["packages"]}


@pytest.mark.parametrize("topic", help_verb.TOPICS)
def test_a_page_names_topics_and_no_files_that_an_installation_lacks(topic, forescale):
    out = forescale.prints("help", topic)
    assert out.startswith("# ")
    assert not re.findall(r"\]\((?!https?://)", out)
    named = re.findall(r"forescale help ([a-z]+)", out)
    assert {*named} <= {*help_verb.TOPICS, *VERBS}
    # A page that names tests, as proofs, says first that a clone has them.
    for tests in re.finditer(r"\btests/|\.ci/|pytest\b(?!\n```)", out):
        assert "clone" in out[: tests.end()] + out[tests.end() :].partition(".")[0]


def test_what_the_first_page_promises_is_shown_by_commands_of_an_installation(forescale):
    page = forescale.prints("help", "start")
    table = page.partition("## What holds")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!claim|---)(.+) \| (.+) \|$", table, re.MULTILINE)
    assert len(rows) >= 4
    for _, proof in rows:
        lines = re.findall("`([^`]+)`", proof)
        assert lines
        assert all(line.startswith("forescale ") and line.split()[1] in VERBS for line in lines)


def test_help_of_a_verb_and_of_nothing(forescale):
    assert forescale("help", "train")[1] == forescale("train", "--help")[1]
    assert "forescale help slurm" in forescale.refuses("help", "slrum")


def test_a_link_to_another_page_names_its_topic():
    page = help_verb.with_topics("[the cluster](../slurm/README.md#x), [a](trainer/README.md).")
    assert "`forescale help slurm`" in page
    assert "`forescale help code`" in page
    assert help_verb.with_topics("[b](../tests/README.md)") == "b"
