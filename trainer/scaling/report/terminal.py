"""The page of a study's fit: the law, how sure it is, how it met dearer runs, what it foretells.

Invariant: whatever is doubtful about the numbers stands on the same page as the numbers.
"""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.console import table
from forescale.scaling.analysis.answer import StudyFit
from forescale.scaling.analysis.forecast import Card, Score
from forescale.scaling.analysis.weights import effective


def show(made: StudyFit, console: Console, where: str) -> None:
    """Print the page. where: what the runs are called."""
    fit, job = made.fit, made.job
    p = made.points
    console.print(f"[bold]{escape(where)}[/]: {len(p)} runs, {escape(made.form.source)}")
    ranges = [f"{n} {x.min():.3g} to {x.max():.3g}" for n, x in
              (("N", p.parameters), ("D", p.tokens), ("C", p.flops)) if x is not None]  # fmt: skip
    console.print(f"{', '.join(ranges)}; loss {p.loss.min():.4g} to {p.loss.max():.4g}")
    console.print()
    console.print(_parameters(made))
    c = fit.certificate
    word = "certified" if c.holds else "[red]not certified[/]"
    console.print(
        f"Objective {fit.value:.10g}, {word}: scaled gradient {c.scaled_gradient:.1e}, "
        f"{len(c.basins)} minima from {sum(b.starts for b in c.basins) + c.astray} starts; "
        f"{made.replicates.uncertified} of {job.bootstraps} resampled fits uncertified",
        soft_wrap=True,
    )
    if made.weights is not None:
        w, noise = made.weights, made.noise
        known = f"from {noise.freedom} repeats" if noise.freedom else "assumed"
        console.print(
            f"Weights by {job.weights}: the heaviest run counts {w.max() / w.min():.3g} times the "
            f"lightest, all as many as {effective(w):.1f} alike; noise of a run {noise.at:.2%}, "
            f"{known}",
            soft_wrap=True,
        )
    if made.allocation is not None:
        a, (low, high) = made.allocation
        console.print(f"N* grows as C^{a:.4f} ({low:.4f} to {high:.4f})")
    _show_isoflop(made, console)
    _show_roll_outs(made, console)
    if (f := made.foretold()) is not None:
        what = "prior only" if made.discrepancy.is_prior else f"{f.origins} roll-outs"
        console.print(
            f"\n[bold]Foretold[/] N {f.parameters:.4g}, D {f.tokens:.4g}, {f.beyond:.2g} times the "
            f"compute of the largest run: loss {f.loss:.4f}; 50% {f.inner[0]:.4f} to "
            f"{f.inner[1]:.4f}, {job.level:.0%} {f.outer[0]:.4f} to {f.outer[1]:.4f} "
            f"({made.discrepancy.a_decade:.1%} a decade, {what}; resampling alone would say "
            f"{f.bare[0]:.4f} to {f.bare[1]:.4f})",
            soft_wrap=True,
        )
    _show_sensitivity(made, console)
    console.print("\nRuns that move the law most: " + ", ".join(n for n, _ in made.influence()))
    for note in [*made.notes, *made.disagreements()]:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)


def show_score(found: Sequence[Card], made: Score, console: Console) -> None:
    """Print how cards came out."""
    rows = table(
        "card", "run", "beyond", "foretold", "interval", "came out", "error", left=("run",)
    )
    for card in found:
        f, o = card.facts, card.outcome
        ends = f"{f['interval'][0]:.4f} to {f['interval'][1]:.4f}"
        beyond = f"{f['target']['beyond']:.3g} x"
        out = (f"{o['loss']:.4f}", f"{made.errors[card.id]:+.2%}") if o else ("-", "-")
        rows.add_row(card.id, escape(f["target"]["run"]), beyond, f"{f['loss']:.4f}", ends, *out)
    console.print(rows)
    n = len(made.errors)
    console.print(
        f"{n} of {len(found)} came out: {made.inside} inside of the interval, {made.inside_50} of "
        f"the 50% one; {len(made.abandoned)} abandoned so far. The chain of cards is whole.",
        soft_wrap=True,
    )
    if n:
        skill = ", ".join(f"{name} {value:+.2f}" for name, value in made.skill.items())
        line = f"Interval score {made.interval_score:.4f}; skill against {skill}"
        console.print(line, soft_wrap=True)


def _show_roll_outs(made: StudyFit, console: Console) -> None:
    """The headline of a study: how the law, fitted to the cheaper budgets, met the dearer ones."""
    if not made.roll_outs:
        if "budget" in made.table:
            told = made.table["budget"].nunique()
            console.print(
                f"\nNo roll-outs: {told} budgets can't be parted into some that a law is fitted to "
                "and dearer ones that it meets; run four or more. Beyond them it rests on a prior.",
                soft_wrap=True,
            )
        return
    level = f"{made.job.level:.0%}"
    names = ("fitted to budgets", "runs", "beyond", "error", "bias", f"bare {level}", "calibrated")
    found = table(*names)
    for r in made.roll_outs:
        error, bias = np.sqrt(np.mean(r.errors**2)), np.mean(r.errors)
        found.add_row(
            str(r.budgets),
            str(r.runs),
            f"{r.factors.min():.3g} to {r.factors.max():.3g} x",
            f"{error:.2%}",
            f"{bias:+.2%}",
            f"{r.bare.mean():.0%}",
            f"{r.calibrated.mean():.0%}",
        )
    console.print()
    console.print(found)
    bare = np.concatenate([r.bare for r in made.roll_outs])
    calibrated = np.concatenate([r.calibrated for r in made.roll_outs])
    console.print(
        f"Of {len(bare)} runs foretold, {bare.mean():.0%} lay inside of the {level} interval of "
        f"resampling alone, {calibrated.mean():.0%} inside of the one calibrated by earlier "
        "roll-outs",
        soft_wrap=True,
    )


def _parameters(made: StudyFit) -> Table:
    low, high = made.replicates.interval(made.job.level)
    errors = made.replicates.errors
    names = ("", "value", "std. error", f"{made.job.level:.0%} low", "high", *made.others)
    found = table(*names, left=("",))
    for i, (symbol, value) in enumerate(made.fit.values.items()):
        others = [f"{other.values[symbol]:.5g}" for other in made.others.values()]
        cells = (value, errors[symbol], low[i], high[i])
        found.add_row(symbol, *(f"{x:.5g}" for x in cells), *others)
    return found


def _show_sensitivity(made: StudyFit, console: Console) -> None:
    """How much of the law is a matter of counting."""
    rows = made.sensitivity
    if rows is None:
        return
    console.print()
    if len(rows) == 1:
        console.print("N and C are counted in one way here: there is no other to compare it with.")
        return
    level, exponents = f"{made.job.level:.0%}", made.form.exponents
    names = ["N counts", "C counts", "C ~ N^p D, p", "N* ~ C^a, a", f"{level} low", "high"]
    found = table(*names, *exponents, "target's loss", left=("N counts", "C counts"))
    for row in rows:
        a = ["-"] * 3 if row.interval is None else [f"{row.allocation:.4f}"]
        a += [] if row.interval is None else [f"{x:.4f}" for x in row.interval]
        cells = [f"{row.values[s]:.4g}" for s in exponents]
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        found.add_row(escape(row.size), escape(row.cost), f"{row.per:.3f}", *a, *cells, loss)
    console.print(found)


def _show_isoflop(made: StudyFit, console: Console) -> None:
    iso = made.isoflop
    if iso is None:
        return
    if isinstance(iso, str):
        console.print(f"IsoFLOP parabolas: {escape(iso)}", soft_wrap=True)
        return
    low, high = iso.tokens.interval(made.job.level)
    console.print(
        f"IsoFLOP parabolas: {len(iso.vertices)} budgets; D* = {iso.tokens.k:.4g} C^"
        f"{iso.tokens.a:.4f} ({low[1]:.4f} to {high[1]:.4f}), N* = {iso.parameters.k:.4g} C^"
        f"{iso.parameters.a:.4f}",
        soft_wrap=True,
    )
    for refused in iso.refusals:
        console.print(
            f"  refused {refused.budget:.2g} FLOPs: {escape(refused.why)}", soft_wrap=True
        )
