"""How the messages of a chat become one prompt."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from forescale.errors import UserError
from forescale.serving.asked import Refused, Template


def plain(messages: Sequence[Mapping[str, str]]) -> str:
    """Return the messages as lines `role: text`, and the start of the assistant's."""
    lines = [f"{message['role']}: {message['content']}\n" for message in messages]
    return "".join([*lines, "assistant:"])


def template_in(path: Path, end: str) -> Template:
    """Return the template of a file: Jinja as in transformers, alone or as `chat_template` in a
    tokenizer_config.json. end: the text of the token that ends documents. Raises UserError."""
    try:
        source = path.read_text()
    except (FileNotFoundError, IsADirectoryError):
        what = "there is no such file"
        raise UserError(str(path), what, "name a Jinja file or a tokenizer_config.json") from None
    except UnicodeDecodeError:
        raise UserError(str(path), "isn't UTF-8", "name a text file") from None
    if path.suffix == ".json":
        source = _of_config(path, source)
    # A template is of a stranger's file: it may only build a text.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        template = environment.from_string(source)
    except TemplateError as e:
        raise UserError(str(path), f"is no Jinja template ({e})", "mend it") from None
    known = {"add_generation_prompt": True, "bos_token": end, "eos_token": end}

    def made(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return template.render(messages=messages, **known)
        except TemplateError as e:
            raise Refused(400, f"The chat template refuses the messages: {e}", "messages") from None

    return made


def _of_config(path: Path, source: str) -> str:
    try:
        found = json.loads(source)
    except ValueError:
        raise UserError(str(path), "is no JSON", "name a tokenizer_config.json") from None
    template = found.get("chat_template") if isinstance(found, dict) else None
    if not isinstance(template, str):
        raise UserError(str(path), "has no chat_template", "name a file with one")
    return template


def _refuse(message: str) -> None:
    raise TemplateError(message)
