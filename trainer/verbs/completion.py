"""`forescale completion SHELL`: the script by which bash, zsh or fish completes our command lines.

The script calls `forescale completion --words ARGUMENT...` on each TAB, which prints the candidates
for the last argument, one a line. Invariant: this imports no torch and composes no config.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin

from forescale.config.compose import groups, parse
from forescale.config.job import Job
from forescale.config.schema import leaves, options
from forescale.ground.document import FLAG, tell
from forescale.ground.errors import DONE, UserError
from forescale.verbs import VERBS, load, schema_of

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
    verb = load(before[0])
    schema = schema_of(verb, before[1:])
    name, equals, value = last.partition("=")
    if equals:
        words = _values(schema, name, before[1:])
        return sorted(f"{name}={v}" for v in words if v.startswith(value))
    words = [f"{name}=" for name in groups(schema)]
    action = schema.ACTIONS.get(before[1]) if len(before) > 1 else None
    head = last.rpartition(".")[0] + "." if "." in last else ""
    for path in leaves(schema):
        is_read = action.reads(path) if action else not schema.ACTIONS
        if is_read and path.startswith(head):  # up to the next dot, or with a = at its end
            part, dot, _ = path[len(head) :].partition(".")
            words.append(head + part + (dot or "="))
    words += [*schema.ACTIONS, *getattr(verb, "FIRST", ())] if len(before) == 1 else []
    words += [v for v in _values(schema, schema.TARGET, before[1:]) if v != "null"]
    words += [*schema.FLAGS, FLAG, "--help"] if last.startswith("-") else []
    return sorted({word for word in words if word.startswith(last)})


def _values(schema: type[Job], name: str, before: Sequence[str]) -> list[str]:
    """Return the values that a key or group may take, if they can be listed."""
    if group := groups(schema).get(name):
        return list(group.files)
    if name in _RUNS:
        roots = [word.partition("=")[2] for word in before if word.startswith("run.root=")]
        root = Path(roots[-1] if roots else "runs").expanduser()
        return [path.parent.name for path in root.glob("[!.]*/config.yaml")]
    values: list[str] = []
    known = leaves(schema)
    leaf = known.get(name) or known.get(f"{name}.kind")  # a block's word is short for its kind
    types = options(leaf.type) if leaf else ()
    for type_ in types if str not in types else ():  # a text may be a path: the shell completes it
        if get_origin(type_) is Literal:
            values += map(str, get_args(type_))
        values += {bool: ["true", "false"], type(None): ["null"]}.get(type_, [])
    return values
