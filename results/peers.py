"""Certified accuracy on CIFAR-10 after equal minutes: other layers of norm 1 in the same training loop.

    python results/peers.py --data DIR --csv runs/peers.csv        # 5 minutes a run, on as many threads as torch takes
    python results/peers.py --data DIR --csv runs/rates.csv --search   # the learning rates, on images held out
    pip install deel-torchlip==1.0.5                     # first, for the row of its layers

The network, loss, augmentation and certificate are those of `mlp_cifar.py --preset certified`, and so is the
batch, but where a name says otherwise. What differs is how a layer keeps to a norm of 1, and the optimizer:

    soft cap, Stiefel   this project: Muon, and a constraint after its steps
    AOL                 Prach and Lampert (2022): W D, with D_jj = (sum_i |W^T W|_ij)^(-1/2), so that
                        D W^T W D <= I; Adam, and SGD with its authors' Nesterov momentum of 0.9, weight decay
                        of 5e-4 and small batches; their rate drops three times
    SpectralLinear      deel-torchlip: division by a power iteration's norm, then Bjorck's iteration; Adam

Norm 1 is RMS->RMS for ours and l2->l2 for the others, whose logits are therefore sqrt(432 / 10) = 6.6 times as
large. So they have the loss temperature divided by that, 4.6, and the same margin, 5.66. AOL's authors have 4 and 5.66. The learning
rate falls to 0 over the minutes. The certificate is computed after them. --search halves and doubles each rate,
until the one that certifies most has a worse one on either side. Two processes need an OMP_NUM_THREADS of 1 and
a --csv each. Muon and the soft cap compute in bfloat16, the others' constraints in float32, as they come.
"""

import argparse
import csv
import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlp_cifar  # noqa: E402
from compare import beside_the_best, spread  # noqa: E402
from constraints import find_constraint, sigma_per_norm  # noqa: E402

try:
    from deel.torchlip.utils import bjorck_norm
except ImportError:  # it is for this script only, and not in requirements.txt
    bjorck_norm = None

PEERS = {  # name: peak learning rate; Muon's is shared by the layers
    "soft cap": 0.2,
    "Stiefel": 0.4,
    "AOL, Adam": 0.00075,
    "AOL, Adam, small batches": 0.000375,
    "AOL, SGD": 0.025,
    "SpectralLinear": 0.0015,
}
SMALL_BATCHES = ("AOL, Adam, small batches", "AOL, SGD")  # an eighth, 256; AOL's authors have 250
CONSTRAINTS = {"soft cap": "soft_cap", "Stiefel": "stiefel"}
FIELDS = ("layers", "lr", "batch", "seed", "minutes", "flags", "steps", "accuracy", "certified_36", "certified_72",
          "certified_108")
RADII = {"accuracy": 0.0, "certified_36": 36 / 255, "certified_72": 72 / 255, "certified_108": 108 / 255}


class Aol(torch.nn.Module):
    """W -> W D of norm at most 1, from any W (fan_out, fan_in).

    For each vector x, |W D x|^2 = sum_ij (D x)_i (W^T W)_ij (D x)_j <= sum_ij |W^T W|_ij (D x)_i^2 = |x|^2, by
    2 |a b| <= a^2 + b^2.
    """

    def forward(self, W):
        sums_N = (W.T @ W).abs().sum(0)
        return W / sums_N.clamp(min=1e-12).sqrt()


def keep_norms(model, name):
    """Make the matrices of a model functions of parameters, so that their norms (l2->l2) are at most 1."""
    for i in range(len(model.weights)):
        if name.startswith("AOL"):
            parametrize.register_parametrization(model.weights, str(i), Aol())
        else:  # what deel-torchlip's SpectralLinear is made of
            parametrizations.spectral_norm(model.weights, str(i))
            bjorck_norm(model.weights, str(i))


def build(config, name, images_NP, classes):
    """(model, optimizers, loss temperature) of a peer."""
    model = mlp_cifar.MLP(config, images_NP.sum(0) / (255 * len(images_NP)), classes)
    _, dtype = mlp_cifar.choose_device(config)
    if name in CONSTRAINTS:
        constraint = find_constraint(CONSTRAINTS[name])
        optimizers = mlp_cifar.build_optimizers(model, config, config.limits(), constraint, dtype)
        return model, optimizers, config.loss_temperature
    ratio = math.prod(sigma_per_norm(W) for W in model.weights)
    for W in model.weights:
        # Singular values of 1 to start with, as their authors have it. What follows does not depend on the size of W,
        # but the gradient of W is larger the smaller W is.
        W.data /= sigma_per_norm(W)
    keep_norms(model, name)
    groups = [dict(params=list(model.weights.parameters()), peak_lr=config.lr),
              dict(params=list(model.biases), peak_lr=0.01)]
    if name.endswith("SGD"):
        groups[1]["peak_lr"] = config.lr  # of the biases, too
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        optimizer = torch.optim.Adam(groups)
    return model, [optimizer], config.loss_temperature * ratio


def train(config, name, minutes, data):
    """A row of the table: one run of so many minutes."""
    (images_NP, labels_N), test_set, _ = data
    classes = 1 + labels_N.max().item()
    model, optimizers, temperature = build(config, name, images_NP, classes)
    _, dtype = mlp_cifar.choose_device(config)
    row = dict(layers=name, lr=config.lr, batch=config.batch, seed=config.seed, minutes=minutes)
    step = 0
    began = time.monotonic()
    while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
        index_B = mlp_cifar.choose_batch(step, len(labels_N), config)
        images_BP = images_NP[index_B]
        if config.augment:
            images_BP = mlp_cifar.augment(images_BP, step, config)
        logits_BK = temperature * model(images_BP.to(dtype) / 255).float()
        margins_BK = config.margin * F.one_hot(labels_N[index_B], classes)
        F.cross_entropy(logits_BK - margins_BK, labels_N[index_B]).backward()
        mlp_cifar.set_learning_rates(optimizers, 1 - share)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
    with torch.no_grad():
        list(model.weights)  # torchlip's matrices of the last step; in eval() they stay as they are
    model.eval()
    try:
        bound = mlp_cifar.certificate(model, steps=30)
    except mlp_cifar.UserError:  # a weight is not finite
        return dict(row, steps=step, accuracy="diverged")
    radius_N = mlp_cifar.certified_radii(model, bound["pairs_log10_KK"], *test_set)
    shares = {key: round(100 * (radius_N > r).double().mean().item(), 1) for key, r in RADII.items()}
    return dict(row, steps=step, **shares)


def table(rows):
    """Lines of a table, one for layers, rate and minutes: means and spreads over the seeds."""
    titles = ["accuracy", "certified at 36/255", "at 72/255", "at 108/255"]
    lines = [f"| layers | learning rate | ms a step | {' | '.join(titles)} |", "|---" * 7 + "|"]
    groups = {}
    for row in rows:
        groups.setdefault((row["layers"], float(row["lr"]), float(row["minutes"])), []).append(row)
    for (name, lr, minutes), seeds in groups.items():
        if any(row["accuracy"] == "diverged" for row in seeds):
            cells = ["", "diverged", "", "", ""]
        else:
            cells = [f"{60_000 * minutes / statistics.mean(int(row['steps']) for row in seeds):.0f}",
                     *(f"{spread([float(row[key]) / 100 for row in seeds])} %" for key in RADII)]
        lines.append(f"| {name} | {lr:g} | {' | '.join(cells)} |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=";".join(PEERS), help="names, with semicolons [all]")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, each run [5]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each [3]")
    parser.add_argument("--search", action="store_true", help="learning rates, on 5000 images held out, one seed")
    parser.add_argument("--csv", help="[results/peers.csv; with --search results/peers_rates.csv]")
    options, flags = parser.parse_known_args(argv)
    names = options.layers.split(";")
    usual = "results/peers_rates.csv" if options.search else "results/peers.csv"
    path = Path(options.csv or usual)
    if not set(names) <= set(PEERS):
        parser.error(f"--layers {options.layers}: must be among {'; '.join(PEERS)}")
    config = mlp_cifar.parse_arguments(["--preset", "certified", *flags])
    if options.search:
        config.holdout = config.holdout or 5000
    certified = vars(mlp_cifar.Config.of("certified"))
    changed = [f"--{key} {value}" for key, value in vars(config).items()
               if value != certified[key] and key != "data"]
    for key in ("lr", "seed", "optimizer", "constraint", "device"):
        if getattr(config, key) != certified[key]:
            parser.error(f"--{key} {getattr(config, key)}: is the same for all layers, or set by --layers")
    if "SpectralLinear" in names and bjorck_norm is None:
        parser.error("--layers SpectralLinear: needs pip install deel-torchlip; or leave it out of --layers")
    data = mlp_cifar.load_data(config)
    torch.set_flush_denormal(True)  # as the tutorial does
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    if data[2] == "stand-in":
        changed.append("--data stand-in")
    flags = " ".join(changed)

    def known(name, seed):
        """{rate: certified share} of the rows that are there."""
        mine = [row for row in rows if (row["layers"], int(row["seed"]), row["flags"]) == (name, seed, flags)
                and float(row["minutes"]) == options.minutes]
        return {float(row["lr"]): float(row.get("certified_36") or 0) for row in mine}

    def add(name, seed, lr):
        if lr in known(name, seed):
            return
        batch = config.batch // 8 if name in SMALL_BATCHES else config.batch
        own = dataclasses.replace(config, seed=seed, lr=lr, batch=batch)
        row = dict(train(own, name, options.minutes, data), flags=flags)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    for seed in range(1 if options.search else options.seeds):
        for name in names:
            add(name, seed, PEERS[name])
            while options.search and (rates := beside_the_best(known(name, seed))):
                for lr in rates:
                    add(name, seed, lr)
    print("\n".join(table([row for row in rows if row["flags"] == flags])))


if __name__ == "__main__":
    try:
        main()
    except (mlp_cifar.UserError, OSError) as problem:
        print(f"peers.py: {problem}", file=sys.stderr)
        sys.exit(2)
