"""A picture of the README: singular values of one matrix over training, under each method.

    python results/method.py                         # a few minutes on two cores
    python results/method.py --data DIR --out FOLDER

The second layer (256 x 256) of the paper's network on CIFAR-10, with the learning rates and middle strengths
of results/compare.py. Other flags are those of mlp_cifar.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlp_cifar  # noqa: E402
from compare import STUDIES, change, train  # noqa: E402

STUDY = STUDIES["mlp_cifar"]
ORDER = ("none", "weight_decay", "spectral_weight_decay", "specnorm", "stiefel", "hammer", "soft_cap", "hard_cap")
WITHOUT_LIMIT = ("none", "spectral_weight_decay")


def singular_values_over_training(config, data):
    """(steps, singular values at each): about 50 times in a run, by a hook before each optimizer step."""
    steps = []
    values = []
    count = 0

    def look(optimizer, args, kwargs):
        nonlocal count
        if type(optimizer) is torch.optim.Adam:  # of biases, or of a certificate
            return
        if count % max(1, config.steps // 50) == 0:
            second = [W for group in optimizer.param_groups for W in group["params"]][1]
            steps.append(count)
            values.append(torch.linalg.svdvals(second.detach().cpu().double()).numpy())
        count += 1

    hook = register_optimizer_step_pre_hook(look)
    try:
        train(mlp_cifar, config, data)
    finally:
        hook.remove()
    return steps, values


def draw(panel, name, steps, values, w_max=None):
    panel.plot(steps, [v[::8] for v in values], color="C0", lw=0.6)
    panel.plot(steps, [v[0] for v in values], color="C3", lw=1.5)
    if w_max:
        panel.axhline(w_max, color="k", ls=":")
        name += f", limit {w_max:g}"
    panel.set_title(f"{name}: at last {values[-1][0]:.1f}", fontsize="medium")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of method.png [results/]")
    options, flags = parser.parse_known_args(argv)
    base = mlp_cifar.parse_arguments([*STUDY["flags"].split(), *flags])
    data = mlp_cifar.load_data(base)
    options.out.mkdir(parents=True, exist_ok=True)
    pairs = [("adamw", "none"), *(("muon", constraint) for constraint in ORDER)]
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(3, 3, sharex=True, sharey=True)
    for panel, (optimizer, constraint) in zip(panels.flat, pairs, strict=True):
        lr, strengths = STUDY["pairs"][constraint][optimizer]
        w_max = strengths[len(strengths) // 2]
        with tempfile.TemporaryDirectory() as out:
            config = change(base, STUDY, out, optimizer=optimizer, constraint=constraint, lr=lr, w_max=w_max)
            steps, values = singular_values_over_training(config, data)
        name = "AdamW" if optimizer == "adamw" else "Muon"
        if constraint != "none":
            name += f" + {constraint.replace('_', ' ')}"
        draw(panel, name, steps, values, None if constraint in WITHOUT_LIMIT else w_max)
        last = values[-1]
        print(f"{optimizer} {constraint}: largest {last[0]:.3f}, median {last[len(last) // 2]:.3f}", flush=True)
    figure.supylabel("singular values of the second layer, 256 x 256")
    figure.supxlabel("training step")
    figure.suptitle("Blue: every eighth singular value. Red: the largest. Dotted: the limit of the constraint. "
                    f"Data: {Path(data[-1]).name}")
    figure.savefig(options.out / "method.png", dpi=110)


if __name__ == "__main__":
    try:
        main()
    except (mlp_cifar.UserError, OSError) as problem:
        print(f"method.py: {problem}", file=sys.stderr)
        sys.exit(2)
