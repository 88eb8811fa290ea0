"""`forescale inspect`: the page and its numbers, as a user gets them."""

import json
import re

import pytest
import torch
from tokenizers import Tokenizer

from forescale.inspection.heads import maps_of
from forescale.inspection.html import page
from forescale.inspection.reading import read, spelled, tokens_of
from tests.trainer.inspection.test_numbers import build, text
from tests.trainer.offline_tab import offline_tab

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def read_model():
    """A reading by a model of attention and a recurrence, with a trace."""
    model = build(mixer_pattern=["attention", "mingru"])
    return model, read(model, text().tolist(), subject=(2, 4))


def html_of(reading, tokenizer):
    pieces = [HOSTILE, *(chr(97 + i) for i in range(len(reading.tokens) - 1))]
    return page(reading, pieces, tokenizer, f"run {HOSTILE}", ["inspect", "x"])


@pytest.fixture
def tokenizer(small_data):
    return Tokenizer.from_file(str(small_data / "tokenizer.json"))


def test_the_page_has_all_and_nothing_of_a_text_is_code(read_model, tokenizer):
    model, reading = read_model
    html = html_of(reading, tokenizer)
    assert HOSTILE not in html
    assert not re.search(r"(src|href)=[\"']?http", html)
    data = json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', html, re.S)[1])
    assert data["tokens"][0] == HOSTILE.replace(" ", "·")
    assert data["losses"] == reading.losses
    first = torch.tensor(list(__import__("base64").b64decode(data["layers"][0]["maps"][0])))
    expected = maps_of(model, text())[0][0].flatten() * 255
    assert (first - expected).abs().max() <= 0.5
    assert [len(layer["heads"]) for layer in data["layers"]] == [4, 0]
    assert "mingru gives no weights" in html


def test_numbers_are_those_of_the_model(read_model):
    model, reading = read_model
    x = text()
    loss = torch.nn.functional.cross_entropy(model(x[None])[0, :-1], x[1:])
    assert reading.loss == pytest.approx(loss.item(), rel=1e-5)
    numbers = reading.as_dict()
    assert json.loads(json.dumps(numbers))["layers"][1]["heads"] == []
    assert "maps" not in numbers["layers"][0]
    assert [len(row) for row in numbers["lens"]] == [13, 13, 13]


def test_pieces_add_up_to_the_text_and_a_subject_is_found(tokenizer):
    ids = [0, *tokenizer.encode("def 数据(x):").ids]
    pieces = spelled(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces[1:]) == "def 数据(x):"
    first, end = tokens_of(pieces, "数据")
    assert "数据" in "".join(pieces[first:end])
    assert "数据" not in "".join(pieces[first + 1 : end])


def test_the_command_writes_a_page(own_run, forescale):
    out = forescale.prints("inspect", "small", "text=def main(x):", "subject=main")
    assert re.match(r"small-8-inspect\.html: \d+ tokens of the text, \d\.\d+ nats a token", out)
    out = forescale.prints("inspect", "small", "tokens=9", "--json")
    assert len(json.loads(out)["tokens"]) == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text=def", "subject=class"], "subject: 'class' is not in the"),
        (["text=def", "answer=x"], "answer: is that of a trace; give subject"),
        (["text="], "text: has fewer than two tokens; give some words"),
        (["tokens=2"], "tokens: must be at least 3"),
    ],
)
def test_a_mistake_is_one_sentence(own_run, forescale, words, message, tmp_path):
    assert message in forescale.refuses("inspect", "small", *words)
    assert not [*tmp_path.glob("*.html")]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_draws_it(browser, read_model, tokenizer, tmp_path, width):
    """Nothing overflows, fails, or is asked of a network; pointing at a map says what it shows."""
    html = html_of(read_model[1], tokenizer)
    with offline_tab(browser, html, tmp_path / "page.html", width) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator(".heads button").count() == 4 + 1  # the heads, and an influence
        tab.locator(".heads button").nth(2).click()
        assert tab.locator("#big-title").inner_text() == "Layer 0, head 2"
        tab.locator("#big").click(position={"x": 3, "y": 3})
        assert tab.locator("#big-say").inner_text().startswith("0: ")
        assert "with 1.000" in tab.locator("#big-say").inner_text()  # the first sees itself alone
        tab.locator(".text button").nth(3).click()
        assert "probability" in tab.locator("#expected").inner_text()
        assert tab.locator("#traces canvas").count() == 3
