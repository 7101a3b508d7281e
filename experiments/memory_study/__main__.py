"""Train variants of a memory language model and write all their figures on one page.

    python -m experiments.memory_study --config configs/memory_lm.yaml --variants memory attention

Figures are kept in the work directory, one file a variant: a later command with other variants adds to the
page. Without --minutes and --steps the configuration's steps are trained. Of several variants all train as
many steps as the first.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.memory_study.compress import xz_figures
from experiments.memory_study.report import page
from experiments.memory_study.train import VARIANTS, train

XZ = "xz.json"


def main(arguments: list[str] | None = None) -> None:
    """Run the study; None stands for the arguments of the process."""
    parser = argparse.ArgumentParser(
        prog="memory_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[Path("configs/memory_lm.yaml")], help="and overlays"
    )
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=["memory", "attention"])
    parser.add_argument("--minutes", type=float, help="budget of the first variant's training")
    parser.add_argument("--steps", type=int, help="steps of every variant")
    parser.add_argument("--work", type=Path, help="directory of runs and figures; runs/study_<config>")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args, overrides = parser.parse_known_args(arguments)
    work = args.work or Path("runs") / f"study_{args.config[0].stem}"
    work.mkdir(parents=True, exist_ok=True)
    for variant in args.variants:
        done = _figures(work)
        steps = args.steps or (next(iter(done.values()))["steps"] if done else None)
        found, data = train(
            args.config, variant, overrides=overrides, steps=steps, minutes=args.minutes, work=work
        )
        (work / f"{variant}.json").write_text(json.dumps(found), encoding="utf-8")
        if not (work / XZ).exists():
            (work / XZ).write_text(json.dumps(xz_figures(data)), encoding="utf-8")
    report = page(list(_figures(work).values()), json.loads((work / XZ).read_text()), args.config[0].stem)
    print(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(report, encoding="utf-8")


def _figures(work: Path) -> dict[str, dict[str, Any]]:
    """The figures of all variants that were trained, in the variants' order."""
    paths = {variant: work / f"{variant}.json" for variant in VARIANTS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


if __name__ == "__main__":
    main()
