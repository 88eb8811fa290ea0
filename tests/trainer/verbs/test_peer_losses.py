"""The losses of fine-tunings beside those of transformers and plain PyTorch, as TRL computes them:
of examples the mean over the tokens of responses, up to the token that ends a turn; of preferences
that of DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""

import json
from pathlib import Path

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
PREFERENCES = [("ab", "cd", "e"), ("fg", "h", "ijk"), ("l", "mno", "pqr"), ("stu", "vw", "xyz")]
BETA = 0.1
TRAINING = [
    *("held_out=0", f"epochs={STEPS}", "precision=fp32", "train.compile=off", "data.cache=cache"),
    *("train.global_batch=4", "schedule=constant", "schedule.warmup=0 steps"),
    *(f"optimizer.learning_rate={RATE}", "launch.processes=1"),
]


@pytest.fixture
def llama(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = write(model_of("Llama"), tmp_path / "llama")
    names = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": TURNS}))
    return folder


def peer(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    # TRL's models don't learn the input of the token that pads; this one would, as ours does.
    assert model.get_input_embeddings().padding_idx is None
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.999), 1e-8, weight_decay=0)
    return model, optimizer


def losses_of(model, optimizer, loss_of) -> list[float]:
    losses = []
    for _ in range(STEPS):
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


PACKED = [
    *("data.packing=best_fit", "data.document_mask=true"),
    *("train.sequence_length=64", "train.global_batch=1"),
]


@pytest.mark.parametrize("words", [[], PACKED], ids=["", "packed"])
def test_a_fine_tuning_has_the_losses_of_plain_pytorch(words, llama, forescale):
    model, optimizer = peer(llama)
    tokens, targets = torch.zeros(4, 16, dtype=torch.long), torch.full((4, 16), -100)
    for i, chat in enumerate(CHATS):
        end = 0
        for question, answer in chat:
            for ids, learned in (([*question.encode()], False), ([*answer.encode(), END], True)):
                part = slice(end, end := end + len(ids))
                tokens[i, part] = torch.tensor(ids)
                targets[i, part] = torch.tensor(ids) if learned else -100

    def loss_of():
        logits = model(tokens).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)

    rows = []
    for chat in CHATS:
        turns = [(r, t) for pair in chat for r, t in zip(ROLES, pair, strict=True)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    file = write_rows(Path("chats.jsonl"), rows)
    forescale.prints("finetune", llama, f"data={file}", "run.name=sft", *TRAINING, *words)
    losses = open_run("runs/sft").metrics()["loss"].tolist()
    assert losses == pytest.approx(losses_of(model, optimizer, loss_of), abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    scores = json.loads(forescale.prints("eval", "sft", "split=train", "--json"))
    assert scores["loss"] == pytest.approx(loss_of().item(), abs=1e-4)
    assert scores["windows"] == len(CHATS), "one a row, as they are scored"


def test_preferences_have_the_losses_of_plain_pytorch(llama, forescale):
    model, optimizer = peer(llama)

    def ratios() -> torch.Tensor:
        """Of each preference: the log-probability of the chosen less that of the rejected one."""
        sums = []
        for prompt, *responses in PREFERENCES:
            for response in responses:
                ids = torch.tensor([[*prompt.encode(), *response.encode(), END]])
                scores = model(ids).logits[0, :-1].log_softmax(-1)
                each = scores.gather(1, ids[0, 1:, None])
                sums.append(each[len(prompt) - 1 :].sum())
        return torch.stack(sums[0::2]) - torch.stack(sums[1::2])

    with torch.no_grad():
        reference = ratios()
    expected = losses_of(
        model, optimizer, lambda: -F.logsigmoid(BETA * (ratios() - reference)).mean()
    )
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PREFERENCES]
    file = write_rows(Path("preferences.jsonl"), rows)
    words = ["run.name=dpo", f"objective.beta={BETA}", *TRAINING]
    forescale.prints("finetune", llama, f"data={file}", *words)
    losses = open_run("runs/dpo").metrics()["loss"].tolist()
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
