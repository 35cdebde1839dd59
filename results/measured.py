"""Which tables of results/ are of the code as it is.

    python results/measured.py                       # needs git and the history of this repository
    python results/measured.py --replay              # an hour of one core
    python results/measured.py --replay frontier.csv peers.csv

measured.csv has a line for each table and picture: the commits at which it was measured, and the
files that its figures rest on. This script names the functions, classes and constants of those files
that differ between one of those commits and the files as they are. Comments and docstrings do not
count, nor what draws pictures where it is a table, nor what prints tables where it is a picture. A
name need not matter to the figure: read what it says before you believe, or rerun, a table.

--replay finds out whether it matters. It takes the first steps of a table's runs twice on this
machine, with the code of the commit and with the code as it is, on the data that the scripts make
themselves, and compares the weights bit by bit, the validation loss, and the Lipschitz bound. Where
all are equal, a full run is expected to be so, too. That is no proof: later steps may call what the
first ones do not. What attacks, times or pictures a table has is not replayed.
"""

import argparse
import ast
import csv
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ("none", "soft_cap", "hard_cap", "hammer", "specnorm", "stiefel", "weight_decay",
               "spectral_weight_decay")
PAIRS = [f"--optimizer {optimizer} --constraint {constraint} --w_max 2 --constrain_every 1"
         for optimizer, constraint in [*itertools.product(["muon"], CONSTRAINTS), ("adamw", "none"),
                                       ("adamw", "weight_decay")]]
MLP = "mlp_cifar.py --evals 2 --steps 40"
TEXT = "shakespeare.py --evals 2 --steps 24 --batch 4"
GPT = "nanogpt_lipschitz.py --evals 2 --steps 24 --batch 4 --micro_batch 4 --val_tokens 20000"
SHORT = "--preset plain100 --heads 4 --hidden 512"
OF_MLPS = [f"{MLP} --preset {preset}"
           for preset in ("default", "accurate", "paper", "paper_adamw", "tight", "certified")]
OF_TEXTS = [f"{TEXT} --preset {preset}" for preset in ("laptop", "plain100", "certified", "paper")]
COMPARED_TEXTS = [f"{TEXT} --preset paper --width 128 --hidden 512 --seq_len 128 {pair}" for pair in PAIRS]
REPLAYS = {  # first steps of a table's runs
    "presets_mlp_cifar.csv": OF_MLPS,
    "attacks_mlp_cifar.csv": OF_MLPS,
    "peers.csv": [f"{MLP} --preset certified", f"{MLP} --preset certified --constraint stiefel"],
    "presets_shakespeare.csv": OF_TEXTS,
    "frontier.csv": [f"{TEXT} --preset plain100", f"{TEXT} {SHORT}", f"{TEXT} --preset paper",
                     f"{TEXT} {SHORT} --content last --cap 1 --key_offset --logit_scale 2"],
    "comparison_mlp_cifar.csv": [f"{MLP} --preset paper {pair}" for pair in PAIRS],
    "comparison_shakespeare.csv": COMPARED_TEXTS,
    "learning_rates.csv": [f"{MLP} --preset paper {pair}" for pair in PAIRS] + COMPARED_TEXTS,
    "method.png": [f"{MLP} --preset paper {pair}" for pair in PAIRS],
    "attention.png": [COMPARED_TEXTS[i] for i in (0, 1, 8)],
    "norm_free.csv": [f"{GPT} --preset tiny", f"{GPT} --preset tiny_baseline", f"{GPT} --preset tiny_paper",
                      f"{GPT} --preset tiny --constraint none",
                      f"{GPT} --preset tiny_baseline --content odd --key_offset"],
    "attacks_transformers.csv": [f"{GPT} --preset tiny", f"{TEXT} --preset laptop"],
}


def read_parts(source):
    """{name: code without comments and docstrings} of the definitions and assignments of a file."""
    parts = {}
    for node in ast.parse(source).body:
        for inner in ast.walk(node):
            documented = isinstance(inner, (ast.FunctionDef, ast.ClassDef))
            if documented and ast.get_docstring(inner) is not None:
                del inner.body[0]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            parts[node.name] = ast.dump(node)
        elif not isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)):
            parts[ast.unparse(node).split("\n")[0].split(" = ")[0]] = ast.dump(node)
    return parts


def read_old(commit, file, root):
    """The text of a file at a commit; nothing, if it was not there."""
    known = subprocess.run(["git", "cat-file", "-e", commit], cwd=root, capture_output=True)
    if known.returncode:
        print(f"measured.py: commit {commit} is not here; get the whole history: by git fetch "
              "--unshallow in a shallow clone, else by git clone", file=sys.stderr)
        sys.exit(2)
    shown = subprocess.run(["git", "show", f"{commit}:{file}"], cwd=root, capture_output=True,
                           text=True)
    return shown.stdout


def changed(commit, file, root=ROOT):
    """Names of what differs in a file since a commit, in the order of the file."""
    old = read_parts(read_old(commit, file, root))
    new = read_parts((root / file).read_text())
    return [name for name in [*new, *(old.keys() - new.keys())] if old.get(name) != new.get(name)]


def unpack(commit, root, folder):
    """The files of a commit, in a folder, which is made for them unless it is there."""
    if not folder.exists():
        read_old(commit, ".", root)
        packed = subprocess.run(["git", "archive", commit], cwd=root, check=True, capture_output=True)
        tarfile.open(fileobj=io.BytesIO(packed.stdout)).extractall(folder, filter="data")
    return folder


def train(code, command, out):
    """(weights, summary) of a short run of the code in a folder; a sentence where it does not run."""
    words = [sys.executable, *command.split(), "--data", "stand-in", "--out", str(out)]
    ended = subprocess.run(words, cwd=code, env={**os.environ, "OMP_NUM_THREADS": "1"},
                           capture_output=True, text=True)
    if ended.returncode:
        return f"does not run: {(ended.stderr.strip().splitlines() or ['no message'])[-1]}"
    weights = torch.load(out / "checkpoint.pt", weights_only=True)["model"]
    return weights, json.loads((out / "summary.json").read_text())


def difference(old, new):
    """What differs between two results of train, in words."""
    for result, which in ((old, "that commit"), (new, "the code as it is")):
        if isinstance(result, str):
            return f"{which} {result}"
    (old_weights, old_summary), (new_weights, new_summary) = old, new
    words = []
    if old_weights.keys() != new_weights.keys():
        words.append(f"weights {sorted(old_weights.keys() ^ new_weights.keys())}")
    else:
        off = [name for name, W in old_weights.items() if not torch.equal(W, new_weights[name])]
        if off:
            words.append(f"weights {', '.join(off)}")
    for name in ("val_loss", "lipschitz_log10"):
        if old_summary.get(name) != new_summary.get(name):
            words.append(f"{name} {old_summary.get(name)} then, {new_summary.get(name)} now")
    return "; ".join(words) or "weights, loss and bound have the same bits"


def replay(rows, tables, root=ROOT, replays=REPLAYS):
    """Prints for each table, commit and command what differs in the first steps."""
    done = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def result(commit, command):
            if (commit, command) not in done:
                code = unpack(commit, root, folder / commit) if commit else root
                done[commit, command] = train(code, command, folder / f"run{len(done)}")
            return done[commit, command]

        for row in rows:
            if row["table"] not in tables:
                continue
            for commit in row["commits"].split():
                print(f"{row['table']} {commit}")
                for command in replays[row["table"]]:
                    print(f"    {difference(result(commit, command), result(None, command))}: {command}",
                          flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay", nargs="*", metavar="TABLE", help="the first steps of these tables [of all]")
    options = parser.parse_args(argv)
    with open(ROOT / "results" / "measured.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if options.replay is not None:
        unknown = [table for table in options.replay if table not in REPLAYS]
        if unknown:
            parser.error(f"--replay {' '.join(unknown)}: it has {', '.join(REPLAYS)}")
        return replay(rows, options.replay or list(REPLAYS))
    print("table, commits at which it was measured: names that differ since. A name need not change "
          "a figure.\n")
    current = 0
    for row in rows:
        differs = []
        for name in row["rests_on"].split():
            names = []
            for commit in row["commits"].split():
                names += changed(commit, name)
            other = "draw" if row["table"].endswith(".csv") else "table"
            names = [each for each in names if each != other]
            if names:
                differs.append(f"{name}: {', '.join(dict.fromkeys(names))}")
        current += not differs
        print(f"{row['table']}, {row['commits']}: {'; '.join(differs) or 'of the code as it is'}")
    print(f"\n{current} of {len(rows)} have no name that differs. Of the others --replay compares first "
          "steps, bit by bit.")


if __name__ == "__main__":
    main()
