"""Real text and associative recall, packed into sequences, as a LightningDataModule."""

import dataclasses
import os
import platform
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from datamodules.corpus import cut_documents
from datamodules.documents import Domain, read_documents
from datamodules.loader import BatchLoader
from datamodules.packing import TokenStream
from datamodules.recall_sequences import CONTROLS, Control, Recall, RecallSequences, RecallSource
from datamodules.resumable import ResumableDataModule
from datamodules.shares import as_fraction, domain_shares
from datamodules.text_datasets import TextWindows, TrainingMixture
from datamodules.token_cache import CorpusCache, TokenizedCorpus
from datamodules.vocabulary import Vocabulary
from theria.tasks.recall import RecallSpec
from theria.tasks.synthetic_seqcls import Stream

RECALL = "recall"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


DEFAULT_RECALL = Recall()


def python_domains() -> dict[str, Domain]:
    """Prose and sources of the running Python, half and half."""
    return {"prose": Domain(built_in="python_docs"), "sources": Domain(built_in="python_sources")}


class CalibrationText(ResumableDataModule):
    """Text of several domains, with associative recall mixed in; a module receives a `TextBatch`.

    Documents lose the paragraphs that stand elsewhere already, are split by their hash, tokenized and packed
    into sequences of one length, in which every document is a shard. Tokens are the tokenizer's, then the one
    that leads and so ends a document, then keys and values of recall. What was read is in `record` and in
    the hyper-parameters after `setup`.

    Training sample i of an epoch is a function of (seed, epoch, i). The W ranks share every batch, each
    taking every W-th sample of it. Validation has a loader for each domain and one for recall, test those and
    one for each control of recall; `val_names` and `test_names` are their names in order. They may end in a
    smaller batch, of which some ranks take one sequence fewer or none: log them per epoch when ranks
    synchronise.

    Args:
        domains: where text comes from, by name; Python's documentation and sources if null.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch over all ranks; a multiple of their number.
        train_sequences_per_epoch: a multiple of batch_size. Passes over the text do not end with epochs.
        val_sequences: of each domain at validation, evenly spread over its split; null takes all. Test
            always takes all.
        tokenizer: "byte", "bpe" (trained on the training text), or a JSON file of the tokenizers package.
        tokenizer_vocab_size: of "bpe".
        recall: the recall sequences; null for text alone, with a vocabulary of text alone.
        val_fraction: of the documents of each domain.
        test_fraction: likewise.
        cache_dir: folder of tokens and trained tokenizers; null for theria in the user's cache folder.
        seed: of all random numbers, in [0, 2^64).
        num_workers: processes that make batches; 0 makes them in this one.

    Raises:
        ValueError: a value is impossible; the message names it.
    """

    def __init__(
        self,
        domains: dict[str, Domain] | None = None,
        sequence_length: int = 512,
        batch_size: int = 8,
        train_sequences_per_epoch: int = 8000,
        val_sequences: int | None = 64,
        tokenizer: str = "byte",
        tokenizer_vocab_size: int = 4096,
        recall: Recall | None = DEFAULT_RECALL,
        val_fraction: float = 0.1,
        test_fraction: float = 0.05,
        cache_dir: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.domains = python_domains() if domains is None else domains
        # dataclasses in hyper-parameters would break checkpoints that load with weights_only
        self.save_hyperparameters(ignore=["domains", "recall"])
        self.save_hyperparameters(
            {
                "domains": {name: dataclasses.asdict(domain) for name, domain in self.domains.items()},
                "recall": None if recall is None else dataclasses.asdict(recall),
            }
        )
        for name, value, least, most in (
            ("sequence_length", sequence_length, 1, 2**31),
            ("batch_size", batch_size, 1, 2**31),
            ("train_sequences_per_epoch", train_sequences_per_epoch, 1, 2**32),
            ("val_sequences", 1 if val_sequences is None else val_sequences, 1, 2**32),
            ("seed", seed, 0, 2**64 - 1),
            ("num_workers", num_workers, 0, 2**16),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be in [{least}, {most}], got {value}")
        if train_sequences_per_epoch % batch_size:
            raise ValueError(
                f"train_sequences_per_epoch = {train_sequences_per_epoch} is not a multiple of "
                f"batch_size = {batch_size}"
            )
        for name in self.domains:
            # names of loaders that begin so are recall's and its controls', also to who reads them
            if not _NAME.fullmatch(name) or name.startswith(RECALL):
                raise ValueError(
                    f"domains are named in letters, digits, - and _, and not {RECALL!r} or with it in front, "
                    f"got {name!r}"
                )
        if not self.domains:
            raise ValueError("domains must name at least one domain, or be null")
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.samples_per_epoch = train_sequences_per_epoch
        self.val_sequences = val_sequences
        self.recall = recall
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.cache_dir = _default_cache() if cache_dir is None else Path(cache_dir).expanduser()
        self.seed = seed
        self.num_workers = num_workers
        self._tokenizer_name = tokenizer
        self._tokenizer_vocab_size = tokenizer_vocab_size
        self._corpus: TokenizedCorpus | None = None

    def prepare_data(self) -> None:
        """Read, tokenize and cache the corpus, once a machine."""
        self._corpus = self._load()
        rank_zero_info(self.summary())

    def setup(self, stage: str) -> None:
        """Map the tokens, check the model's vocabulary, and start the training stream.

        Raises:
            ValueError: the model's `vocab_size` does not fit, or what the base class refuses.
        """
        if self._corpus is None:
            self._corpus = self._load()
        self.save_hyperparameters(
            {
                "python_version": platform.python_version(),
                "corpus_sha256": self.corpus.record["corpus_sha256"],
                "corpus": self.corpus.record["domains"],
            }
        )
        model_vocab = getattr(getattr(self.trainer, "lightning_module", None), "vocab_size", None)
        if model_vocab is not None:
            self.check_vocabulary(model_vocab)
        super().setup(stage)

    @property
    def corpus(self) -> TokenizedCorpus:
        """The tokens and what is known of them.

        Raises:
            RuntimeError: before `setup`.
        """
        if self._corpus is None:
            raise RuntimeError("the corpus is read in setup, which has not run yet")
        return self._corpus

    @property
    def record(self) -> dict[str, Any]:
        """What was read, in plain values: Python's version beside `TokenizedCorpus.record`."""
        return {"python_version": platform.python_version(), **self.corpus.record}

    def summary(self) -> str:
        """A line a split: documents, bytes, tokens, bytes per token and hash."""
        return f"corpus of Python {platform.python_version()}: {self.corpus.summary()}"

    def bytes_per_token(self, domain: str, split: str = "validation") -> float:
        """Bytes of text a label stands for: bits per byte = loss in nats / ln 2 / this."""
        return float(self.record["domains"][domain][split]["bytes_per_token"])

    @property
    def vocabulary(self) -> Vocabulary:
        """Numbers and names of all tokens."""
        return Vocabulary(self.corpus.tokenizer, self.recall_spec)

    @property
    def end_token(self) -> int:
        """The token that leads, and so ends, a document."""
        return self.corpus.tokenizer.num_tokens

    @property
    def vocab_size(self) -> int:
        """Tokens that a model must know."""
        return self.vocabulary.size

    @property
    def recall_spec(self) -> RecallSpec | None:
        """Shape of the recall sequences."""
        if self.recall is None:
            return None
        return self.recall.spec(length=self.sequence_length, end_token=self.end_token)

    def check_vocabulary(self, model_vocab: int) -> None:
        """Refuse a model that lacks tokens, or has more of them than rounding up explains.

        Raises:
            ValueError: model_vocab is not from vocab_size to its next multiple of 128.
        """
        self.vocabulary.check(model_vocab, self._tokenizer_name)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, those beyond the text as <end>, <key 3> and <value 5>."""
        return self.vocabulary.decode(tokens)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the numbers in `TextBatch.source`."""
        return (*self.domains, RECALL)

    @property
    def val_names(self) -> tuple[str, ...]:
        """Names of the validation loaders, in order."""
        return tuple(self.domains) if self.recall is None else self.sources

    @property
    def test_names(self) -> tuple[str, ...]:
        """Names of the test loaders, in order."""
        controls = () if self.recall is None else (f"{RECALL}_{control}" for control in CONTROLS)
        return (*self.val_names, *controls)

    def train_dataset(self) -> TrainingMixture:
        """The mixture of all domains and recall."""
        return TrainingMixture(
            self._streams("train"),
            domain_shares({name: domain.weight for name, domain in self.domains.items()}),
            recall=self.recall_source("train"),
            recall_share=Fraction(0) if self.recall is None else as_fraction(self.recall.share),
            length=self.sequence_length,
            batch_size=self.batch_size,
            samples_per_epoch=self.samples_per_epoch,
            seed=self.seed,
        )

    def val_dataloader(self) -> list[BatchLoader]:
        """One loader a domain and one of recall, named by `val_names`; the same at every pass."""
        return self._evaluation_loaders("validation", self.val_sequences, ("none",))

    def test_dataloader(self) -> list[BatchLoader]:
        """One loader a domain, of recall and of each of its controls, named by `test_names`."""
        return self._evaluation_loaders("test", None, ("none", *CONTROLS))

    def recall_source(self, split: Stream) -> RecallSource | None:
        """Where the recall sequences of a split come from; None without recall."""
        spec = self.recall_spec
        if self.recall is None or spec is None:
            return None
        return RecallSource(
            spec,
            self._streams(split) if self.recall.filler == "text" else [],
            domain_shares({name: domain.weight for name, domain in self.domains.items()}),
            split,
            self.seed,
        )

    def skip_batches(self, batches: range) -> None:
        """Pass over training batches by their numbers, which `train_dataloader().last_batch` tells."""
        self.train_dataloader().skip(batches)

    def settings(self) -> dict[str, Any]:
        """Those on which the samples depend, with the hash of the corpus."""
        recall = None if self.recall is None else dataclasses.asdict(self.recall)
        return {
            "corpus_sha256": self.corpus.record["corpus_sha256"],
            "tokenizer": self.corpus.record["tokenizer"],
            "weights": {name: domain.weight for name, domain in self.domains.items()},
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "train_sequences_per_epoch": self.samples_per_epoch,
            "recall": recall,
            "seed": self.seed,
        }

    def _load(self) -> TokenizedCorpus:
        documents = {}
        for name, domain in self.domains.items():
            try:
                documents[name] = cut_documents(read_documents(domain), domain.max_document_bytes)
            except ValueError as error:
                raise ValueError(f"domain {name!r}: {error}") from error
        cache = CorpusCache(
            documents,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            folder=self.cache_dir,
        )
        return cache.tokenized(cache.tokenizer(self._tokenizer_name, self._tokenizer_vocab_size))

    def _streams(self, split: str) -> list[TokenStream]:
        return [self.corpus.streams[name][split] for name in self.domains]

    def _evaluation_loaders(
        self, split: Stream, limit: int | None, controls: Sequence[Control]
    ) -> list[BatchLoader]:
        datasets: list[TextWindows | RecallSequences] = [
            TextWindows(stream, source, length=self.sequence_length, limit=limit)
            for source, stream in enumerate(self._streams(split))
        ]
        recall = self.recall_source(split)
        if self.recall is not None and recall is not None:
            count, source = self.recall.num_val_sequences, len(self.domains)
            datasets += [
                RecallSequences(recall, source, count=count, control=control) for control in controls
            ]
        return [self.evaluation_loader(dataset, len(dataset)) for dataset in datasets]


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "theria"
