"""Tokens give the text back, the same text gives the same tokenizer, and files that are none are named."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from datamodules.tokenizers import ByteTokenizer, FileTokenizer, train_bpe

TRAINING = [b"the cat sat on the mat, the dog on the log\n" * 3, "na\u00efve caf\u00e9 \u4f60\u597d".encode()]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return train_bpe(TRAINING, 270, tmp_path_factory.mktemp("bpe") / "t.json")


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=20), max_size=4))
def test_bytes_are_tokens(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    tokens = ByteTokenizer().encode(encoded)
    assert [t.tolist() for t in tokens] == [list(text) for text in encoded]
    assert [ByteTokenizer().decode(t.tolist()) for t in tokens] == texts


@settings(deadline=None, derandomize=True)
@given(texts=st.lists(st.text(max_size=20), max_size=4))
def test_trained_tokens_give_any_text_back(texts: list[str], bpe: FileTokenizer) -> None:
    tokens = bpe.encode([text.encode() for text in texts])
    assert [bpe.decode(t.tolist()) for t in tokens] == texts
    assert all(0 <= token < bpe.num_tokens for t in tokens for token in t.tolist())


def test_training_merges_and_repeats_exactly(bpe: FileTokenizer, tmp_path: Path) -> None:
    again = train_bpe(TRAINING, 270, tmp_path / "again.json")
    assert again.identity == bpe.identity
    assert bpe.num_tokens == 270
    assert len(bpe.encode(TRAINING)[0]) < len(TRAINING[0])
    other = train_bpe(TRAINING, 271, tmp_path / "other.json")
    assert other.identity != bpe.identity
    assert FileTokenizer(tmp_path / "again.json").identity == bpe.identity


@pytest.mark.parametrize("vocab_size", [256, 0])
def test_a_vocabulary_without_room_beside_the_bytes_is_refused(vocab_size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"tokenizer_vocab_size must be above 256.*got {vocab_size}"):
        train_bpe(TRAINING, vocab_size, tmp_path / "t.json")


def test_a_text_too_small_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"yields \d+ tokens at most, tokenizer_vocab_size = 5000"):
        train_bpe(TRAINING, 5000, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer file nowhere.json"):
        FileTokenizer(Path("nowhere.json"))
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"wrong.json is not a file of the tokenizers package"):
        FileTokenizer(wrong)


def test_the_vocabulary_reaches_to_the_largest_id_and_no_special_tokens_are_added(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({"a": 0, "b": 7, "[CLS]": 3, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 3)])
    words.save(str(tmp_path / "words.json"))
    tokenizer = FileTokenizer(tmp_path / "words.json")
    assert tokenizer.num_tokens == 8
    assert [t.tolist() for t in tokenizer.encode([b"a b c"])] == [[0, 7, 2]]


def test_a_file_that_cuts_or_pads_gives_whole_documents_all_the_same(tmp_path: Path) -> None:
    train_bpe(TRAINING, 270, tmp_path / "plain.json")
    expected = [t.tolist() for t in FileTokenizer(tmp_path / "plain.json").encode(TRAINING)]
    for name in ("truncation", "padding"):
        tokenizer = HFTokenizer.from_file(str(tmp_path / "plain.json"))
        if name == "truncation":
            tokenizer.enable_truncation(4)
        else:
            tokenizer.enable_padding(length=200)
        tokenizer.save(str(tmp_path / f"{name}.json"))
        found = FileTokenizer(tmp_path / f"{name}.json").encode(TRAINING)
        assert [t.tolist() for t in found] == expected, name
