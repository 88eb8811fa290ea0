"""The losses of a fine-tuning beside those of transformers and plain PyTorch, as TRL computes them:
the mean over the tokens of responses, up to the token that ends a turn."""

import json

import pytest
import torch
import torch.nn.functional as F

from forescale import open_run
from tests.questions import write_rows
from tests.trainer.inference.test_importing import model_of, write

pytestmark = pytest.mark.distributed
transformers = pytest.importorskip("transformers")

TURNS = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
CHATS = [[("ab", "c"), ("d", "efg")], [("hij", "klmno")], [("p", "q")], [("rs", "tuv")]]
STEPS, RATE, END = 6, 1e-3, 256
ROLES = ("user", "assistant")


def expected(folder) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    # TRL's models don't learn the input of the token that pads; this one would, as ours does.
    assert model.get_input_embeddings().padding_idx is None
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.999), 1e-8, weight_decay=0)
    tokens, targets = torch.zeros(4, 16, dtype=torch.long), torch.full((4, 16), -100)
    for i, chat in enumerate(CHATS):
        end = 0
        for question, answer in chat:
            for ids, learned in (([*question.encode()], False), ([*answer.encode(), END], True)):
                part = slice(end, end := end + len(ids))
                tokens[i, part] = torch.tensor(ids)
                targets[i, part] = torch.tensor(ids) if learned else -100
    losses = []
    for _ in range(STEPS):
        logits = model(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_fine_tuning_has_the_losses_of_plain_pytorch(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    folder = write(model_of("Llama"), tmp_path / "llama")
    names = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": TURNS}))
    chats = [
        {
            "messages": [
                {"role": r, "content": t} for pair in chat for r, t in zip(ROLES, pair, strict=True)
            ]
        }
        for chat in CHATS
    ]
    file = write_rows(tmp_path / "chats.jsonl", chats)
    words = [
        f"data={file}",
        "run.name=sft",
        "held_out=0",
        f"epochs={STEPS}",
        "precision=fp32",
        "train.compile=off",
    ]
    words += ["train.global_batch=4", "schedule=constant", "schedule.warmup=0 steps"]
    words += [f"optimizer.learning_rate={RATE}", "launch.processes=1", "data.cache=cache"]
    assert forescale("finetune", folder, *words)[0] == 0
    losses = open_run("runs/sft").metrics()["loss"].tolist()
    assert losses == pytest.approx(expected(folder), abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
