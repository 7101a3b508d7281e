"""Thin Lightning shells around the algorithms of ``theria``, and the command line ``theria``."""
