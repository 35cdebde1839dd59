"""Every optimizer with every constraint at several strengths: accuracy at equal Lipschitz bounds.

    python results/compare.py mlp_cifar                             # 46 runs of the paper's network
    python results/compare.py shakespeare                           # of the paper's transformer, half as wide
    python results/compare.py mlp_cifar --seeds 3 --minutes 120     # adds two seeds to what is there
    python results/compare.py mlp_cifar --search --minutes 90       # the learning rates, on training data held out

Other flags are those of the tutorial. Each run has a folder of its own below --out. The same command goes on
where it was stopped. At the end: a table, compare.csv with a line a run, compare.png. One seed: 30 to 45
minutes on one core. --search halves and doubles the learning rate of each pair at its middle strength, until the
best of them has a worse one on either side: rates.csv. AdamW with spectral normalization and with the decays,
whose best rates change most with the strength, is searched at each.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib
import io
import json
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

# Learning rates and strengths. A strength is w_max, so for the decays the inverse of a weight decay. The first
# constraints are those that one runs this for: so they are there also if time is short.
STUDIES = {
    "mlp_cifar": dict(
        flags="--preset paper --evals 1 --constrain_every 1 --steps 1000",
        bound="lipschitz_product_log10", bound_name="RMS->RMS, product of norms", bounds=(1, 1.5, 2),
        certified=("certified_accuracy", "36/255"), holdout=5000, adamw={}, pairs={
            "soft_cap": dict(muon=(0.4, (2, 3.5, 6)), adamw=(0.002, (2, 3.5, 6))),
            "hard_cap": dict(muon=(0.4, (2, 3.5, 6)), adamw=(0.008, (2, 3.5, 6))),
            "hammer": dict(muon=(0.4, (2, 3.5, 6)), adamw=(0.002, (2, 3.5, 6))),
            "none": dict(muon=(0.05, (1,)), adamw=(0.002, (1,))),
            "weight_decay": dict(muon=(0.8, (2, 3.5, 6)), adamw=((0.000125, 0.001, 0.002, 0.002), (0.05, 0.2, 0.5, 2))),
            "spectral_weight_decay": dict(muon=(0.2, (0.2, 0.5, 1)), adamw=((0.004, 0.016, 0.008), (0.01, 0.03, 0.1))),
            "specnorm": dict(muon=(0.4, (2, 3.5, 6)), adamw=((0.001, 0.001, 0.002, 0.002), (2, 3.5, 6, 12))),
            "stiefel": dict(muon=(0.8, (2, 3.5, 6)), adamw=(0.004, (2, 3.5, 6))),
        }),
    "shakespeare": dict(
        flags="--preset paper --evals 1 --constrain_every 1 --steps 200 --batch 32 --width 128 "
              "--hidden 512 --seq_len 128",
        bound="lipschitz_log10", bound_name="max-token RMS, heads counted", bounds=(3, 6, 9),
        certified=("certified_token_accuracy", "0.001"), holdout=True,
        adamw=dict(momentum=0.9, warmup=20), pairs={
            "soft_cap": dict(muon=(0.2, (1, 2, 4)), adamw=(0.048, (1, 2, 4))),
            "hard_cap": dict(muon=(0.2, (1, 2, 4)), adamw=(0.048, (1, 2, 4))),
            "hammer": dict(muon=(0.1, (1, 2, 4)), adamw=(0.024, (1, 2, 4))),
            "none": dict(muon=(0.2, (1,)), adamw=(0.024, (1,))),
            "weight_decay": dict(muon=(0.4, (1, 2, 4, 8)), adamw=((0.0001875, 0.012, 0.012, 0.048), (0.03, 0.1, 0.3, 1))),
            "spectral_weight_decay": dict(muon=(0.2, (0.1, 0.3, 1)), adamw=((0.006, 0.012, 0.048), (0.01, 0.03, 0.1))),
            "specnorm": dict(muon=(0.2, (1, 2, 4)), adamw=((0.0001875, 0.012, 0.048, 0.024), (2, 4, 8, 16))),
            "stiefel": dict(muon=(0.2, (1, 2, 4)), adamw=(0.048, (1, 2, 4))),
        }),
}


NAMES = dict(muon="Muon", adamw="AdamW")
SET_HERE = ("optimizer", "constraint", "w_max", "lr", "seed")


def change(config, study, out, **point):
    """The config of one point of a study."""
    of_optimizer = study["adamw"] if point["optimizer"] == "adamw" else {}
    return dataclasses.replace(config, out=str(out), **point, **of_optimizer)


def train(tutorial, config, data):
    """main(config) on data that are loaded already, without its printing. Returns the summary."""
    with (mock.patch.object(tutorial, "load_data", lambda config: data),
          contextlib.redirect_stdout(io.StringIO())):
        return tutorial.main(config)


def open_folder(tutorial, base, settings):
    """Make the folder of a comparison, or see that it is one with the same settings."""
    known = base / "compare.json"
    if known.exists():
        before = json.loads(known.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise tutorial.UserError(f"--out {base}: holds a comparison with --{name} {before.get(name)}, "
                                         f"not {value}; give the same settings, or another --out")
    elif base.exists() and any(base.iterdir()):
        raise tutorial.UserError(f"--out {base}: holds no comparison; give another --out")
    base.mkdir(parents=True, exist_ok=True)
    tutorial.write(known, json.dumps(settings, indent=1))


def rate_at(lr, strengths, w_max):
    """A pair has one learning rate, or one for each of its strengths."""
    return lr[strengths.index(w_max)] if isinstance(lr, tuple) else lr


def points_of(study, seeds):
    """Of the comparison: each pair at each strength."""
    return [dict(optimizer=optimizer, constraint=constraint, w_max=w_max, lr=rate_at(lr, strengths, w_max), seed=seed)
            for seed in range(seeds) for constraint, pair in study["pairs"].items()
            for optimizer, (lr, strengths) in pair.items() for w_max in strengths]


def rates_of(study):
    """Of the search: each pair where its learning rate is searched, at the middle strength or at each."""
    points = []
    for constraint, pair in study["pairs"].items():
        for optimizer, (lr, strengths) in pair.items():
            searched = strengths if isinstance(lr, tuple) else [strengths[len(strengths) // 2]]
            points += [dict(optimizer=optimizer, constraint=constraint, w_max=w_max,
                            lr=rate_at(lr, strengths, w_max), seed=0) for w_max in searched]
    return points


def beside_the_best(tried):
    """Half and double the best rate, where they are not tried. tried: {rate: accuracy}."""
    best = max(tried.values())
    rates = [rate for rate in tried if tried[rate] == best]  # two that are equal are both gone beyond
    if best == 0:
        rates = rates[:1]
    return sorted({near for rate in rates for near in (rate / 2, 2 * rate)} - tried.keys())


def rates_beside(rows):
    """Of the search: what is to be tried next, given all rows."""
    searches = {}
    for row in rows:
        searches.setdefault((row["optimizer"], row["constraint"], row["w_max"]), []).append(row)
    points = []
    for search in searches.values():
        settings = {key: search[0][key] for key in SET_HERE}
        rates = beside_the_best({row["lr"]: row.get("accuracy", 0.0) for row in search})
        points += [dict(settings, lr=lr) for lr in rates]
    return points


def train_all(tutorial, study, config, data, points, end, base):
    """Train each point until all are there or the clock is at `end`. Returns a row for each that is there."""
    open_folder(tutorial, base, dict(vars(config), data=data[-1], out="", device=""))
    rows = []
    seconds = 0.0  # that the last run took
    for point in points:
        row = dict(point)
        out = base / "{optimizer}_{constraint}_{w_max:g}_lr{lr:g}_seed{seed}".format(**row)
        summary_file = out / "summary.json"
        wanted = change(config, study, out, **row)
        if summary_file.exists():
            refuse_other_settings(tutorial, out, wanted)
        else:
            began = time.perf_counter()
            if began + seconds >= end:
                continue
            try:
                train(tutorial, wanted, data)
            except tutorial.UserError as problem:
                if "diverged" not in str(problem):
                    raise
                tutorial.write(summary_file, json.dumps(dict(diverged=str(problem))))
            seconds = time.perf_counter() - began
        summary = json.loads(summary_file.read_text())
        result = "diverged"
        if "diverged" not in summary:
            group, radius = study["certified"]
            row.update(accuracy=summary["val_accuracy"], loss=summary["val_loss"],
                       bound_log10=float(summary[study["bound"]]), certified=summary[group][radius])
            result = f"{100 * row['accuracy']:.1f} %"
        rows.append(row)
        left = f"  about {seconds * (len(points) - len(rows)) / 60:.0f} minutes left" if seconds else ""
        print(f"{len(rows):3d}/{len(points)}  {out.name:40}  {result}{left}", flush=True)
    if len(rows) < len(points):
        print(f"{len(points) - len(rows)} of {len(points)} runs are to come: give the same command again. "
              "Until then a constraint that lacks a run is a - in the table.")
    return rows


def write_rows(rows, path):
    """A CSV file with a line a run. What diverged has no figures."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(max(rows, key=len)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def refuse_other_settings(tutorial, out, wanted):
    """A finished run may be of other learning rates than those that the table is to be of."""
    stored = json.loads((out / "config.json").read_text())
    for name, value in vars(wanted).items():
        if name not in tutorial.PLACES and stored.get(name) != value:
            raise tutorial.UserError(f"--out {out.parent}: its run {out.name} has --{name} {stored.get(name)}, "
                                     f"not {value}; give another --out")


def accuracy_within(runs, bound_log10):
    """Accuracy of one pair and seed at no more than this bound, linear in its logarithm between two runs."""
    x, y = zip(*sorted((run["bound_log10"], run["accuracy"]) for run in runs))
    return float(np.interp(bound_log10, x, np.maximum.accumulate(y), left=np.nan))


def spread(values):
    """Mean and standard deviation in percent; "-" if no run is below that bound."""
    values = [100 * v for v in values if not np.isnan(v)]
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}" if values else "-"


def curves_of(study, rows, optimizer, constraint):
    """The runs of a pair, seed by seed, of the seeds that have all strengths."""
    mine = [row for row in rows if (row["optimizer"], row["constraint"]) == (optimizer, constraint)]
    curves = [[row for row in mine if row["seed"] == seed and row.get("accuracy")]
              for seed in sorted({row["seed"] for row in rows})]
    strengths = study["pairs"][constraint][optimizer][1]
    return [curve for curve in curves if len(curve) == len(strengths)]


def means(curves):
    """(accuracy, bound_log10, certified): means over the seeds, for each strength."""
    return [np.mean([[float(row[key]) for row in curve] for curve in curves], 0)
            for key in ("accuracy", "bound_log10", "certified")]


def table(study, rows):
    """Lines of a table: accuracy (%) of each pair at equal bounds."""
    names = [f"10^{bound:g}" for bound in study["bounds"]] + ["best, at 10^"]
    lines = [f"| constraint | optimizer | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for constraint, pair in study["pairs"].items():
        for optimizer in pair:
            curves = curves_of(study, rows, optimizer, constraint)
            cells = [spread([accuracy_within(curve, bound) for curve in curves]) for bound in study["bounds"]]
            best = "-"
            if curves:
                accuracy, bound, _ = means(curves)
                best = f"{100 * accuracy.max():.1f}, {np.ceil(100 * bound[accuracy.argmax()]) / 100:.2f}"  # rounded up
            lines.append(f"| {constraint} | {NAMES[optimizer]} | {' | '.join([*cells, best])} |")
    return lines


def draw(study, rows, path):
    """Accuracy against the bound, and certified accuracy against accuracy: a curve for each pair."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (constraint, pair) in enumerate(study["pairs"].items()):
        for optimizer in pair:
            curves = curves_of(study, rows, optimizer, constraint)
            if not curves:
                continue
            accuracy, bound, certified = means(curves)
            style = "o-" if optimizer == "muon" else "x--"
            name = f"{NAMES[optimizer]}, {constraint.replace('_', ' ')}"
            left.plot(bound, 100 * accuracy, style, color=f"C{color}", label=name)
            right.plot(100 * accuracy, 100 * certified, style, color=f"C{color}")
    left.set(xlabel=f"log10 of the Lipschitz bound ({study['bound_name']})", ylabel="accuracy, %",
             title="A point for each strength. Solid: Muon. Dashed: AdamW")
    right.set(xlabel="accuracy, %", ylabel=f"certified accuracy, %, at radius {study['certified'][1]}",
              title="What a certificate keeps of the accuracy")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tutorial", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=1, help="seeds that each point is trained with [1]")
    parser.add_argument("--minutes", type=float, default=60, help="time after which no run begins [60]")
    parser.add_argument("--search", action="store_true", help="learning rates, on training data held out")
    parser.add_argument("--out", help="folder of the comparison [runs/TUTORIAL_compare, or _search]")
    options, flags = parser.parse_known_args(argv)
    tutorial, study = importlib.import_module(options.tutorial), STUDIES[options.tutorial]
    try:
        plain = tutorial.parse_arguments(study["flags"].split())
        config = tutorial.parse_arguments([*study["flags"].split(), *flags])
        for name in SET_HERE:
            if getattr(config, name) != getattr(plain, name):
                raise tutorial.UserError(f"--{name}: compare.py sets it itself")
        base = Path(options.out or f"runs/{options.tutorial}_{'search' if options.search else 'compare'}")
        points = points_of(study, options.seeds)
        if options.search:
            points = rates_of(study)
            config = dataclasses.replace(config, holdout=study["holdout"])
        data = tutorial.load_data(config)
        end = time.perf_counter() + 60 * options.minutes
        rows = []
        while points:
            trained = train_all(tutorial, study, config, data, points, end, base)
            rows += trained
            all_there = len(trained) == len(points)
            points = rates_beside(rows) if options.search and all_there else []
    except tutorial.UserError as problem:
        parser.error(str(problem))
    if not rows:
        return
    if options.search:
        rows.sort(key=lambda row: (row["optimizer"], row["constraint"], row["w_max"], row["lr"]))
        write_rows(rows, base / "rates.csv")
        best = {}
        for row in rows:
            search = row["optimizer"], row["constraint"], row["w_max"]
            best[search] = max(best.get(search, (0.0, 0.0)), (row.get("accuracy", 0.0), row["lr"]))
        for (optimizer, constraint, w_max), (accuracy, lr) in best.items():
            found = f"best learning rate {lr:g}, {100 * accuracy:.1f} %" if accuracy else "diverged at all rates tried"
            print(f"{optimizer:6} {constraint:22} {w_max:<5g} {found}")
        print(f"Every run: {base}/rates.csv")
        return
    write_rows(rows, base / "compare.csv")
    draw(study, rows, base / "compare.png")
    print(f"\n{tutorial.SCRIPT}, {options.seeds} seed(s)\naccuracy (%) at a bound of at most, "
          f"{study['bound_name']}\n" + "\n".join(table(study, rows)))
    print(f"Every run and the picture: {base}/compare.csv, compare.png")


if __name__ == "__main__":
    main()
