"""Tokenizers are lossless, and the number of bytes of their ids is exact."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from forescale.data.tokenizer import (
    END_OF_TEXT,
    byte_tokenizer,
    end_of_text,
    load_tokenizer,
    longest_token,
    mask_id,
    token_bytes,
    train_bpe,
)
from forescale.ground.errors import UserError


@pytest.fixture(scope="module")
def bpe(texts):
    return train_bpe((t.decode() for t in texts), 350)


@given(st.text(st.characters(codec="utf-8")))
@settings(max_examples=150, deadline=None)
def test_sizes_sum_to_the_text(bpe, text):
    for tokenizer in (bpe, byte_tokenizer()):
        tokenizer.encode_special_tokens = True
        ids = tokenizer.encode(text).ids
        assert int(token_bytes(tokenizer)[ids].sum()) == len(text.encode())
        assert len(text.encode()) <= (longest_token(tokenizer) or 0) * len(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_training_depends_only_on_the_text(texts, bpe):
    assert train_bpe((t.decode() for t in texts), 350).to_str() == bpe.to_str()
    assert bpe.get_vocab_size() == 350
    assert bpe.token_to_id(END_OF_TEXT) == 0


def test_a_tokenizer_that_may_drop_text_has_no_longest_token():
    assert longest_token(byte_tokenizer()) == len(END_OF_TEXT)
    changed = [byte_tokenizer() for _ in range(3)]
    changed[0].normalizer = normalizers.Strip()
    before = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
    changed[1].pre_tokenizer = pre_tokenizers.Sequence(before)
    changed[2].add_tokens([AddedToken("x", lstrip=True)])
    for tokenizer in changed:
        assert len(tokenizer.encode(" " * 99 + "x").ids) < 9
        assert longest_token(tokenizer) is None


def test_bytes_are_their_own_ids():
    text = "naïve 🙂\x00\n"
    assert byte_tokenizer().encode(text).ids == list(text.encode())
    assert end_of_text(byte_tokenizer(), "here") == 256
    assert token_bytes(byte_tokenizer()).tolist() == [1] * 256 + [0]


def test_byte_fallback_pieces():
    vocab = {"<unk>": 0, "<0x0A>": 1, "\u2581the": 2, "数": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    assert token_bytes(tokenizer).tolist() == [0, 1, 4, 3, 0]
    assert end_of_text(tokenizer, "here") == 4


def test_words_and_pieces_without_bytes_count_as_they_are_decoded():
    """BERT's and T5's kinds; what they can't write counts no bytes."""
    vocab = {"[UNK]": 0, "[MASK]": 1, "ab": 2, "##c": 3, "é": 4}
    words = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    words.add_special_tokens(["[UNK]", "[MASK]"])
    ids = words.encode("abc é ab").ids
    assert token_bytes(words)[ids].sum() == len(f" {words.decode(ids)}".encode())
    assert mask_id(words) == 1
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581ab", -1.0), ("é", -2.0)], 0))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pieces.add_special_tokens(["<unk>"])
    assert token_bytes(pieces).tolist() == [0, 3, 2]
    assert mask_id(pieces) is None


@pytest.mark.parametrize(
    ("declared", "end"), [(256, 256), ([257, 256], 257), (2, 256), (None, 256)]
)
def test_the_end_is_the_declared_one_unless_that_is_an_id_of_texts(tmp_path, declared, end):
    """A config.json may be of another model than the tokenizer: 2 is here a byte, Llama's </s>."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|im_end|>"])
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": declared}))
    assert end_of_text(tokenizer, str(tmp_path)) == end


def with_id(index: int) -> Tokenizer:
    spec = json.loads(byte_tokenizer().to_str())
    spec["model"]["vocab"]["zz"] = index
    return Tokenizer.from_str(json.dumps(spec))


def test_invalid_tokenizers_raise_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"bad\.json: not a valid tokenizer"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(UserError, match="no fixed number of bytes"):
        token_bytes(Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(UserError, match="its largest id is 4,000,000,000"):
        token_bytes(with_id(4_000_000_000))
    with pytest.raises(UserError, match="257"):
        train_bpe(["x"], 100)
    with pytest.raises(UserError, match="'a' can't end documents"):
        end_of_text(byte_tokenizer(), "here", "a")
    with pytest.raises(UserError, match=r"no token <\|done\|>.*special tokens: <\|endoftext\|>"):
        end_of_text(byte_tokenizer(), "here", "<|done|>")
    assert np.all(token_bytes(byte_tokenizer()) <= 1)
