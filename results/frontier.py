"""The frontier on Shakespeare: accuracy and loss against the true Lipschitz bound, for two architectures.

    python results/frontier.py                       # draws results/frontier.png from results/frontier.csv
    python results/frontier.py --out FILE.png

Each line of frontier.csv is a run of shakespeare.py, by the flags in its column flags, at seed 0.
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
KINDS = {("muon", "soft_cap"): ("Muon + soft cap", "o-"), ("muon", "none"): ("Muon, no cap", "^"),
         ("adamw", "none"): ("AdamW, no cap", "x")}
ARCHITECTURES = {"ours": "this project's architecture", "paper": "the paper's architecture"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE / "frontier.png", help="picture [results/frontier.png]")
    out = parser.parse_args(argv).out
    with open(HERE / "frontier.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for color, (architecture, name) in enumerate(ARCHITECTURES.items()):
        for (optimizer, constraint), (kind, style) in KINDS.items():
            mine = [row for row in rows if (row["architecture"], row["optimizer"], row["constraint"])
                    == (architecture, optimizer, constraint)]
            bound = [float(row["bound_log10"]) for row in mine]
            for panel, column in zip(panels, ("accuracy_percent", "loss")):
                values = [float(row[column]) for row in mine]
                panel.plot(bound, values, style, color=f"C{color}", label=f"{name}, {kind}")
    panels[0].set(title="accuracy (%), whole validation text")
    panels[1].set(title="cross-entropy of the certified logits (nats)")
    for panel in panels:
        panel.set_xlabel("log10 of the true Lipschitz bound (max-token RMS)")
    panels[0].legend(fontsize=7)
    figure.suptitle("tinyshakespeare, 200 steps of 32 x 256 characters, no loss temperature, one seed")
    figure.savefig(out, dpi=110)
    print(f"{len(rows)} runs of {HERE / 'frontier.csv'} drawn to {out}")


if __name__ == "__main__":
    main()
