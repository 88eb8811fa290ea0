"""Draws what bench_mixers measured: a panel a quantity, a line a mixer, as one SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

COLOURS = (
    "#1f5fa8", "#c23b22", "#2e8540", "#8a5fb0", "#d08a1d", "#4b9db5", "#7a5a44", "#c2569b",
    "#5c6b73", "#9aa62b",
)  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """lines: the ys of each mixer at xs. mark: an x that gets a line, such as the trained length;
    0: none."""

    title: str
    across: str
    xs: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    mark: float = 0


def draw(panels: Sequence[Panel], output: Path) -> None:
    """Write the panels, three a row; the same numbers give the same bytes.

    xs are logarithmic, and ys where they span more than a factor of 30.
    """
    matplotlib.use("svg")
    with matplotlib.rc_context({"svg.hashsalt": "forescale", "svg.fonttype": "none"}):
        _draw(panels, output)


def _draw(panels: Sequence[Panel], output: Path) -> None:
    from matplotlib import pyplot as plt

    rows = -(-len(panels) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(10.5, 3 * rows), layout="constrained")
    for at, panel in zip(axes.flat, panels, strict=False):
        for colour, (name, ys) in zip(COLOURS, panel.lines.items(), strict=False):
            at.plot(panel.xs, ys, ".-", color=colour, lw=1.2, label=name)
        is_count = max(panel.xs) < 1e6  # of tokens
        at.set_xscale("log", base=2 if is_count else 10)
        if is_count:
            at.xaxis.set_major_formatter("{x:,.0f}")
        else:
            at.set_xticks(panel.xs, [f"{x:.1e}" for x in panel.xs])
            at.minorticks_off()
        every = [y for ys in panel.lines.values() for y in ys]
        if max(every) > 30 * min(every):
            at.set_yscale("log")
        if panel.mark:
            at.axvline(panel.mark, color="#b8b8b8", lw=0.8)
        at.set_title(panel.title, fontsize=9)
        at.set_xlabel(panel.across, fontsize=8)
        at.tick_params(labelsize=7)
        at.spines[["top", "right"]].set_visible(False)
    for at in axes.flat[len(panels) :]:
        at.axis("off")
    axes.flat[0].legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)
