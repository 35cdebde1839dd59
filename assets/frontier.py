"""The picture of the frontier, from the README's own table of it: python assets/frontier.py [--out FILE.png].

(Each point of that table is a run of shakespeare.py, by the flags in its row: 25 minutes of training on two cores in all.)
"""

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def log10(cell):
    return float(cell[3:]) if cell.startswith("10^") else math.log10(float(cell))


def number(cell):
    return float(cell.replace("*", "").split()[0])


def main(out):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    lines = text[text.index("| our architecture |"):].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for side, name in enumerate(("this project's architecture", "the paper's architecture")):
        cells = [row[5 * side:5 * side + 4] for row in rows if row[5 * side + 1]]
        for kind, style, of_kind in (("Muon + soft cap", "o-", lambda flags: "none" not in flags and "adamw" not in flags),
                                     ("Muon, no cap", "^", lambda flags: "none" in flags and "adamw" not in flags),
                                     ("AdamW, no cap", "x", lambda flags: "adamw" in flags)):
            points = [(log10(bound), number(accuracy), number(loss)) for flags, bound, accuracy, loss in cells if of_kind(flags)]
            for panel, column in zip(panels, (1, 2)):
                panel.plot([p[0] for p in points], [p[column] for p in points], style, color=f"C{side}", label=f"{name}, {kind}")
    panels[0].set(title="accuracy (%), whole validation text")
    panels[1].set(title="cross-entropy of the certified logits (nats)")
    for panel in panels:
        panel.set_xlabel("log10 of the true Lipschitz bound (max-token RMS)")
    panels[0].legend(fontsize=7)
    figure.suptitle("tinyshakespeare, 200 steps of 32 x 256 characters, no loss temperature, one seed")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(sys.argv[2] if sys.argv[1:2] == ["--out"] else Path(__file__).with_name("frontier.png"))
