"""Interference of two tasks in the heads of a language model: tables, arrays, heat maps and a report."""
