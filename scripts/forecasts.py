"""How long `fips_nb.compress` says that it will take, against how long it takes, in twenty runs of four models.

    FIPS_NB_DATA=... python scripts/forecasts.py             # all of them, half an hour on two cores
    FIPS_NB_DATA=... python scripts/forecasts.py --under 20  # those that are over in less than 20 seconds

Each run has a process of its own, so that whatever is slower the first time counts. What was promised is what the
line before the start says, and what was taken counts from that line on: reading data comes before it. A plan has a
line of its own; there the promises add up, and the time counts from the first. The rows go to
`results/09_forecasts.json`; notebook run/forecast shows them.
"""
import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

from fips_nb import compress
from fips_nb.measure.records import record

DATA = Path(os.environ.get("FIPS_NB_DATA", "."))
WHERE = {
    "stories260k": ("stories260k", dict(data="text/tinystories_calib.txt")),
    "vit_tiny_patch16_224": (None, dict(dense="vit_tiny/vit_tiny_patch16_224.safetensors", data="imagenet_calib")),
} # of a model that is not in the package: its folder, and arguments with paths

VIT, LLM, STORIES, TINY = "demo-vit", "demo-llm", "stories260k", "vit_tiny_patch16_224"
RUNS = [ # about how many seconds, model, options
    (1, STORIES, dict(method="aafm", n=64, window=128)),
    (3, VIT, dict(method="svd-llm")),
    (3, VIT, dict(method="fips-als:levels=15", n=200, epochs=0)),
    (4, STORIES, dict(method="fips-als:levels=15", n=64, window=128, epochs=1)),
    (4, STORIES, dict(bits=6., n=64, window=128, epochs=0)),
    (5, STORIES, dict(bits=3., n=16, window=128, epochs=1)),
    (9, VIT, dict(bits=4., n=200, epochs=1)),
    (10, VIT, dict(bits=2.5, n=200, epochs=0)),
    (12, LLM, dict(bits=4., n=8, epochs=0)),
    (15, LLM, dict(method="fips-als:levels=4", n=16, epochs=0)),
    (25, TINY, dict(bits=4., n=8, epochs=0)),
    (30, VIT, dict(bits=3., params=.61, method="fips-als:levels=10,group_size=12", n=200, epochs=1)),
    (30, VIT, dict(params=.51, method="fips-als:group_size=12")),
    (40, STORIES, dict(bits=4.)),
    (50, VIT, dict(bits=4.)),
    (60, TINY, dict(method="fips-als:levels=10", n=200, epochs=0)),
    (90, VIT, dict(bits=1.5)),
    (120, LLM, dict(params=.8)),
    (240, TINY, dict(bits=3., n=200, epochs=1)),
    (300, LLM, dict(bits=4.)),
]


def one(name, options):
    "Run `compress` here: seconds promised and taken, and those before the promise."
    folder, more = WHERE.get(name, (None, {}))
    more = {k: str(DATA/v) for k, v in more.items()}
    start, promises = time.perf_counter(), []

    def tell(line, seconds=None):
        if seconds is not None: promises.append((seconds, time.perf_counter()))

    warnings.simplefilter("ignore")
    compress(str(DATA/folder) if folder else name, tell=tell, **more, **options)
    expected,at = sum(s for s,_ in promises), promises[0][1]
    taken = time.perf_counter() - at
    return dict(expected=float(f"{expected:.3g}"), taken=float(f"{taken:.3g}"), ratio=float(f"{taken/expected:.3g}"),
                before=float(f"{at - start:.3g}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--under", type=float, default=float("inf"), metavar="SECONDS",
                        help="only runs that take about so long")
    parser.add_argument("--one", help=argparse.SUPPRESS) # a run, as JSON, in this process
    args = parser.parse_args()
    if args.one: return print(json.dumps(one(*json.loads(args.one))))
    for about, name, options in RUNS:
        if about >= args.under: continue

        def make():
            run = [sys.executable, __file__, "--one", json.dumps([name, options])]
            return json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

        row = record("09_forecasts", dict(model=name, **options), make, "scripts/forecasts:one")
        print(f"{row['expected']:8.1f} s expected, {row['taken']:8.1f} s taken, {row['ratio']:.2f}: {row['key']}", flush=True)


if __name__ == "__main__": main()
