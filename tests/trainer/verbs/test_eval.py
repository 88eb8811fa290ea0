"""`forescale eval`: the numbers of a plain loop over the split, and refusals."""

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

from forescale import open_dataset, open_run
from forescale.ground.storage import read_json
from tests.trainer.small_run import LENGTH, make_dataset, make_run


def plain_loop(run, split):
    """(nats, targets, bytes) token by token, from the model's logits."""
    view, dataset = open_run(run.path), open_dataset(open_run(run.path).identity["dataset"]["path"])
    part, model = dataset.split(split), view.model()
    nats = targets = count = 0
    for shard, size in enumerate(part.shard_tokens):
        tokens = torch.from_numpy(part.read(shard, 0, size).astype("int64"))
        for start in range(0, size - 1, LENGTH):
            window = tokens[start : start + LENGTH + 1]
            with torch.no_grad():
                logits = model(window[None, :-1])[0]
            nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
            targets += len(window) - 1
            count += int(dataset.token_bytes[window[1:]].sum())
    return nats, targets, count


@pytest.mark.parametrize("split", ["validation", "train"])
def test_it_scores_every_token_of_the_split_once(trained, forescale, split):
    nats, targets, count = plain_loop(trained, split)
    out = forescale.prints("eval", trained.path, f"split={split}", "micro_batch=3")
    rows = re.findall(r"^  (loss|perplexity|tokens|bytes) +([\d.,]+)", out, re.MULTILINE)
    numbers = {name: float(value.replace(",", "")) for name, value in rows}
    assert numbers["tokens"] == targets
    assert numbers["bytes"] == count
    assert numbers["loss"] == pytest.approx(nats / targets, abs=1e-4)
    bits = float(re.search(r"bits per byte\s+([\d.]+)", out)[1])
    assert bits == pytest.approx(nats / math.log(2) / count, abs=1e-4)
    assert numbers["perplexity"] == pytest.approx(math.exp(nats / targets), rel=1e-3)
    assert open_dataset(open_run(trained.path).identity["dataset"]["path"]).corpus_hash[:16] in out


def test_compressors_stand_beside_it_with_ratios_over_the_whole_split(trained, forescale):
    _, out, _ = forescale("eval", trained.path)
    assert out.count("the model needs") == 4
    _, part, _ = forescale("eval", trained.path, "windows=4")
    assert ", 4 windows spread over it" in part
    assert "xz" in part
    assert "the model needs" not in part  # other bytes: no ratio


def test_train_text_and_other_data_are_called_so(trained, forescale, tmp_path):
    assert "trained on this split" in forescale("eval", trained.path, "split=train")[1]
    text = tmp_path / "other"
    text.mkdir()
    for i in range(9):
        (text / f"{i}.txt").write_text(f"another text {i}\n" * 9)
    tokenizer = f"tokenizer={trained.tokenizer}"
    assert forescale("shards", text, f"output={tmp_path / 'd'}", tokenizer)[0] == 0
    out = forescale.prints("eval", trained.path, f"data.path={tmp_path / 'd'}")
    assert "the run was trained on other data" in out
    assert out.count("the model needs") == 4


def test_another_tokenizer_cannot_be_scored(trained, forescale, tmp_path):
    other = make_dataset(tmp_path / "d", vocab_size=280)
    assert "another tokenizer" in forescale.refuses("eval", trained.path, f"data.path={other}")


def test_data_that_has_moved_is_asked_for(own_run, forescale, small_data):
    identity = read_json(own_run.identity)
    identity["dataset"]["sources"]["data"]["path"] = "/nowhere/data"
    own_run.identity.write_text(json.dumps(identity))
    assert "data.path=DIR" in forescale.refuses("eval", "small")
    assert forescale("eval", "small", f"data.path={small_data}")[0] == 0


def test_an_empty_split_is_said(small_data, tmp_path, forescale, trained):
    tokenizer = f"tokenizer={trained.tokenizer}"
    words = [small_data.parent / "text", f"output={tmp_path / 'd'}", tokenizer]
    assert forescale("shards", *words, "validation_fraction=0")[0] == 0
    err = forescale.refuses("eval", trained.path, f"data.path={tmp_path / 'd'}")
    assert "validation is empty" in err


def test_the_penalty_of_z_loss_is_no_loss(small_data, tmp_path, forescale):
    run = make_run(small_data, tmp_path / "runs", "z", *SIZES, "model.z_loss=1.0")
    nats, targets, _ = plain_loop(run, "validation")
    _, out, _ = forescale("eval", run.path)
    assert float(re.search(r"loss +([\d.]+)", out)[1]) == pytest.approx(nats / targets, abs=1e-4)


SIZES = ["model.num_layers=1", "model.width=32", "model.num_heads=2"]


def test_a_lost_tokenizer_is_said(own_run, forescale):
    own_run.tokenizer.unlink()
    assert "tokenizer.json" in forescale.refuses("eval", "small")
    shutil.rmtree(own_run.path)


def test_scores_are_objects_for_programs(trained, forescale):
    out = forescale.prints("eval", trained.path, "sequence_length=32", "--json")
    whole, *parts = map(json.loads, out.splitlines())
    nats, targets, count = plain_loop(trained, "validation")
    assert whole["loss"] == pytest.approx(nats / targets, abs=1e-4)
    assert (whole["run"], whole["step"], whole["targets"]) == ("small", 8, targets)
    assert whole["bytes"] == count
    assert sum(part["targets"] for part in parts) == targets
    words = ("abilities=[copy,recall]", "shots=[0]", "questions=4", "--json")
    rows = [json.loads(line) for line in forescale("eval", trained.path, *words)[1].splitlines()]
    assert [(one["task"], one["shots"], one["questions"]) for one in rows] == [
        ("copy", 0, 4),
        ("recall", 0, 4),
    ]
    assert all(one["low"] <= one["right"] / 4 <= one["high"] for one in rows)


def test_abilities_are_a_table_of_accuracies(trained, forescale):
    words = ("abilities=[copy,addition]", "shots=[0,9]", "questions=8")
    out = forescale.prints("eval", trained.path, *words)
    assert re.search(r"^  addition +\d+ \(\d+ to \d+\) +- +\d+\.\d+ +10$", out, re.MULTILINE)
    assert "-: so many examples don't fit into 32 tokens." in out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("abilities=[copi]", "abilities: 'copi' is no task; choose among copy,"),
        ("shots=[-1]", "shots: [-1] are no numbers of examples; write shots=[0,4]"),
        ("shots=[0]", "shots: is of abilities and tasks, and none is named; name some with abil"),
        ("questions=9", "questions: is of abilities and tasks, and none is named; name some"),
        ("answers=x.jsonl", "answers: is of tasks, and none is named; name some with tasks=[...],"),
        ("tasks=[x/7,8]", "tasks: '8' is neither the name of a task nor a file; write names, such"),
        ("chat=true", "chat: is of tasks, and none is named; name some with tasks=[...], or leave"),
    ],
)
def test_wrong_abilities_are_refused(trained, forescale, word, message):
    assert message in forescale.refuses("eval", trained.path, word)
