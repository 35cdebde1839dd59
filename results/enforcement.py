"""The largest sigma / limit after any step of a whole run, by SVD in float64.

    python results/enforcement.py                    # soft_cap, hard_cap, specnorm, stiefel: half an hour
    python results/enforcement.py --constraint soft_cap --data DIR

Flags are those of mlp_cifar.py, which trains as always. A hook of torch looks at the weights after every step
of Muon. A value above 1 is a weight matrix beyond its limit.
"""

import sys
import tempfile
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlp_cifar  # noqa: E402
from compare import train  # noqa: E402
from constraints import singular_values  # noqa: E402
from muon import Muon  # noqa: E402


def main(argv=None):
    base = mlp_cifar.parse_arguments(argv)
    data = mlp_cifar.load_data(base)
    names = ("soft_cap", "hard_cap", "specnorm", "stiefel")
    for constraint in [base.constraint] if "constraint" in base.given else names:
        shares = []  # of each step, the largest sigma / limit of any layer

        def look(optimizer, args, kwargs):
            if isinstance(optimizer, Muon):
                shares.append(max(singular_values(W)[0].item() / group["w_max"]
                                  for group in optimizer.param_groups for W in group["params"]))

        hook = register_optimizer_step_post_hook(look)
        try:
            with tempfile.TemporaryDirectory() as out:
                given = dict(base.given, preset=base.preset, constraint=constraint, evals=1, out=out)
                summary = train(mlp_cifar, mlp_cifar.Config.of(**given), data)
        finally:
            hook.remove()
        print(f"{constraint}: largest sigma / limit {max(shares):.7f} over {len(shares)} steps "
              f"({sum(share > 0.95 for share in shares)} of them above 0.95), {base.preset}, "
              f"seed {base.seed}, data: {summary['data']}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (mlp_cifar.UserError, OSError) as problem:
        print(f"enforcement.py: {problem}", file=sys.stderr)
        sys.exit(2)
