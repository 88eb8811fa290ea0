"""Examples with prompts and responses, of one turn and of two; a dataset of them in a moment."""

import json
from pathlib import Path

from forescale.data.conversations.prepare import Request, prepare_conversations
from forescale.data.conversations.template import PLAIN, ChatTemplate
from forescale.data.dataset import Dataset
from forescale.data.tokenizer import END_OF_TEXT, byte_tokenizer, vocabulary_of

SPECIAL = (END_OF_TEXT,)
TOKENS = {"bos_token": "", "eos_token": END_OF_TEXT}
KIND = ("objective=responses", "train.sequence_length=64")


def plain_template() -> ChatTemplate:
    return ChatTemplate(PLAIN, "the plain chat template", SPECIAL, TOKENS)


def rows(count: int = 60) -> list[dict]:
    """Every third one is a chat of two turns; all are different."""
    pairs = []
    for i in range(count):
        if i % 3:
            pairs.append({"prompt": f"{i}+{i}=", "response": str(2 * i)})
            continue
        turns = [("user", f"{i}?"), ("assistant", "yes"), ("user", "sure?"), ("assistant", f"{i}!")]
        pairs.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    return pairs


def write_rows(path: Path, lines: list) -> Path:
    """Lines that are texts are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def request_of(**changes) -> Request:
    vocabulary = vocabulary_of(byte_tokenizer().to_str().encode(), "bytes")
    keys = {"template": plain_template(), "most": 65, "held_out": 0.2, "unusable": "fail"}
    return Request(vocabulary, **keys | changes)


def make_conversations(folder: Path, lines: list | None = None, **changes) -> Dataset:
    path = write_rows(folder / "rows.jsonl", lines or rows())
    return prepare_conversations(str(path), folder, request_of(**changes))
