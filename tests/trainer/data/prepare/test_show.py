"""`forescale shards show`: the properties of a dataset, and windows in which nothing is hidden."""

import re
import shutil

import pytest
from rich.cells import cell_len

from forescale.config.sections.data import DataConfig
from forescale.data.dataset import Dataset
from forescale.data.order import Order
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.show import SHUFFLE_SHARDS, show
from tests.trainer.data.small_dataset import write_dataset
from tests.trainer.data.synthetic_text import SMALL, Texts
from tests.trainer.remote.hostile_server import HostileServer

BYTES = BuildConfig(tokenizer="bytes", validation=0.0, shard_tokens=1000, member_tokens=300)


@pytest.fixture
def built(tmp_path):
    """A dataset of these texts, one token per byte."""

    def build(*texts: str):
        return build_dataset(Texts([t.encode() for t in texts]), tmp_path / "built", BYTES)

    return build


def windows_of(page: str) -> list[list[str]]:
    """Return the lines of each window, with their gutters."""
    return [part.split("\n")[1:] for part in page.split("\n\nsample ")[1:]]


def test_the_facts_are_those_of_the_manifest(dataset):
    opened, page = Dataset(dataset), show(dataset, 0, 8, 0)
    for split in map(opened.split, ("train", "validation")):
        assert re.search(
            f"{split.name} +{split.num_documents} documents +{split.num_bytes:,} bytes +"
            f"{split.num_tokens:,} tokens  {split.num_bytes / split.num_tokens:.2f} bytes per token"
            f", {len(split.shard_tokens)} shard",
            page,
        )
    sentence = " ".join(page.split())
    for fact in (
        f"identity {opened.identity}",
        f"corpus {opened.corpus_hash}",
        "tokenizer 300 entries; <|endoftext|> (0) ends a document",
        f"sha256 {opened.manifest['tokenizer']['sha256'][:16]}",
        f"uint16 in {len(list(dataset.glob('*.tar')))} tars",
        "built from kind texts, count 60",
        f"built with tokenizer bpe, vocab_size {SMALL.vocab_size}, validation 0.2, seed 0",
        "report manifest.json, under report",
    ):
        assert fact in sentence
    assert "sample" not in page


@pytest.mark.parametrize("seed", [0, 5])
def test_windows_are_the_first_that_training_reads(dataset, seed):
    opened = Dataset(dataset)
    split, L = opened.split("train"), 20
    order = Order(split.shard_tokens, L, seed, DataConfig().shuffle_shards)
    page = show(dataset, 4, L, seed)
    heads = re.findall(r"sample (\d+)  (\S+), tokens ([\d,]+) to ([\d,]+), member(.*)", page)
    assert len(heads) == 4
    for g, (number, name, first, last, members) in enumerate(heads):
        shard, start, length = order.window(g)
        assert (int(number), name) == (g, split.shard_name(shard))
        assert (first, last) == (f"{start:,}", f"{start + length - 1:,}")
        assert members.removeprefix("s").strip().split(", ") == split.members(shard, start, length)
    assert f"The first 4 of {order.windows_per_epoch:,} windows" in page
    assert (
        f"train.sequence_length=20 train.seed={seed} data.shuffle_shards={SHUFFLE_SHARDS}" in page
    )


def test_documents_are_marked_and_complete(built):
    texts = ["one\n\n  two", "[bold]three[/]", "x" * 40]
    page = show(built(*texts), 9, 500, 0)
    [lines] = windows_of(page)
    assert "The first 1 of 1 windows" in page
    documents = [part.removesuffix("⟦<|endoftext|>⟧") for part in "\n".join(lines).split("  ◆ ")]
    documents_of_page = sorted(d.strip("\n").removesuffix("⟦<|endoftext|>⟧") for d in documents[1:])
    assert documents_of_page == sorted(["one\n  │\n  │   two", "[bold]three[/]", "x" * 40])


def test_a_document_that_continues_is_marked_in_both_windows(tmp_path):
    """One document begins with a window, another with a window's second token."""
    path = write_dataset(tmp_path / "d", [[40, 61, 10]])
    split = Dataset(path).split("train")
    order = Order(split.shard_tokens, 20, 0, SHUFFLE_SHARDS)
    page = windows_of(show(path, 6, 20, 0))
    assert len(page) == 6
    for g, lines in enumerate(page):
        _, start, length = order.window(g)
        begins = {0, 40, 101}
        marks = [line[2] for line in lines if line[2] in "◆⋯"]
        expected = "◆" if start in begins else "⋯"
        expected += "◆" * len(begins & set(range(start + 1, start + length)))
        expected += "⋯" if start + length not in {40, 101, 111} else ""
        assert "".join(marks) == expected


def test_anything_but_text_is_shown_by_name(built):
    """Control characters, characters that change the writing direction, and characters without
    width."""
    text = "a\x1b[31mb\x00\r\n\u202ec\ufeffd\te"
    page = show(built(text), 1, 100, 0)
    assert "a⟦U+001B⟧[31mb⟦U+0000⟧⟦U+000D⟧\n  │ ⟦U+202E⟧c⟦U+FEFF⟧d  e⟦<|endoftext|>⟧" in page
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\ufeff]", page)


def test_a_character_cut_in_two_shows_its_bytes(built):
    path = built("数" * 10)  # E6 95 B0
    firsts = {lines[0][4:] for lines in windows_of(show(path, 9, 4, 0))}
    assert {"数⟦E6⟧⟦95⟧", "⟦95⟧⟦B0⟧数", "⟦B0⟧数⟦E6⟧"} <= firsts


def test_long_lines_are_wrapped_and_lose_nothing(built):
    words = "The quick brown fox, " * 20 + "数据" * 60
    lines = windows_of(show(built(words), 1, 5000, 0))[0]
    assert max(map(cell_len, lines)) <= 100
    assert [line[:4] for line in lines] == ["  ◆ ", *["  ┊ "] * (len(lines) - 1)]
    assert "".join(line[4:] for line in lines) == words + "⟦<|endoftext|>⟧"


def test_colours_appear_only_on_a_terminal(built, monkeypatch):
    path = built("one", "two \x1b[31m")
    plain = show(path, 1, 100, 0)
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    coloured = show(path, 1, 100, 0)
    assert re.search("\x1b\\[[0-9;]*m", coloured)
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == plain


def test_a_dataset_at_an_address_shows_the_same(dataset, tmp_path, monkeypatch, forescale):
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    local = show(dataset, 2, 256, 0)
    with HostileServer() as server:
        server.files |= {f"/d/{p.name}": p.read_bytes() for p in dataset.iterdir()}
        url = f"{server.url}/d"
        code, out, _ = forescale("shards", "show", f"{url}?signature=secret", "windows=2")
    assert code == 0
    assert out.replace(f"{url}?...", str(dataset)).split() == local.split()


def test_the_keys_of_show_are_used(dataset, forescale):
    words = ("windows=2", "sequence_length=9", "seed=4")
    assert forescale.prints("shards", "show", dataset, *words) == show(dataset, 2, 9, 4) + "\n"


def test_a_split_without_windows_is_reported(tmp_path):
    path = write_dataset(tmp_path / "d", [], [[5]])
    assert show(path, 3, 8, 0).endswith("The training split holds no window.")


def test_errors_are_one_sentence(dataset, tmp_path, forescale):
    broken = shutil.copytree(dataset, tmp_path / "broken")
    for tar in broken.glob("train-*.tar"):
        raw = bytearray(tar.read_bytes())
        for at in range(512, len(raw), 512):
            raw[at] ^= 1
        tar.write_bytes(raw)
    for words, sentence in (
        ((dataset, "sequence_length=0"), "sequence_length: must be at least 1"),
        ((tmp_path,), "not a dataset (no manifest.json)"),
        ((broken,), "is damaged"),
        ((dataset, "window=3"), "window: isn't a key of shards show; did you mean windows?"),
        ((dataset, tmp_path), "needs exactly one dataset"),
    ):
        err = forescale.refuses("shards", "show", *words)
        assert sentence in err
        assert "Traceback" not in err
