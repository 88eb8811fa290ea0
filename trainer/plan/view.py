"""A plan from Python: the document of `forescale plan --json`, and a summary of it."""

from typing import Any

from forescale.ground.console import span
from forescale.plan.blocks import bytes_text


class PlanView(dict[str, Any]):
    """The fields that `forescale plan --json` prints: problems, notes, config, gpus, steps, tokens,
    seconds, options (each way to shard: total_bytes of a GPU, fits, step), chosen, and others."""

    def __repr__(self) -> str:
        """The summary: what is chosen, its memory and time, problems and notes."""
        option = self["options"][self["chosen"]]
        fits = "fits in" if option["fits"] else "does not fit in"
        time = f", {span(self['seconds'])}" if self["seconds"] is not None else ""
        gpus = f"{self['gpus']:,} GPU{'s' if self['gpus'] > 1 else ''}"
        return "\n".join([
            f"Plan: {self['steps']:,} steps, {self['tokens']:,} tokens on {gpus}{time}",
            f"{self['chosen']}: {bytes_text(option['total_bytes'])} of each GPU, {fits} "
            f"{bytes_text(self['available_bytes'])}",
            *(f"Problem: {p['key']}: {p['problem']}; {p['todo']}." for p in self["problems"]),
            *(f"Note: {note}" for note in self["notes"]),
        ])  # fmt: skip
