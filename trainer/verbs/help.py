"""`forescale help TOPIC`: the pages of the manual, offline.

Invariant: a topic is the README of a room, which its package holds, or the results of models; a
link leads to another topic, or is text, because an installation has no other files of the project.
A page that names such files, as the tests that show what holds, says first that a clone has them.
"""

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import parse
from forescale.config.job import Job
from forescale.config.schema import key
from forescale.config.suggest import nearest_first
from forescale.ground.console import is_terminal, open_console
from forescale.ground.document import tell
from forescale.ground.errors import DONE, EXIT_CODES, UserError
from forescale.verbs import VERBS, help_page

_BEFORE = ("data", "checkpoint", "monitor", "plan", "rehearsal")
_ROOMS = (*_BEFORE, "scaling", "trials", "models", "inference", "serving")
# The package of each topic, in the order of reading; the first page is the project's own.
TOPICS = {"start": "", "conf": "forescale.conf", "slurm": "forescale.slurm"}
TOPICS |= {room: f"forescale.{room}" for room in _ROOMS} | {"code": "forescale"}
_RESULTS = "results"
TOPICS |= {_RESULTS: "forescale.models", "agents": "forescale"}
_PAGES = {_RESULTS: "RESULTS.md", "agents": "AGENTS.md"}  # of the topics that are no README
_PAGE = re.compile(r"(?:^|/)(\w+)/README\.md$")  # the folder of a README


@dataclass
class HelpJob(Job):
    """The page to show."""

    VERB: ClassVar[str] = "help"
    TARGET: ClassVar[str] = "topic"
    PRINTS: ClassVar = {"text": str}

    topic: str | None = key(None, f"a page of the manual ({', '.join(TOPICS)}), or a verb")


JOB = HelpJob
EXAMPLES = ("help", "help slurm", "help scaling", "help train   (as forescale train --help)")


def main(arguments: list[str]) -> int:
    """Print a page, or the list of pages."""
    topic = parse(HelpJob, arguments).topic
    if topic is None:
        rows = (f"  {name:<11} {title_of(page_of(name))}" for name in TOPICS)
        codes = (f"  {code:<3} {meaning}" for code, meaning in EXIT_CODES.items())
        head = "The manual: forescale help TOPIC, with one of these topics"
        end = "forescale --help lists the verbs, forescale VERB --help the keys of one."
        page = "\n".join([head, "", *rows, "", end, "", "Exit codes", "", *codes, ""])
    elif topic in TOPICS:
        page = with_topics(page_of(topic))
    elif topic in VERBS:
        page = help_page(topic, [])
    else:
        near = nearest_first(topic, [*TOPICS, *VERBS])[0]
        raise UserError(topic, "no such topic", f"did you mean forescale help {near}?")
    _print(page, is_markdown=topic in TOPICS)
    tell({"text": page})
    return DONE


def page_of(topic: str) -> str:
    """Return the Markdown of a topic."""
    if TOPICS[topic]:
        page = files(TOPICS[topic]).joinpath(_PAGES.get(topic, "README.md"))
        return page.read_text(encoding="utf-8")
    root = Path(__file__).resolve().parents[1]
    if root.name == "trainer":  # a checkout
        return (root.parent / "README.md").read_text(encoding="utf-8")
    try:
        return str(metadata("forescale").json["description"])
    except PackageNotFoundError:
        return "# forescale\n\nThis copy of forescale isn't installed, and has no first page.\n"


def title_of(page: str) -> str:
    """Return the title of a page."""
    return page.partition("\n")[0].removeprefix("#").strip()


def with_topics(page: str) -> str:
    """Return a page whose links to other pages name their topics, and whose other local links are
    text."""

    def text_of(match: re.Match[str]) -> str:
        text, link = match[1], match[2].partition("#")[0]
        if "://" in link:
            return match[0]
        room = _PAGE.search(link)
        topic = {"trainer": "code"}.get(room[1], room[1]) if room else ""
        topic = next((t for t, name in _PAGES.items() if link.endswith(name)), topic)
        if topic not in TOPICS:
            return text
        command = f"`forescale help {topic}`"
        return command if "/" in text or text.endswith(".md") else f"{text} ({command})"

    return re.sub(r"!?\[([^\]]*)\]\(([^)]+)\)", text_of, page)


def _print(page: str, is_markdown: bool) -> None:
    """Print a page: Markdown laid out in a terminal, all else as it is."""
    if is_markdown and is_terminal(sys.stdout):
        from rich.markdown import Markdown

        console = open_console()
        console.print(Markdown(page), width=min(console.width, 120))
    else:
        print(page, end="")
