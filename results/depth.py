"""Does a deep transformer without norm layers fail, and does a constraint mend it?

    python results/depth.py                          # the grid below; stopped, it goes on where it was
    python results/depth.py --blocks 48 --lrs 0.1

The same shape three times, on bytes of Python's library: without norm layers and without a constraint, the
same with a constraint, and the baseline with RMSNorm, QK norm, softcap and whole residuals. For each learning
rate and seed: validation loss at the end, the largest entry of the stream, and the bound, both as log10.
`diverged` if a loss or a weight was not finite.
"""

import argparse
import csv
import itertools
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import nanogpt_lipschitz  # noqa: E402
from nanogpt_lipschitz import Config, UserError  # noqa: E402

METHODS = {  # name: preset, what differs from it, the head's learning rate as a part of the blocks'
    "no norms": ("tiny_paper", dict(constraint="none"), 1.0),
    "no norms, soft cap": ("tiny_paper", dict(constraint="soft_cap", w_max="3"), 1.0),
    "norms": ("tiny_baseline", dict(), 0.25),
}
EMBED_LR = 0.1  # better than 0.02 for the baseline and for tiny_paper, on text held out (section 12)
VAL_TOKENS = 50_000
FIELDS = ("method", "blocks", "lr", "seed", "val_loss", "largest_entry_log10", "lipschitz_log10")


def measured(method, blocks, lr, seed, steps, out):
    """A row: one training run, in the folder `out`, where it goes on if it was stopped."""
    row = dict(method=method, blocks=blocks, lr=lr, seed=seed)
    preset, changes, head = METHODS[method]
    config = Config.of(preset, **changes, blocks=blocks, width=64, hidden=256, heads=2, batch=8,
                       micro_batch=8, steps=steps, evals=2, lr=lr, head_lr=min(head * lr, 0.1),
                       embed_lr=EMBED_LR, seed=seed, val_tokens=VAL_TOKENS, out=str(out))
    try:
        summary = nanogpt_lipschitz.main(config)
    except UserError as problem:
        if "diverged" not in str(problem):
            raise
        return dict(row, val_loss="diverged")
    if not math.isfinite(summary["val_loss"]):
        return dict(row, val_loss="diverged")
    entry = math.log10(max(summary["activations"]))
    bound = float(summary["lipschitz_log10"])
    return dict(row, val_loss=round(summary["val_loss"], 3), largest_entry_log10=round(entry, 2),
                lipschitz_log10=round(bound, 2))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lrs", default="0.0125,0.05,0.2,0.8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after so long")
    parser.add_argument("--csv", default="results/depth.csv", help="rows that it has are not run again")
    parser.add_argument("--runs", default="runs/depth", help="folder of the runs")
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # as the tutorial does: a softmax has many such numbers
    rows = []
    began = time.monotonic()
    if Path(options.csv).exists():
        with open(options.csv, newline="") as file:
            rows = list(csv.DictReader(file))
    done = {tuple(str(row[key]) for key in FIELDS[:4]) for row in rows}
    grid = itertools.product(range(options.seeds), options.lrs.split(","), METHODS)
    for seed, lr, method in grid:
        key = method, str(options.blocks), str(float(lr)), str(seed)
        if key in done or time.monotonic() - began > 60 * options.minutes:
            continue
        out = Path(options.runs, "_".join(key).replace(" ", "_").replace(",", ""))
        rows.append(measured(method, options.blocks, float(lr), seed, options.steps, out))
        print(rows[-1], flush=True)
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as problem:
        print(f"depth.py: {problem}", file=sys.stderr)
        sys.exit(2)
