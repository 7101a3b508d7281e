"""Data for training: deterministic, resumable at any batch, shardable over ranks."""
