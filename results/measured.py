"""Which tables of results/ are of the code as it is.

    python results/measured.py                       # needs git and the history of this repository

measured.csv has a line for each table and picture: the commits at which it was measured, and the
files that its figures rest on. This script names the functions, classes and constants of those files
that differ between one of those commits and the files as they are. Comments and docstrings do not
count, nor does what draws pictures where it is a table. A name need not matter to the figure: read
what it says before you believe, or rerun, a table.
"""

import argparse
import ast
import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
        sys.exit(f"measured.py: commit {commit} is not here; fetch the whole history, by git fetch "
                 "--unshallow")
    shown = subprocess.run(["git", "show", f"{commit}:{file}"], cwd=root, capture_output=True,
                           text=True)
    return shown.stdout


def changed(commit, file, root=ROOT):
    """Names of what differs in a file since a commit, in the order of the file."""
    old = read_parts(read_old(commit, file, root))
    new = read_parts((root / file).read_text())
    return [name for name in [*new, *(old.keys() - new.keys())] if old.get(name) != new.get(name)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    with open(ROOT / "results" / "measured.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        differs = []
        for name in row["rests_on"].split():
            names = []
            for commit in row["commits"].split():
                names += changed(commit, name)
            if row["table"].endswith(".csv"):
                names = [each for each in names if each != "draw"]
            if names:
                differs.append(f"{name}: {', '.join(dict.fromkeys(names))}")
        print(f"{row['table']:28} {row['commits']}  {'; '.join(differs) or 'of the code as it is'}")


if __name__ == "__main__":
    main()
