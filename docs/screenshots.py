"""Make the pictures of TensorBoard that the README shows: train two runs, serve them, photograph the pages.

    python docs/screenshots.py --logdir runs/pictures --out docs/pictures

The runs are those of the shipped configurations; the memory language model is probed more often, and given
two batches of wrong labels, so that there is a rollback to see. A run that is in the log directory already is
not trained again. It needs `pip install -e '.[screenshots]'` and an installed Chromium or Chrome.
"""

import argparse
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image
from tensorboard.program import TensorBoard

CONFIGS = Path(__file__).parents[1] / "configs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FAULT = {"title": "two batches of wrong labels", "kind": "corrupted", "batches": [640, 641]}


class Page(NamedTuple):
    """A page of TensorBoard to photograph.

    Attributes:
        name: of the picture.
        run: in the log directory.
        plugin: TensorBoard's name of the page.
        awaited: what has to be there, as a CSS selector.
        height: of the window, in pixels.
        category: number of the category to scroll to.
    """

    name: str
    run: str
    plugin: str
    awaited: str
    height: int
    category: int = 0


LINE = "tf-custom-scalar-dashboard vz-line-chart2 .line-plot:not(.ghost) path.line"
PAGES = (
    Page("meta_seqcls", "meta_seqcls", "custom_scalars", LINE, 1420),
    Page("memory_lm", "memory_lm", "custom_scalars", LINE, 1420),
    Page("memory_lm_health", "memory_lm", "custom_scalars", LINE, 1400, category=3),
    Page("run_card", "meta_seqcls", "text", "tf-text-dashboard table", 640),
)
WIDTH, COLOURS = 1600, 128


def memory_config() -> dict[str, Any]:
    """The shipped configuration, with more probes, closer checkpoints, and a fault."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / "memory_lm.yaml").read_text())
    callbacks = config["trainer"]["callbacks"]
    for callback in callbacks:
        if callback["class_path"] in ("NIAHProbe", "PPLDeltaRollback"):
            callback["init_args"]["every_n_steps"] = 100
    injection = "experiments.self_healing.faults.Injection"
    callbacks.append({"class_path": injection, "init_args": {"fault": FAULT}})
    return config


def train(logdir: Path) -> None:
    """Train what is not there yet."""
    from lightning_modules.cli import main

    configs = {"meta_seqcls": CONFIGS / "meta_seqcls.yaml", "memory_lm": logdir / "memory_lm.yaml"}
    logdir.mkdir(parents=True, exist_ok=True)
    configs["memory_lm"].write_text(yaml.safe_dump(memory_config(), sort_keys=False))
    for name, config in configs.items():
        if not (logdir / name).exists():
            main(["fit", "--config", str(config), "--save_dir", str(logdir), "--name", name])


@contextmanager
def served(logdir: Path) -> Iterator[str]:
    """TensorBoard in this process, until it ends; its address."""
    program = TensorBoard()
    loaded = ["--load_fast=false", "--reload_task=blocking", "--reload_interval=0"]
    program.configure(argv=[None, "--logdir", str(logdir), "--port", "0", *loaded])
    yield program.launch()


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium or Chrome, under playwright.

    Raises:
        FileNotFoundError: none is installed.
    """
    from playwright.sync_api import sync_playwright

    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(f"no browser among the installed programs: one of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        # without a sandbox a container's root may start it; it sees this machine's pages alone
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def photograph(opened: Any, address: str, page: Page, picture: Path) -> tuple[list[str], int]:
    """Open a page, wait until it shows what it should, and save what the window shows.

    Returns:
        The titles of the cards on the page, and how many lines its charts have drawn.
    """
    tab = opened.new_page(viewport={"width": WIDTH, "height": page.height})
    tab.goto(f"{address}#{page.plugin}&_smoothingWeight=0")
    tab.locator(page.awaited).first.wait_for(state="attached", timeout=60_000)
    tab.wait_for_load_state("networkidle")
    tab.locator("tf-category-paginated-view").nth(page.category).evaluate("it => it.scrollIntoView()")
    tab.wait_for_timeout(1500)  # lines are drawn in an animation
    with Image.open(BytesIO(tab.screenshot())) as image:
        image.quantize(COLOURS).save(picture, optimize=True)
    titles = tab.locator("tf-card-heading").evaluate_all("cards => cards.map(card => card.displayName)")
    lines = tab.locator(LINE).evaluate_all("lines => lines.filter(line => line.getAttribute('d')).length")
    tab.close()
    return titles, lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, serve and photograph; None stands for the arguments of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/pictures"), help="where the runs are, or go"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="where the pictures go")
    given = parser.parse_args(arguments)
    train(given.logdir)
    given.out.mkdir(parents=True, exist_ok=True)
    with browser() as opened:
        for page in PAGES:
            with served(given.logdir / page.run) as address:
                picture = given.out / f"{page.name}.png"
                photograph(opened, address, page, picture)
                print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    main()
