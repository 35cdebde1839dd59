"""The picture at the top of the README: singular values of one matrix over training, under each method.

    python results/method.py                         # a few minutes on two cores
    python results/method.py --data DIR --out FOLDER

The second layer (256 x 256) of the paper's network on CIFAR-10, with the learning rates and middle strengths
of results/compare.py. Flags are those of mlp_cifar.py. Writes method.png to --out, by default to results/.
"""

import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

import mlp_cifar  # noqa: E402
from compare import STUDIES, train  # noqa: E402

STUDY = STUDIES["mlp_cifar"]


def singular_values_over_training(config, data):
    """(steps, singular values at each): about 50 times in a run, by a hook before each optimizer step."""
    steps, values, count = [], [], 0

    def look(optimizer, args, kwargs):
        nonlocal count
        if type(optimizer) is torch.optim.Adam:  # (of biases, or of a certificate)
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


def main(argv=None):
    base = mlp_cifar.parse_arguments([*STUDY["flags"].split(),
                                      *(sys.argv[1:] if argv is None else argv)])
    data = mlp_cifar.load_data(base)
    pairs = [("adamw", "none"), *(("muon", constraint) for constraint in STUDY["pairs"])]
    if base.out:
        Path(base.out).mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(15, 2.9), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True)
    for panel, (optimizer, constraint) in zip(panels, pairs):
        lr, strengths = STUDY["pairs"][constraint][optimizer]
        w_max = strengths[len(strengths) // 2]
        with tempfile.TemporaryDirectory() as out:
            steps, values = singular_values_over_training(mlp_cifar.Config.of(**dict(
                base.given, preset=base.preset, optimizer=optimizer, constraint=constraint, lr=lr,
                w_max=str(w_max), out=out)), data)
        panel.plot(steps, [v[::8] for v in values], color="C0", lw=0.6)
        panel.plot(steps, [v[0] for v in values], color="C3", lw=1.2)
        if constraint not in ("none", "spectral_weight_decay"):  # (these two have no limit)
            panel.axhline(w_max, color="k", ls=":", lw=0.8)
        name = "AdamW" if optimizer == "adamw" else "Muon"
        if constraint != "none":
            name += f" +\n{constraint.replace('_', ' ')}"
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        print(f"{optimizer} {constraint}: largest {values[-1][0]:.3f}, "
              f"median {values[-1][len(values[-1]) // 2]:.3f}", flush=True)
    panels[0].set_ylabel("singular values", fontsize=8)
    panels[0].set_ylim(0, 8)
    figure.supxlabel("training step (mlp_cifar.py, second layer; every eighth value, the largest in red, the "
                     f"limit dotted; data: {Path(data[-1]).name})", fontsize=8)
    figure.savefig((Path(base.out) if base.out else Path(__file__).parent) / "method.png", dpi=110)


if __name__ == "__main__":
    try:
        main()
    except (mlp_cifar.UserError, OSError) as problem:
        print(f"method.py: {problem}", file=sys.stderr)
        sys.exit(2)
