"""The figures of the README are those of the pages of results."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
ATTENTION = r"E 64, bfloat16, causal\n.*?\| {row} \|(?: [^|]*\|){{3}} [\d.]+ ms \({factor}x\), {memory} MiB"
FACTOR, NUMBER = r"([\d.]+)", r"([+-]?[\d,]*\.?\d+)"
# A line of the README by its beginning, and in order for each of its figures: the page, and the place there.
LINES = {
    "forward, backward and double backward": [
        ("attention", ATTENTION.format(row="torch MATH", factor=FACTOR, memory=r"\d+")),
        ("attention", ATTENTION.format(row="torch MATH, half reduction", factor=FACTOR, memory=r"\d+")),
        ("attention", ATTENTION.format(row="triton_fused", factor="1.00", memory=r"(\d+)")),
        ("attention", ATTENTION.format(row="torch MATH", factor=r"[\d.]+", memory=r"(\d+)")),
        ("attention", ATTENTION.format(row="torch MATH, half reduction", factor=r"[\d.]+", memory=r"(\d+)")),
    ],
    "what second order through attention adds": [
        ("operator_sensitivity", rf"\*\*paired\*\*.*?k = 1: {NUMBER} "),
        ("operator_sensitivity", rf"\*\*paired\*\*.*?k = 20: {NUMBER} "),
        (None, "20"),
    ],
    "recall beyond attention's reach": [
        ("memory_lm_60m", rf"stored farther back than \d+ tokens \| {NUMBER} \|"),
        ("memory_lm_60m", rf"stored farther back than \d+ tokens \| [\d.]+ \| {NUMBER} \|"),
    ],
    "held-out Python sources": [
        ("memory_lm_60m", rf"\| sources \| {NUMBER} \|"),
        ("memory_lm_60m", rf"\| sources \| [\d.]+ \| {NUMBER} \|"),
        (None, "-9"),
        ("memory_lm_60m", rf"\| sources \| [\d.]+ \| [\d.]+ \| {NUMBER} \|"),
    ],
    "that training step beside": [
        ("memory_h200", rf"\| memory, compiled and captured \|(?: [^|]*\|){{4}} {NUMBER} \|"),
        ("memory_h200", rf"\| memory, compiled and captured \|(?: [^|]*\|){{5}} {NUMBER} \|"),
    ],
    "15,000 healthy steps": [
        ("self_healing", rf"\*\*{NUMBER} rollbacks in 15000 healthy steps"),
        ("self_healing", rf"\*\*{NUMBER} of 30 caught within 3 steps"),
        (None, "3"),
        ("self_healing", rf"; {NUMBER} of 30 end within 1% of the undisturbed"),
        (None, "1"),
    ],
    "17,280,000 interference scores": [
        ("interference_h200", rf"\| theria, from the factors kept \|(?: [^|]*\|){{2}} {NUMBER} \|"),
        ("interference_h200", rf"factors given to both, within the budget \| {NUMBER} \|"),
    ],
}
TITLES = [
    ("interference_h200", "17,280,000 scores", "17,280,000 interference scores"),
    (
        "memory_lm_60m",
        "| memory | 59,343,984 | 3,055 | 100.1 M | 5.3 |",
        "59 million parameters, 5.3 minutes",
    ),
    ("self_healing", "15000 healthy steps", "15,000 healthy steps and 30 faults"),
]


def page(name):
    return (REPOSITORY / "docs" / "results" / f"{name}.md").read_text()


def number(text):
    return float(text.replace(",", "").rstrip("."))


@pytest.mark.parametrize("beginning", LINES)
def test_a_line_of_figures(beginning):
    (said,) = re.findall(rf"^\| {re.escape(beginning)}[^|]*\|(.*)\|$", README, re.MULTILINE)
    found = re.findall(r"[+-]?\d[\d,]*\.\d+|[+-]?\.\d+|-?\d[\d,]*", said)
    assert len(found) == len(LINES[beginning]), found
    for text, (name, place) in zip(found, LINES[beginning], strict=True):
        if name is None:
            assert text == place
            continue
        there = re.search(place, page(name), re.DOTALL if name == "attention" else 0)
        assert there, place
        digits = len(text.partition(".")[2])
        assert number(text) == pytest.approx(round(number(there[1]), digits), abs=1e-9), (text, there[1])


@pytest.mark.parametrize(("name", "there", "here"), TITLES)
def test_what_the_figures_are_of(name, there, here):
    assert there in page(name)
    assert here in README


def test_every_line_is_compared():
    table = README.partition("| in short |")[2].partition("\n\n")[0]
    assert len(table.splitlines()) - 2 == len(LINES)
