"""Decisions and gates of memory-language-model training, each measured and written down."""
