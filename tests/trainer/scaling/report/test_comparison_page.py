"""The page and the picture of a comparison."""

import json
import re
from dataclasses import replace

import pytest

from forescale.scaling.analysis.comparison import Comparison
from forescale.scaling.config import TargetPoint
from forescale.scaling.report import comparison_page as pictures
from tests.trainer.scaling.analysis.test_comparison import compared, table


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    noisy = table(noise=0.002, seed=1), table(gain=2.0, noise=0.002, seed=2)
    return compared(*noisy, TargetPoint(flops=4e21))


def test_both_curves_have_a_line_a_band_and_the_runs(comparison):
    curves, multipliers = pictures.panels(comparison)
    assert [t.kind for t in curves.traces] == ["band", "line", "dots"] * 2
    assert list(curves.traces[2].y) == comparison.a.study.all_points.loss.tolist()
    assert [t.colours[0] for t in curves.traces if t.kind == "line"] == [*pictures.COLOURS]
    level, _, values, star = multipliers.traces
    assert list(level.y) == [1, 1]
    assert list(values.y) == [p.multiplier.value for p in comparison.places]
    assert list(values.x) == [p.flops[0] for p in comparison.places]
    assert list(star.y) == [comparison.target.multiplier.value]


def test_the_page_has_every_number_in_full_and_loads_nothing(comparison):
    evil = Comparison(comparison.a, replace(comparison.b, name="<b>$x"))
    assert "<b>$x" not in pictures.page(evil, ["x"])[0]
    page, _ = pictures.page(comparison, ["forescale", "study", "compare"])
    for ratio in (comparison.mean, comparison.target.multiplier, comparison.places[3].multiplier):
        assert f'<data value="{ratio.value!r}">' in page
    assert comparison.summary in page.replace("&#39;", "'")
    assert not re.search(r'(src|href)="(?!data:|#)', page[page.index("<header>") :])
    assert page == pictures.page(comparison, ["forescale", "study", "compare"])[0]


@pytest.mark.slow  # seconds
def test_the_command_prints_the_multiplier_and_writes_the_picture(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    for name, gain, seed in (("old", 1.0, 1), ("new", 2.0, 2)):
        table(gain, noise=0.002, seed=seed).to_csv(f"{name}.csv", index=False)
    words = ("study", "compare", "old.csv", "new.csv", "bootstraps=100", "near=null")
    code, out, err = forescale(*words, "to=there/c.html")
    assert code == 0
    assert re.search(
        r"Over the common range: new reaches the same loss with (1.9|2).* times less .* than old "
        r"\(90%: 1\.\d+ to 2\.\d+\)\.",
        out,
    )
    assert re.search(r"^mean of the range +2\.\d+ +1\.\d+ to 2\.\d+ *$", out, re.MULTILINE)
    assert err.split() == ["there/c.html", "there/c-files/compare.png", "there/c-files/compare.svg"]
    assert (tmp_path / "there/c-files/compare.png").stat().st_size > 10_000
    code, out, err = forescale(*words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["multiplier"]["includes_one"] is False


def test_equal_recipes_are_said_to_be_equal(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("old", 3), ("new", 4)):
        table(noise=0.004, seed=seed).to_csv(f"{name}.csv", index=False)
    words = ("study", "compare", "old.csv", "new.csv", "bootstraps=100", "near=null")
    code, out, _ = forescale(*words)
    assert code == 0
    assert "The 90% interval includes 1: these runs don't show which needs less." in out
    assert forescale("study", "compare", "old.csv")[0] == 2
