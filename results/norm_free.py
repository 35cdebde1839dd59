"""Transformers without norm layers beside those with them: loss against the valid bound.

    python results/norm_free.py                        # the rows that norm_free.csv lacks, 300 steps
    python results/norm_free.py --csv runs/mine.csv --picture runs/mine.png    # all rows, three seeds
    python results/norm_free.py --shape deep --steps 200 --seeds 2
    python results/norm_free.py --shape deep --steps 200 --seeds 2 --rows "norm layers;tiny" --lr 0.8
    python results/norm_free.py --shape english --data FOLDER --steps 2000 --rows "norm layers;tiny"
    python results/norm_free.py --search --rows "DyT, odd, offset"  # rates, on text held out

The same data and steps for all rows, and Muon for all matrices. Baseline, DyT, Derf, tiny and "no
constraint, as tiny" have rates of their own, searched in tiny's shape on the end of the training
text: --search prints the neighbours of the chosen ones. The others have those of the row they are
variants of. Rows: the baseline with RMSNorm, QK norm and softcap; the same with attention
by content in some blocks; both with keys offset; DyT (Zhu et al. 2025) and Derf (Chen et al. 2025)
in the place of RMSNorm on the stream; no norms and no constraint; and soft caps. --lr gives all rows another rate
of Muon in the blocks. Rows that are in the CSV are not run again.
"""

import argparse
import contextlib
import csv
import math
import re
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

import nanogpt_lipschitz as nano  # noqa: E402

ODD_OFFSET = dict(content="odd", key_offset=True)
ROWS = {  # name: preset, what differs from it
    "norm layers": ("tiny_baseline", dict()),
    "norm layers, content in odd blocks": ("tiny_baseline", dict(content="odd", bias_lr=0.04)),
    "norm layers, offset": ("tiny_baseline", dict(key_offset=True)),
    "norm layers, odd, offset": ("tiny_baseline", dict(ODD_OFFSET, bias_lr=0.04)),
    "norm layers, last, offset": ("tiny_baseline", dict(content="last", key_offset=True,
                                                        bias_lr=0.04)),
    "DyT, odd, offset": ("tiny_baseline", dict(ODD_OFFSET, head_lr=0.4)),
    "Derf, odd, offset": ("tiny_baseline", dict(ODD_OFFSET, head_lr=0.4)),
    "no constraint, content in all": ("tiny_paper", dict(constraint="none")),
    "no constraint, as tiny": ("tiny", dict(constraint="none", lr=0.05, embed_lr=0.025,
                                            bias_lr=0.04)),
    "tiny_paper": ("tiny_paper", dict()),
    "tiny": ("tiny", dict()),
    "tiny without offset": ("tiny", dict(key_offset=False)),
    "tiny, larger limits": ("tiny", dict(w_max="6,6,4,4,4,4,16")),
    "tiny, smaller limits": ("tiny", dict(residual_scale=1.0, head_lr=0.05,
                                          w_max="3,3,3,3,2.4,2.4,16")),
    "tiny by position": ("tiny", dict(content="none")),
    "tiny for depth": ("tiny", dict(content="odd", w_max="8,8,6,6,6,6,16")),
    "tiny_tight": ("tiny_tight", dict()),
}
SHAPES = {
    "tiny": dict(),
    "deep": dict(blocks=24, width=64, hidden=256, heads=2, batch=8, micro_batch=8,
                 val_tokens=50_000),
    "english": dict(width=256, hidden=1024, heads=8, val_tokens=200_000),
}
ALPHA = {"DyT": 0.5, "Derf": 1.0}  # with which a rival's layers start
RATES = ("lr", "head_lr", "embed_lr", "bias_lr")  # that --search searches
HEADS = (0.1, 0.4)  # head_lr from which it begins as well: Derf's search stopped short of 0.4
FIELDS = ("shape", "row", "steps", "seed", "val_loss", "val_accuracy", "lipschitz_log10",
          "lipschitz_product_log10", "largest_entry", "largest_logit")


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


@torch.no_grad()
def largest_logit(config, model, sequences=16):
    """The largest attention logit by content, either sign, of the first validation sequences."""
    _, validation, _ = nano.load_data(config)
    found = [0.0]
    by_content = nano.Block.by_content
    attend = nano.attend

    def record(q_BHTE, k_BHTE, v_BHTE, mask, scale):
        logits_BHTT = scale * q_BHTE @ k_BHTE.mT
        found.append(logits_BHTT.masked_fill(~mask[:, None], 0).abs().max().item())
        return attend(q_BHTE, k_BHTE, v_BHTE, mask, scale)

    def recorded(*arguments):
        with mock.patch.object(nano, "attend", record):
            return by_content(*arguments)

    with mock.patch.object(nano.Block, "by_content", recorded):
        for i in range(sequences):
            T = min(config.seq_len, len(validation))
            start = i * T % (len(validation) - T + 1)
            model.body(*model.embed(validation.read(start, T)[None], torch.float32))
    return max(found)


def train(name, shape, steps, seed, out, **changes):
    """A row of the table: one run, in the folder `out`, where it goes on if it was stopped."""
    preset, own = ROWS[name]
    config = nano.Config.of(preset, **{**own, **SHAPES[shape], "steps": steps, "seed": seed,
                                       "evals": 2, "out": str(out), **changes})
    kind = name.split(",")[0]
    around = rival(kind) if kind in ALPHA else contextlib.nullcontext()
    row = dict(shape=shape, row=name, steps=steps, seed=seed)
    try:
        with around:
            summary = nano.main(config)
            _, model, _ = nano.load_checkpoint(out)
            logit = largest_logit(config, model)
    except nano.UserError as problem:
        if "diverged" not in str(problem):
            raise
        return dict(row, val_loss="diverged")
    return dict(row, val_loss=round(summary["val_loss"], 4),
                val_accuracy=round(summary["val_accuracy"], 4),
                lipschitz_log10=summary["lipschitz_log10"],
                lipschitz_product_log10=summary["lipschitz_product_log10"],
                largest_entry=round(max(summary["activations"]), 1),
                largest_logit=round(logit, 1))


def search(name, shape, steps, folder, **changes):
    """Halve and double each rate of a row, until the best setting has eight worse beside it.

    It begins with the row's own rates, or with another head_lr of HEADS if that is better. Losses
    are of training text held out. Prints each run. Returns {rates: loss}.
    """
    preset, own = ROWS[name]
    settings = vars(nano.Config.of(preset, **own))
    lr, head_lr, embed_lr, bias_lr = (settings[rate] for rate in RATES)
    losses = {}
    new = [(lr, start, embed_lr, bias_lr) for start in dict.fromkeys((head_lr, *HEADS))]
    while new:
        for values in new:
            rates = dict(zip(RATES, values))
            label = " ".join(f"--{rate} {value:g}" for rate, value in rates.items())
            where = Path(changes.get("data", "")).name  # two searches may differ in these alone
            stem = f"search {shape} {name} {steps} {label} {ALPHA} {where}"
            stem = re.sub(r"[^\w.]+", "_", stem)
            row = train(name, shape, steps, 0, folder / stem, holdout=True, **changes, **rates)
            print(f"{name}: {label}: held out {row['val_loss']}", flush=True)
            losses[values] = math.inf if row["val_loss"] == "diverged" else row["val_loss"]
        best = min(losses, key=losses.get)
        new = [values for values in beside(best) if values not in losses]
    return losses


def beside(values):
    """Settings that differ from this one in one rate, by a factor of two."""
    return [(*values[:i], factor * values[i], *values[i + 1:])
            for i in range(len(values)) for factor in (0.5, 2)]


def group(rows):
    """{(shape, row, steps): its rows, one for each seed}"""
    groups = {}
    for row in rows:
        groups.setdefault((row["shape"], row["row"], int(row["steps"])), []).append(row)
    return groups


def table(rows, shape, steps):
    """Lines of a table: mean and spread over seeds, both losses of two, the largest bound, entry and logit."""
    lines = ["| network | seeds | loss | accuracy | valid bound | largest entry | largest logit |",
             "|---|---|---|---|---|---|---|"]
    for (own_shape, name, own_steps), seeds in group(rows).items():
        if (own_shape, own_steps) != (shape, steps):
            continue
        failed = sum(row["val_loss"] == "diverged" for row in seeds)
        if failed:
            lines.append(f"| {name} | {len(seeds)} | {failed} diverged | | | | |")
            continue
        losses = torch.tensor([float(row["val_loss"]) for row in seeds], dtype=torch.float64)
        loss = f"{losses.mean():.3f}"
        if len(seeds) == 2:
            loss = f"{losses.min():.3f} to {losses.max():.3f}"
        elif len(seeds) > 2:
            loss += f" ± {losses.std():.3f}"
        right = sum(float(row["val_accuracy"]) for row in seeds) / len(seeds)
        largest = {key: max(float(row[key]) for row in seeds)
                   for key in ("lipschitz_log10", "largest_entry", "largest_logit")}
        bound = "not computed"
        if math.isfinite(largest["lipschitz_log10"]):
            bound = f"10^{math.ceil(100 * largest['lipschitz_log10']) / 100:.2f}"
        lines.append(f"| {name} | {len(seeds)} | {loss} | {right:.1%} | {bound} | "
                     f"{largest['largest_entry']:.0f} | {largest['largest_logit']:.1f} |")
    return lines


def draw(rows, shape, steps, path):
    """Loss against the valid bound, a point for each seed. What has no bound is a line.

    Lines that are nearer than 0.01 to the next one share a label, above the highest of them.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    panel = figure.subplots()
    without_bound = []
    for (own_shape, name, own_steps), seeds in group(rows).items():
        if (own_shape, own_steps) != (shape, steps):
            continue
        seeds = [row for row in seeds if row["val_loss"] != "diverged"]
        if not seeds:
            continue
        losses = [float(row["val_loss"]) for row in seeds]
        bounds = [float(row["lipschitz_log10"]) for row in seeds]
        mean = sum(losses) / len(losses)
        if math.isinf(bounds[0]):
            without_bound.append((mean, name))
        else:
            points = panel.plot(bounds, losses, "o", alpha=0.7)
            label = f"{name}, the default" if name == "tiny" else name
            panel.annotate(label, (max(bounds), min(losses)), xytext=(5, -10),
                           textcoords="offset points", color=points[0].get_color(),
                           fontsize="small")
    names = []
    without_bound.sort()
    for i, (mean, name) in enumerate(without_bound):
        panel.axhline(mean, color="grey", linewidth=0.8)
        names.append(f"{name} {mean:.3f}")
        if i + 1 == len(without_bound) or without_bound[i + 1][0] > mean + 0.01:
            panel.annotate("; ".join(names), (0.005, mean), xycoords=("axes fraction", "data"),
                           xytext=(0, 2), textcoords="offset points", color="dimgrey",
                           fontsize="small")
            names = []
    panel.set(xlabel="valid Lipschitz bound of the trained network, embeddings to logits",
              ylabel="validation loss, nats a byte")
    panel.set_title(f"{shape}, {steps} steps. Points: no norm layers, within a bound, one a seed. "
                    "Grey lines: no bound computed, mean of seeds.\n"
                    "odd, last: which blocks attend by content, the others by position. offset: heads "
                    "that can copy alone.", fontsize="medium")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.xaxis.set_major_formatter(lambda exponent, _: f"$10^{{{exponent:.0f}}}$")
    panel.margins(x=0.13)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with semicolons [all]")
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--data", help="for english: a folder of token shards, of bytes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, help="of Muon in the blocks, for all rows [their own]")
    parser.add_argument("--search", action="store_true", help="rates, on text held out, no table")
    parser.add_argument("--alpha", type=float, help="for --search: of DyT and Derf")
    parser.add_argument("--minutes", type=float, default=600, help="begin no run after so long")
    parser.add_argument("--csv", default="results/norm_free.csv")
    parser.add_argument("--picture", default="results/norm_free_{shape}_{steps}.png")
    parser.add_argument("--runs", default="runs/norm_free", help="folder of the runs")
    options = parser.parse_args(argv)
    torch.set_flush_denormal(True)  # as the tutorial does: a softmax has many such numbers
    names = options.rows.split(";")
    if not set(names) <= set(ROWS):
        parser.error(f"--rows {options.rows}: must be among {'; '.join(ROWS)}")
    if bool(options.data) != (options.shape == "english"):
        parser.error("--data: is for --shape english, which needs it, of prepare.py --bytes")
    if options.alpha and not options.search:
        parser.error(f"--alpha {options.alpha}: is for --search")
    changes = {}
    if options.data:
        changes["data"] = options.data
    if options.alpha:
        ALPHA.update(DyT=options.alpha, Derf=options.alpha)
    if options.lr and options.search:
        parser.error(f"--lr {options.lr}: is not for --search, which tries rates of its own")
    label = "{}"
    if options.lr:
        changes["lr"] = options.lr
        label = f"{{}}, Muon {options.lr:g}"
    if options.search:
        for name in names:
            search(name, options.shape, options.steps, Path(options.runs), **changes)
        return
    rows = []
    if Path(options.csv).exists():
        with open(options.csv, newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["shape"], row["row"], int(row["steps"]), int(row["seed"])) for row in rows}
    began = time.monotonic()
    for seed in range(options.seeds):
        for name in names:
            late = time.monotonic() - began > 60 * options.minutes
            title = label.format(name)
            if (options.shape, title, options.steps, seed) in done or late:
                continue
            stem = f"{options.shape}_{title}_{options.steps}_{seed}".replace(" ", "_")
            row = train(name, options.shape, options.steps, seed, Path(options.runs, stem),
                        **changes)
            rows.append(dict(row, row=title))
            with open(options.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    print("\n".join(table(rows, options.shape, options.steps)))
    picture = options.picture.format(shape=options.shape, steps=options.steps)
    draw(rows, options.shape, options.steps, picture)


if __name__ == "__main__":
    main()
