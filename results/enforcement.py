"""The largest sigma / limit after any step of a whole run, by SVD in float64.

    python results/enforcement.py                    # soft_cap, hard_cap, specnorm, stiefel: half an hour
    python results/enforcement.py --constraint soft_cap --data DIR

Other flags are those of mlp_cifar.py, which trains as always. A hook of torch looks at the weights after every
step of Muon. A value above 1 is a weight matrix beyond its limit.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlp_cifar  # noqa: E402
from compare import train  # noqa: E402
from constraints import singular_values  # noqa: E402
from muon import Muon  # noqa: E402

CONSTRAINTS = ("soft_cap", "hard_cap", "specnorm", "stiefel")


def largest_share(optimizer):
    """The largest sigma / limit of all matrices of an optimizer."""
    shares = []
    for group in optimizer.param_groups:
        for W in group["params"]:
            shares.append(singular_values(W)[0].item() / group["w_max"])
    return max(shares)


def shares_over_training(config, data):
    """(largest_share after each step, summary) of a run."""
    shares = []

    def look(optimizer, args, kwargs):
        if isinstance(optimizer, Muon):
            shares.append(largest_share(optimizer))

    hook = register_optimizer_step_post_hook(look)
    try:
        summary = train(mlp_cifar, config, data)
    finally:
        hook.remove()
    return shares, summary


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraint", help=f"this one alone [{', '.join(CONSTRAINTS)}]")
    options, flags = parser.parse_known_args(argv)
    base = mlp_cifar.parse_arguments(flags)
    data = mlp_cifar.load_data(base)
    constraints = [options.constraint] if options.constraint else CONSTRAINTS
    for constraint in constraints:
        with tempfile.TemporaryDirectory() as out:
            config = dataclasses.replace(base, constraint=constraint, evals=1, out=out)
            shares, summary = shares_over_training(config, data)
        near = sum(share > 0.95 for share in shares)
        print(f"{constraint}: largest sigma / limit {max(shares):.7f} over {len(shares)} steps "
              f"({near} of them above 0.95), {base.preset}, seed {base.seed}, data: {summary['data']}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (mlp_cifar.UserError, OSError) as problem:
        print(f"enforcement.py: {problem}", file=sys.stderr)
        sys.exit(2)
