"""How the layers of a config lie over each other: the run's frozen config, the files that a command
chooses, and the keys that it types.

Invariant: of a frozen config only what the command sets is replaced, and what says how this one
command resumes, or what it trusts, never comes from there.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from forescale.config.job import Find
from forescale.config.schema import flatten

LENGTHS = ("train.steps", "train.tokens", "train.tokens_per_parameter")  # a run has one of them
_OF_COMMAND = ("run.name", "run.root", "run.resume", "trust")


def keys_of(picks: Mapping[str, str], files: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """Return what the chosen files set: each group's section as a whole, and the keys of a recipe
    and of an experiment in their order, those of the files that they are laid over first.

    picks: the choice of each group; files: all choices of each group, in the order in which they
        are laid over each other.
    """
    found: list[str] = []

    def visit(group: str, path: Path) -> None:
        text = path.read_text()
        is_global = any(line.startswith("# @package _global_") for line in text.splitlines())
        tree = yaml.safe_load(text) or {}
        for entry in tree.pop("defaults", None) or []:
            if isinstance(entry, dict):
                for name, choice in entry.items():
                    named = str(name).split()[-1].lstrip("/")
                    if named in picks:  # typed, so it is visited by itself
                        continue
                    if choice in files.get(named, {}):
                        visit(named, files[named][choice])
                    else:
                        found.append(named)
            elif entry in files[group]:
                visit(group, files[group][entry])
        found.extend(p for p, _ in flatten(tree, "") if p) if is_global else found.append(group)

    for group, choices in files.items():
        if picks.get(group) in choices:
            visit(group, choices[picks[group]])
    return found


def keep_one_length(config: DictConfig, chosen: Sequence[str]) -> None:
    """Unset the length that a file below an experiment gives, if the experiment gives another."""
    lengths = {name: OmegaConf.select(config, name) for name in chosen if name in LENGTHS}
    if given := [name for name, value in lengths.items() if value is not None]:
        for other in {*LENGTHS} - {given[-1]}:
            OmegaConf.update(config, other, None, force_add=True)


def over_frozen(tree: Any, frozen: Mapping[str, Any], taken: Iterable[str]) -> dict[str, Any]:
    """Return the frozen config with the values that `tree` has at the paths `taken`, and with the
    sections of `tree` that it lacks. Paths are of keys, or of sections with all their keys."""
    made = {**tree, **copy.deepcopy(dict(frozen))}
    given = [*taken, *_OF_COMMAND]
    given += LENGTHS if any(name in given for name in LENGTHS) else ()
    for path in given:
        *sections, name = path.split(".")
        here, there = tree, made
        for section in sections:
            here, there = here.get(section) or {}, there.setdefault(section, {})
        if name in here:
            there[name] = copy.deepcopy(here[name])
        else:
            there.pop(name, None)
    return made


def over_origin(tree: dict[str, Any], find: Find, taken: Iterable[str]) -> dict[str, Any]:
    """Return `tree` with the model of the run that it branches from, and what `taken` says of the
    model over it. The whole model is that of `tree` if a file is chosen; and if the origin's is a
    class of the user's own, which is to be typed. What followed from the length of the origin's
    rows follows from that of the branch, if it is longer.

    find: returns the frozen config of the run in a directory, or None.
    """
    run = tree.get("run") or {}
    origin = (run.get("from") or {}).get("run")
    typed = [path for path in taken if path.partition(".")[0] == "model"]
    if not origin or "model" in typed:
        return tree
    places = (Path(origin), Path(str(run.get("root"))).expanduser() / origin)
    frozen = next((found for place in places if (found := find(place))), None)
    if frozen is None or "_target_" in frozen["model"]:
        return tree
    model = copy.deepcopy(frozen["model"])
    model["source_length"] = None  # it always follows
    length, longest = tree["train"]["sequence_length"], model["max_sequence_length"]
    is_free = model["position"] != "learned" and model["rope_scaling"] == "none"
    if is_free and longest and isinstance(length, int) and length > longest:
        model["max_sequence_length"] = None
    return {**tree, "model": over_frozen(tree, {"model": model}, typed)["model"]}
