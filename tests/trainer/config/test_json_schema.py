"""`forescale schema` says what a command takes."""

import json

import pytest

from forescale.config.compose import groups
from forescale.config.json_schema import error
from forescale.config.schema import leaves
from forescale.verbs import VERBS, load
from forescale.verbs.schema import schemas_of
from tests.schemas import faults

TRAIN = schemas_of("train")["train"]["properties"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_key_is_there_with_a_default_that_fits(verb):
    for name, schema in schemas_of(verb).items():
        if name.endswith(" --json"):  # something is said of all verbs, actions and kinds
            assert len(schema["properties"]) > 1, name
            continue
        for path, one in schema["properties"].items():
            for alternative in one.get("anyOf", [one]) if "description" not in one else [one]:
                assert not faults(alternative.get("default"), alternative, {}), (name, path)
    job = load(verb).JOB
    if not job.ACTIONS:
        assert {*leaves(job), *groups(job)} <= {*schemas_of(verb)[verb]["properties"]}


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("train.steps", [10, None], [0, 1.5, "ten"]),
        ("optimizer.learning_rate", [1e-3, 1], [0, -1, "fast"]),
        ("model", ["tiny"], ["huge"]),
        ("checkpoint.every", ["30 min", 500], [True]),
        ("checkpoint.at", [[1, 2]], [["a"], 1]),
        ("launch.processes", [4, "2-8"], ["many"]),
        ("precision.kind", ["bf16"], ["bf17"]),
    ],
)
def test_values_are_told_apart(key, good, bad):
    assert not [value for value in good if faults(value, TRAIN[key], {})]
    assert all(faults(value, TRAIN[key], {}) for value in bad)


def test_a_key_says_what_its_help_says():
    assert TRAIN["optimizer.learning_rate"]["description"].startswith("peak learning rate")
    assert TRAIN["optimizer.learning_rate"]["x-resume"] == "identity"
    assert TRAIN["model"]["oneOf"][0]["description"]


def test_a_document_without_its_fields_must_hold_an_error():
    schemas = {"error": error(), **schemas_of("pin")}
    pin = schemas["pin --json"]
    whole = {"checkpoint": "a", "pinned": True, "changed": False}
    mistake = {"verb": "pin", "subject": "a", "problem": "b", "todo": "c", "exit_code": 2}
    assert not faults(whole, pin, schemas)
    assert not faults({"error": mistake}, pin, schemas)
    assert faults({**whole, "pinned": "yes"}, pin, schemas)
    assert faults({"error": {**mistake, "exit_code": 3}}, pin, schemas)
    assert faults({}, pin, schemas)


def test_the_verb_prints_one_document(forescale):
    text = forescale.prints("schema", "submit")
    assert {"submit", "submit eval", "submit shards --json"} <= {*json.loads(text)["$defs"]}
    assert json.loads(forescale.prints("schema", "submit", "--json")) == json.loads(text)
    assert "did you mean forescale status?" in forescale.refuses("schema", "statsu")
