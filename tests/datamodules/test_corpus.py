"""Nothing of a split stands in another, nothing is lost but repeats, and the hashes name what is there."""

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.corpus import SPLITS, build_corpus, cut_documents, digest, paragraphs
from datamodules.documents import Document, Domain, read_documents

WORDS = st.sampled_from(["a", "b", "c d", "c  d", " c\n\td", "e\u00e9"])
TEXTS = st.lists(WORDS, min_size=1, max_size=5).map(lambda words: "\n\n".join(words).encode())
DOMAINS = st.dictionaries(
    st.sampled_from(["x", "y", "z"]), st.lists(TEXTS, min_size=1, max_size=12), min_size=1
).map(
    lambda texts: {name: [Document(str(i), t) for i, t in enumerate(found)] for name, found in texts.items()}
)


def naive_paragraphs(text: bytes) -> list[str]:
    """Blocks of non-blank lines, their white space made single spaces."""
    blocks, block = [], []
    for line in [*text.decode().split("\n"), ""]:
        if line.strip():
            block.append(line)
        elif block:
            blocks.append(" ".join(" ".join(block).split()))
            block = []
    return blocks


@settings(deadline=None, derandomize=True)
@given(DOMAINS)
def test_every_paragraph_is_kept_once_in_order(domains: dict[str, list[Document]]) -> None:
    # enough beside them that no split stays empty
    domains = {
        name: [*found, *(Document("", f"{name} {i}".encode()) for i in range(40))]
        for name, found in domains.items()
    }
    corpus = build_corpus(domains, val_fraction=0.3, test_fraction=0.3)
    kept = [
        paragraph
        for splits in corpus.texts.values()
        for split in SPLITS
        for text in splits[split]
        for paragraph in naive_paragraphs(text)
    ]
    original = [
        paragraph
        for documents in domains.values()
        for document in documents
        for paragraph in naive_paragraphs(document.text)
    ]
    assert sorted(kept) == sorted(set(original))


def test_no_held_out_paragraph_of_the_real_corpus_stands_in_training() -> None:
    domains = {
        "prose": read_documents(Domain(built_in="python_docs")),
        "sources": read_documents(Domain(built_in="python_sources")),
    }
    corpus = build_corpus(domains, val_fraction=0.1, test_fraction=0.05)
    found = {
        split: {
            p for splits in corpus.texts.values() for text in splits[split] for p in naive_paragraphs(text)
        }
        for split in SPLITS
    }
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert found[one]
        assert not found[one] & found[other]
    # and it would not be so by itself: a fifth of the prose stands in it more than once
    documents = domains["prose"]
    size = sum(len(document.text) for document in documents)
    kept = sum(len(text) for texts in corpus.texts["prose"].values() for text in texts)
    assert 0.5 * size < kept < 0.9 * size
    assert sum(len(p) for p in set().union(*found.values())) < sum(
        len(p) for d in (*domains["prose"], *domains["sources"]) for p in naive_paragraphs(d.text)
    )


def test_the_split_of_a_document_is_its_own_affair() -> None:
    documents = [Document(str(i), f"document {i}".encode()) for i in range(200)]

    def split_of(members: list[Document]) -> dict[bytes, str]:
        corpus = build_corpus({"d": members}, val_fraction=0.2, test_fraction=0.1)
        return {text: split for split, texts in corpus.texts["d"].items() for text in texts}

    whole = split_of(documents)
    assert {text: whole[text] for text in split_of(documents[:100])} == split_of(documents[:100])
    assert split_of(documents[::-1]) == whole
    for text, split in whole.items():
        u = int(hashlib.sha256(text).hexdigest()[:16], 16) / 16**16
        assert split == ("validation" if u < 0.2 else "test" if u < 0.3 else "train")
    shares = [list(whole.values()).count(split) for split in SPLITS]
    assert abs(shares[1] - 40) < 20
    assert abs(shares[2] - 20) < 15


def test_a_document_is_split_by_what_it_was_before_repeats_went() -> None:
    documents = [Document(str(i), f"common\n\nown {i}".encode()) for i in range(60)]
    alone = build_corpus({"d": documents}, val_fraction=0.3, test_fraction=0.3)
    # another first document takes the common paragraph out of all others
    more = build_corpus(
        {
            "c": [Document("", b"common")] + [Document(str(i), f"{i}".encode()) for i in range(60)],
            "d": documents,
        },
        val_fraction=0.3,
        test_fraction=0.3,
    )
    assert {s: [t.split()[-1] for t in alone.texts["d"][s]] for s in SPLITS} == {
        s: [t.split()[-1] for t in more.texts["d"][s]] for s in SPLITS
    }
    assert not any(b"common" in text for split in SPLITS for text in more.texts["d"][split])


def test_blank_lines_between_kept_paragraphs_stay_as_they_are() -> None:
    text = b"\n\n  a\n b\n \t\n\n    c\n\nd\r\n\r\ne\n"
    assert [p for p, _ in paragraphs(text)] == [b"", b"  a\n b", b"    c", b"d\r", b"e\n"]
    documents = [Document("0", text)] + [Document(str(i), str(i).encode()) for i in range(50)]
    corpus = build_corpus({"d": documents}, val_fraction=0.3, test_fraction=0.3)
    assert text in [t for texts in corpus.texts["d"].values() for t in texts]
    again = build_corpus(
        {"c": [Document(str(i), f"c\n\n{i} {i}".encode()) for i in range(50)], "d": documents},
        val_fraction=0.3,
        test_fraction=0.3,
    )
    kept = [t for texts in again.texts["d"].values() for t in texts]
    assert b"\n\n  a\n b\n \t\n\nd\r\n\r\ne\n" in kept


@settings(deadline=None, derandomize=True)
@given(TEXTS, st.integers(1, 20))
def test_cut_documents_join_to_the_whole_and_keep_paragraphs(text: bytes, most: int) -> None:
    pieces = cut_documents([Document("d", text)], most)
    assert b"".join(piece.text for piece in pieces) == text
    assert [p for piece in pieces for p in naive_paragraphs(piece.text)] == naive_paragraphs(text)
    for piece in pieces:
        assert len(piece.text.rstrip()) <= most or len(naive_paragraphs(piece.text)) == 1
    assert cut_documents([Document("d", text)], None) == [Document("d", text)]


def test_hashes_change_with_every_part() -> None:
    def hashes(*texts: bytes) -> tuple[str, str]:
        documents = [Document("", text) for text in texts]
        corpus = build_corpus({"d": documents}, val_fraction=0.3, test_fraction=0.3)
        return corpus.hash, corpus.split_hash("d", "train")

    base = [f"text {i}".encode() for i in range(40)]
    assert hashes(*base) == hashes(*base)
    assert hashes(*base) != hashes(*base[::-1])
    assert hashes(*base, b"more")[0] != hashes(*base)[0]
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])
    assert re.fullmatch("[0-9a-f]{64}", hashes(*base)[0])


@pytest.mark.parametrize("fractions", [(0.0, 0.1), (0.1, 0.0), (0.5, 0.5), (-0.1, 0.2)])
def test_fractions_that_leave_no_split_are_refused(fractions: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="val_fraction and test_fraction"):
        build_corpus({}, val_fraction=fractions[0], test_fraction=fractions[1])


def test_an_empty_split_is_named_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"domain 'd': none of its 1 documents falls.*max_document_bytes"):
        build_corpus({"d": [Document("", b"x"), Document("", b" \n")]}, val_fraction=0.1, test_fraction=0.1)
