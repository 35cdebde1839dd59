"""The frontier on Shakespeare: accuracy against five bounds of the same weights.

    python results/frontier.py runs/NAME ...         # finished runs of shakespeare.py, added to frontier.csv
    python results/frontier.py                       # draws frontier.png from frontier.csv
    python results/frontier.py runs/NAME --csv FILE.csv --out FILE.png

For each run: what the formula of the paper's code claims (protocol.py: too small for several heads), the
product of norms, the ellipsoid before and after its multipliers are tuned, and what an attack finds, in
this order from a claim to a fact. A certificate is the smaller of ellipsoid and product.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import shakespeare  # noqa: E402
import verify_lipschitz  # noqa: E402
from protocol import paper_formula, validation_text  # noqa: E402

BOUNDS = {"formula": "formula of the paper's code", "product": "product of norms",
          "untuned": "ellipsoid, untuned", "certified": "certificate, tuned", "found": "found by attack"}
LEFT_OUT = {"preset", "out", "data", "evals", "seed", "device"}  # of the flags in the table


def architecture(config):
    if config.content == "none":
        return "attention by position"
    if config.content != "all":
        return f"by content in block {config.content}, else by position"
    if config.positions == "bias":
        return "by position and content"
    return "the paper's" if config.activation == "gelu" else "attention by content"


def found(model, tokens_N, steps=60):
    """log10 of the largest quotient that verify_lipschitz.py's search finds, embeddings to logits."""
    model = shakespeare.exact_copy(model)
    D = model.config.width
    T = min(32, model.config.seq_len)
    R = shakespeare.largest_embedding(model)
    real_STD = F.embedding(tokens_N[:8 * T].view(8, T), model.embedding_VD)
    starts_STD = torch.cat([real_STD, R * verify_lipschitz.directions(8, T, D, seed=0)])
    head_VD = model.config.final_scale * model.head_VD

    def logits_of(x_STD):
        return F.linear(model.blocks(x_STD), head_VD)

    return math.log10(verify_lipschitz.climb(logits_of, starts_STD, R, steps).max().item())


def flag_of(name, value):
    """A setting as it is written on a command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def row_of(folder, data=None):
    """A line of frontier.csv from the folder of a finished run."""
    config, model, _ = shakespeare.load_checkpoint(folder)
    config.data = data or config.data
    summary = json.loads(Path(folder, "summary.json").read_text())
    preset = shakespeare.Config.of(config.preset)
    flags = [flag_of(name, value) for name, value in vars(config).items()
             if name not in LEFT_OUT and value != getattr(preset, name)]
    share = summary["certified_token_accuracy"]
    untuned = json.loads(Path(folder, "log.jsonl").read_text().splitlines()[-1])["lipschitz_log10"]
    return dict(
        architecture=architecture(config), flags=" ".join([f"--preset {config.preset}", *flags]),
        seed=config.seed, accuracy_percent=round(100 * summary["val_accuracy"], 1),
        loss=round(summary["val_loss"], 3), formula_log10=paper_formula(model),
        product_log10=summary["lipschitz_product_log10"], untuned_log10=untuned,
        certified_log10=summary["lipschitz_log10"],
        found_log10=found(model, validation_text(config, model)),
        **{f"certified_{rho}_percent": round(100 * share[rho], 1) for rho in ("0.001", "0.01", "0.03")})


def draw(rows, out):
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(row["architecture"] for row in rows))
    for kind in kinds:
        mine = [row for row in rows if row["architecture"] == kind]
        left.plot([float(row["certified_log10"]) for row in mine],
                  [float(row["accuracy_percent"]) for row in mine], "o", label=kind)
    mine = sorted((row for row in rows if row["architecture"] == "the paper's"),
                  key=lambda row: float(row["certified_log10"]))
    for name, label in BOUNDS.items():
        right.plot([float(row[f"{name}_log10"]) for row in mine],
                   [float(row["accuracy_percent"]) for row in mine], "o-", label=label)
    left.set(title="certified bound, by architecture")
    right.set(title="the paper's architecture: five bounds of the same weights")
    for panel in (left, right):
        panel.set(xlabel="log10 of the bound, embeddings to logits", ylabel="accuracy, %")
        panel.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a finished run of shakespeare.py")
    parser.add_argument("--data", help="where the text is, if not where the runs had it")
    parser.add_argument("--csv", default=HERE / "frontier.csv", help="table [results/frontier.csv]")
    parser.add_argument("--out", default=HERE / "frontier.png", help="picture [results/frontier.png]")
    options = parser.parse_args(argv)
    rows = []
    if Path(options.csv).exists():
        with open(options.csv, newline="") as file:
            rows = list(csv.DictReader(file))
    for folder in options.runs:
        row = row_of(folder, options.data)
        print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
        rows = [old for old in rows if (old["flags"], str(old["seed"])) != (row["flags"], str(row["seed"]))]
        rows.append(row)
    if options.runs:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    draw(rows, options.out)
    print(f"{len(rows)} runs drawn to {options.out}")


if __name__ == "__main__":
    try:
        main()
    except (shakespeare.UserError, OSError) as problem:
        print(f"frontier.py: {problem}", file=sys.stderr)
        sys.exit(2)
