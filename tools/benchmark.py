#!/usr/bin/env python3
"""Measure the parts of a run: train, sample, data, checkpoint, attention; count one without a GPU (rehearse); and what
the planner predicts (plan).

Rates are per CPU-second on one thread unless a part says otherwise, and comparisons are ratios within one run:
machines differ, ratios travel. Each part lives in tools/benchmarks/ and returns its figures as a flat dict.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

PARTS = ("train", "sample", "data", "checkpoint", "attention", "rehearse", "plan")


def main(argv: list[str] | None = None) -> int:
    """Run one part and print its figures as a table (and as JSON with --json)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="part", required=True)
    chosen = next((a for a in (argv if argv is not None else sys.argv[1:]) if a in PARTS), None)
    modules = {}
    for name in PARTS:
        subparser = subparsers.add_parser(name, help=f"benchmark {name}")
        subparser.add_argument("--json", metavar="FILE", help="also write the figures here")
        if name == chosen:
            modules[name] = importlib.import_module(f"benchmarks.{name}")
            modules[name].add_arguments(subparser)
    args = parser.parse_args(argv)
    figures = modules[args.part].run(args)
    width = max(len(key) for key in figures)
    for key, value in figures.items():
        print(f"{key:<{width}}  {value:,.4g}" if isinstance(value, float) else f"{key:<{width}}  {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
