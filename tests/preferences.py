"""Preferences: sums with a right and a wrong answer, of texts and of chats; a dataset of them."""

from pathlib import Path

from forescale.data.conversations.prepare import prepare_conversations
from forescale.data.dataset import Dataset
from tests.questions import request_of, write_rows


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def preferences(count: int = 60) -> list[dict]:
    """Every third one is a chat whose earlier answer is no target; all are different."""
    rows = []
    for i in range(count):
        if i % 3:
            right = {"chosen": str(2 * i), "rejected": f"{2 * i + 1}!"}
            rows.append({"prompt": f"{i}+{i}=", **right})
            continue
        before = [message("user", f"{i}?"), message("assistant", "yes"), message("user", "sure?")]
        last = {"chosen": f"{i}!", "rejected": "no"}
        sides = {side: [message("assistant", text)] for side, text in last.items()}
        rows.append({"prompt": before, **sides})
    return rows


def make_preferences(folder: Path, lines: list | None = None, **changes) -> Dataset:
    path = write_rows(folder / "preferences.jsonl", lines or preferences())
    request = request_of(are_preferences=True, **changes)
    return prepare_conversations(str(path), folder, request)
