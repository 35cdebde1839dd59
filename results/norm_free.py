"""Transformers without norm layers beside those with them: loss against the valid bound.

    python results/norm_free.py                        # tiny's shape, 300 steps, three seeds
    python results/norm_free.py --steps 2000 --seeds 1
    python results/norm_free.py --search --rows "DyT"  # rates and settings on text held out

One shape, the same data and steps, Muon for all matrices. Each row has rates of its own, which were
searched on the end of the training text (--search prints the neighbours of the chosen ones). Rows:
the baseline with RMSNorm, QK norm and softcap; the same with attention by content in a few blocks;
DyT (Zhu et al. 2025) and Derf (Chen et al. 2025) in the place of RMSNorm; no norms and no
constraint; and soft caps, with attention by content in all blocks, a few, or none. Rows that are in
the CSV are not run again.
"""

import argparse
import contextlib
import csv
import math
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import nanogpt_lipschitz as nano  # noqa: E402

ROWS = {  # name: preset, what differs from it
    "norm layers": ("tiny_baseline", dict()),
    "norm layers, content in 2 of 4 blocks": ("tiny_baseline", dict(content="odd")),
    "DyT": ("tiny_baseline", dict()),
    "Derf": ("tiny_baseline", dict()),
    "no constraint": ("tiny_paper", dict(constraint="none", embed_lr=0.1)),
    "no constraint, content in 2, caps": ("tiny", dict(constraint="none")),
    "soft cap 3, content in all": ("tiny_paper", dict(embed_lr=0.1)),
    "soft cap, content in 2, caps": ("tiny", dict()),
    "soft cap, content in 2, caps, tighter": ("tiny", dict(w_max="3,3,3.5,3.5,2.5,2.5,16")),
    "soft cap 4, by position": ("tiny", dict(content="none", w_max="4")),
}
ALPHA = {"DyT": 0.5, "Derf": 1.0}  # the slope at 0 with which a rival's layer starts
FIELDS = ("row", "steps", "seed", "val_loss", "val_accuracy", "lipschitz_log10",
          "lipschitz_product_log10", "largest_entry")


class Squash(torch.nn.Module):
    """DyT: gain tanh(alpha x) + bias. Derf: gain erf(alpha x + shift) + bias."""

    def __init__(self, width, kind):
        super().__init__()
        self.kind = kind
        self.alpha = torch.nn.Parameter(torch.full((1,), ALPHA[kind]))
        self.shift = torch.nn.Parameter(torch.zeros(1))
        self.gain_D = torch.nn.Parameter(torch.ones(width))
        self.bias_D = torch.nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD):
        z_BTD = self.alpha.to(x_BTD.dtype) * x_BTD
        if self.kind == "DyT":
            y_BTD = torch.tanh(z_BTD)
        else:
            y_BTD = torch.erf(z_BTD + self.shift.to(x_BTD.dtype))
        return self.gain_D.to(x_BTD.dtype) * y_BTD + self.bias_D.to(x_BTD.dtype)


@contextlib.contextmanager
def rival(kind):
    """The baseline with Squash layers in the place of the three kinds of RMSNorm on the stream."""
    class Block(nano.Block):
        def __init__(self, config, index):
            super().__init__(config, index)
            self.squash = torch.nn.ModuleList([Squash(config.width, kind) for _ in range(2)])

        def matrices(self):
            return [(role, W) for role, W in super().matrices() if not role.startswith("squash")]

        def forward(self, x_BTD, mask=None, first_BT=None):
            x_BTD = x_BTD + self.attention(self.squash[0](x_BTD), mask, first_BT)
            return x_BTD + self.mlp(self.squash[1](x_BTD))

    class Transformer(nano.Transformer):
        def __init__(self, config):
            super().__init__(config)
            self.squash = Squash(config.width, kind)

        def body(self, *arguments, **keywords):
            # The last norm of the baseline acts on what comes out of the last block.
            with mock.patch.object(F, "rms_norm", self.norm):
                return super().body(*arguments, **keywords)

        def norm(self, x, shape):
            if x.ndim == 3:  # the stream; queries and keys have four axes, and keep their norm
                return self.squash(x)
            return rms_norm(x, shape)

    def build_optimizers(model, config, exchange, constraint, dtype):
        optimizers = build(model, config, exchange, constraint, dtype)
        others = [p for name, p in model.named_parameters() if "squash" in name]
        optimizers.append(torch.optim.Adam([dict(params=others, peak_lr=config.bias_lr)],
                                           betas=(0.8, 0.95)))
        return optimizers

    rms_norm = F.rms_norm
    build = nano.build_optimizers
    with mock.patch.multiple(nano, Block=Block, Transformer=Transformer,
                             build_optimizers=build_optimizers):
        yield


def train(name, steps, seed, out, **changes):
    """A row of the table: one run, in the folder `out`, where it goes on if it was stopped."""
    preset, own = ROWS[name]
    config = nano.Config.of(preset, **{**own, "steps": steps, "seed": seed, "evals": 2,
                                       "out": str(out), **changes})
    around = rival(name) if name in ALPHA else contextlib.nullcontext()
    row = dict(row=name, steps=steps, seed=seed)
    try:
        with around:
            summary = nano.main(config)
    except nano.UserError as problem:
        if "diverged" not in str(problem):
            raise
        return dict(row, val_loss="diverged")
    return dict(row, val_loss=round(summary["val_loss"], 4),
                val_accuracy=round(summary["val_accuracy"], 4),
                lipschitz_log10=summary["lipschitz_log10"],
                lipschitz_product_log10=summary["lipschitz_product_log10"],
                largest_entry=round(max(summary["activations"]), 1))


def search(name, steps, folder):
    """Losses on text held out, with each rate of a row halved and doubled in turn."""
    preset, own = ROWS[name]
    settings = vars(nano.Config.of(preset, **own))
    tries = [dict()]
    for rate in ("lr", "head_lr", "embed_lr"):
        tries += [{rate: settings[rate] / 2}, {rate: 2 * settings[rate]}]
    for changes in tries:
        label = " ".join(f"{rate} {value:g}" for rate, value in changes.items()) or "as it is"
        out = folder / f"search {name} {label}".replace(" ", "_").replace(",", "")
        row = train(name, steps, 0, out, holdout=True, **changes)
        print(f"{name}: {label}: held out {row['val_loss']}", flush=True)


def print_table(rows):
    """Of each row and number of steps: means and spreads over seeds."""
    print(f"\n{'':42} steps seeds  loss             right    bound")
    groups = {}
    for row in rows:
        if row["val_loss"] != "diverged":
            groups.setdefault((row["row"], int(row["steps"])), []).append(row)
    for (name, steps), group in groups.items():
        losses = torch.tensor([float(row["val_loss"]) for row in group], dtype=torch.float64)
        spread = losses.std().item() if len(group) > 1 else math.nan
        right = sum(float(row["val_accuracy"]) for row in group) / len(group)
        bounds = [float(row["lipschitz_log10"]) for row in group]
        print(f"{name:42} {steps:5d} {len(group):5d}  {losses.mean():.3f} +- {spread:.3f}  "
              f"{right:.2%}   10^{max(bounds):.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with semicolons [all]")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="rates on text held out, no table")
    parser.add_argument("--alpha", type=float, help="of DyT and Derf, in place of ALPHA")
    parser.add_argument("--minutes", type=float, default=600, help="begin no run after so long")
    parser.add_argument("--csv", default="results/norm_free.csv")
    parser.add_argument("--runs", default="runs/norm_free", help="folder of the runs")
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # as the tutorial does: a softmax has many such numbers
    names = options.rows.split(";")
    if options.alpha:
        ALPHA.update(DyT=options.alpha, Derf=options.alpha)
    if options.search:
        for name in names:
            search(name, options.steps, Path(options.runs))
        return
    rows = []
    if Path(options.csv).exists():
        with open(options.csv, newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["row"], int(row["steps"]), int(row["seed"])) for row in rows}
    began = time.monotonic()
    for seed in range(options.seeds):
        for name in names:
            late = time.monotonic() - began > 60 * options.minutes
            if (name, options.steps, seed) in done or late:
                continue
            out = Path(options.runs, f"{name}_{options.steps}_{seed}".replace(" ", "_"))
            rows.append(train(name, options.steps, seed, out))
            with open(options.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    print_table(rows)


if __name__ == "__main__":
    main()
