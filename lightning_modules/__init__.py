"""Thin Lightning shells around the algorithms of ``theria``, and the command line ``theria``."""

from lightning_modules.meta_seq_classifier import MetaSeqClassifier

__all__ = ["MetaSeqClassifier"]
