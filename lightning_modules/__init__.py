"""Thin Lightning shells around the algorithms of ``theria``, and the command line ``theria``."""

from lightning_modules.fully_sharded import FullyShardedStrategy
from lightning_modules.memory_lm import MemoryLM
from lightning_modules.meta_seq_classifier import MetaSeqClassifier
from lightning_modules.optimisation import WarmupCosine

__all__ = ["FullyShardedStrategy", "MemoryLM", "MetaSeqClassifier", "WarmupCosine"]
