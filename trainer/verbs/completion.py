"""`forescale completion SHELL`: the script by which bash, zsh or fish completes our command lines.

The script calls `forescale completion --words ARGUMENT...` on each TAB, which prints the candidates
for the last argument, one a line. Invariant: this imports no torch and composes no config.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, get_args, get_origin

from forescale.config.job import Job
from forescale.config.schema import leaves, options
from forescale.ground.document import FLAG, tell
from forescale.ground.errors import DONE, UserError
from forescale.ground.storage import cache_directory, write_output
from forescale.verbs import VERBS, Verb, load

_WORDS = "--words"  # not for users: the scripts call it
_RUNS = ("target", "run.name", "run.from.run", "plan.from_run", "target.run")  # hold names of runs

# Readline splits arguments at `=` and `:` and replaces only the last part. If there are no
# candidates, each shell completes file names.
_BASH = r"""_forescale() {
    local IFS=$' \t\n' line="${COMP_LINE:0:COMP_POINT}" words
    read -r -a words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    local last="${words[${#words[@]}-1]}" cut="" IFS=$'\n'
    [[ $COMP_WORDBREAKS == *=* && $last == *=* ]] && cut="${last%"${last##*[=:]}"}"
    COMPREPLY=($(command forescale completion --words "${words[@]:1}" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    [[ ${#COMPREPLY[@]} == 1 && $COMPREPLY == *[=./] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _forescale forescale
"""
_ZSH = r"""_forescale() {
    local -a given found heads
    given=("${(@)words[2,CURRENT-1]}" "$PREFIX")
    found=(${(f)"$(command forescale completion --words "${given[@]}" 2>/dev/null)"})
    heads=(${(M)found:#*[=.]})
    found=(${found:#*[=.]})
    (( $#heads )) && compadd -Q -S '' -a heads
    (( $#found )) && compadd -Q -a found
    (( $#heads + $#found )) || { compset -P '*='; _files }
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _forescale forescale
"""
_FISH = r"""function __forescale
    set -g __forescale_found (command forescale completion --words \
        (commandline -opc)[2..] (commandline -ct) 2>/dev/null)
    test (count $__forescale_found) -gt 0
end
complete -c forescale -n __forescale -f -a '$__forescale_found'
complete -c forescale -n 'test (count $__forescale_found) -eq 0' -F
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


class Menu(TypedDict):
    """What the words of a verb may be: the key of its first name, flags, first words, choices of
    groups, keys that actions read, and values of keys, where they can be listed."""

    target: str
    flags: list[str]
    first: list[str]
    groups: dict[str, list[str]]
    actions: dict[str, list[str]]
    keys: dict[str, list[str]]


@dataclass
class CompletionJob(Job):
    """The shell to print a script for."""

    VERB: ClassVar[str] = "completion"
    TARGET: ClassVar[str] = "shell"
    PRINTS: ClassVar = {"shell": str, "script": str}

    # write eval "$(forescale completion bash)" into ~/.bashrc, or the same with zsh into ~/.zshrc;
    # for fish: forescale completion fish | source
    shell: Literal["bash", "zsh", "fish"] | None = None


JOB = CompletionJob
EXAMPLES = (
    "completion bash   (to install: eval \"$(forescale completion bash)\")",
    "completion zsh    (to install: eval \"$(forescale completion zsh)\")",
    "completion fish   (to install: forescale completion fish | source)",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    """Print the script; or, for the script itself, the candidates for the last argument."""
    if arguments[:1] == [_WORDS]:
        *before, last = arguments[1:] or [""]
        with suppress(UserError):  # a wrong command line has no candidates
            print("\n".join(candidates(before, last)))
        return DONE
    from forescale.config.compose import parse  # imports Hydra, for which a TAB has no time

    job = parse(CompletionJob, arguments)
    if job.shell is None:
        raise UserError("shell", "is missing", "write forescale completion bash, zsh or fish")
    print(_SCRIPTS[job.shell], end="")
    tell({"shell": job.shell, "script": _SCRIPTS[job.shell]})
    return DONE


def candidates(before: Sequence[str], last: str) -> list[str]:
    """Return what may complete the argument `last`, which comes after the arguments `before`.

    Keys are completed section by section: `tr` gives `train.`, and `train.` its keys.
    """
    if not before:
        return [word for word in (*VERBS, "--help", "--version") if word.startswith(last)]
    menus, first = _menus(before[0]), before[1] if len(before) > 1 else ""
    menu = menus.get(first) or menus[""]
    name, equals, value = last.partition("=")
    if equals:
        words = _values(menu, name, before[1:])
        return sorted(f"{name}={v}" for v in words if v.startswith(value))
    words = [f"{name}=" for name in menu["groups"]]
    head = last.rpartition(".")[0] + "." if "." in last else ""
    actions = menu["actions"]
    for path in actions.get(first, ()) if actions else menu["keys"]:
        if path.startswith(head):  # up to the next dot, or with a = at its end
            part, dot, _ = path[len(head) :].partition(".")
            words.append(head + part + (dot or "="))
    words += [*actions, *menu["first"]] if len(before) == 1 else []
    words += [v for v in _values(menu, menu["target"], before[1:]) if v != "null"]
    words += [*menu["flags"], FLAG, "--help"] if last.startswith("-") else []
    return sorted({word for word in words if word.startswith(last)})


def _values(menu: Menu, name: str, before: Sequence[str]) -> list[str]:
    """Return the values that a key or group may take, if they can be listed."""
    if name in menu["groups"]:
        return menu["groups"][name]
    if name in _RUNS:
        roots = [word.partition("=")[2] for word in before if word.startswith("run.root=")]
        root = Path(roots[-1] if roots else "runs").expanduser()
        return [path.parent.name for path in root.glob("[!.]*/config.yaml")]
    # A block's word is short for its kind.
    return menu["keys"].get(name) or menu["keys"].get(f"{name}.kind") or []


def _menus(name: str) -> dict[str, Menu]:
    """Return what the words of a verb may be, by the first word that has a job of its own; "": of
    the others. They stay in the cache until a file of forescale changes: to import a verb takes
    longer than a TAB should. Raises UserError if there is no such verb."""
    file, of_user = (
        cache_directory() / "completion" / f"{name}.json",
        os.environ.get("FORESCALE_CONF"),
    )
    packages = (find_spec(f"forescale{part}") for part in ("", ".conf", ".models"))
    roots = [path for spec in packages if spec for path in spec.submodule_search_locations or ()]
    files = (p for root in roots for end in ("py", "yaml") for p in Path(root).rglob(f"*.{end}"))
    stamp = [*roots, of_user, max(path.stat().st_mtime_ns for path in files)]
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(file.read_bytes())
        if stored["stamp"] == stamp and of_user is None:
            return stored["menus"]
    verb = load(name)
    jobs = {"": verb.JOB, **getattr(verb, "JOBS", {})}
    menus = {word: _menu(verb, job) for word, job in jobs.items()}
    with suppress(OSError, UserError):  # a cache that can't be written: the next TAB makes it again
        write_output(file, json.dumps({"stamp": stamp, "menus": menus}).encode())
    return menus


def _menu(verb: Verb, schema: type[Job]) -> Menu:
    from forescale.config.compose import groups

    known = leaves(schema)
    actions = {
        name: [path for path in known if action.reads(path)]
        for name, action in schema.ACTIONS.items()
    }
    return {
        "target": schema.TARGET,
        "flags": [*schema.FLAGS],
        "first": [*getattr(verb, "FIRST", ())],
        "groups": {name: [*group.files] for name, group in groups(schema).items()},
        "actions": actions,
        "keys": {path: _choices(leaf.type) for path, leaf in known.items()},
    }


def _choices(kind: Any) -> list[str]:
    """Return the values of a type, if they can be listed: a text may be a path, which the shell
    completes."""
    types, values = options(kind), list[str]()
    for type_ in types if str not in types else ():
        if get_origin(type_) is Literal:
            values += map(str, get_args(type_))
        values += {bool: ["true", "false"], type(None): ["null"]}.get(type_, [])
    return values
