"""The picture at the top of the README: singular values of one matrix over training, under each method.

    python assets/method.py [--data DIR ...]     # a few minutes on two cores; flags are those of mlp_cifar.py

The second layer (256 x 256) of the paper's network on CIFAR-10, with the learning rates of mlp_cifar.PAIRS and its middle
strengths. Writes assets/method.png.
"""

import dataclasses
import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mlp_cifar  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PAIRS = [("adamw", "none")] + [pair for pair in mlp_cifar.PAIRS if pair[0] == "muon"]
base = mlp_cifar.parse_arguments(["--compare", *sys.argv[1:]])
mlp_cifar.keep_memory()
(images_NP, labels_N), _, data_name = mlp_cifar.load_data(base)
figure, panels = plt.subplots(1, len(PAIRS), figsize=(15, 2.9), sharey=True, layout="constrained")
for panel, (optimizer, constraint) in zip(panels, PAIRS):
    lr, strengths = mlp_cifar.PAIRS[optimizer, constraint]
    w = strengths[len(strengths) // 2]
    config = dataclasses.replace(base, optimizer=optimizer, constraint=constraint, lr=lr, w_max=f"{w:g}", compare=False)
    mlp_cifar.check(config)
    model = mlp_cifar.MLP(config, images_NP.sum(0) / (255 * len(images_NP)))
    optimizers = mlp_cifar.make_optimizers(config, model)
    dtype, steps, values = mlp_cifar.compute_dtype(config, torch.device("cpu")), [], []
    for step in range(config.steps + 1):
        if step % (config.steps // 50) == 0:
            steps.append(step)
            values.append(torch.linalg.svdvals(model.weights[1].detach().double()).numpy())
        if step < config.steps:
            index = mlp_cifar.batch_indices(step, config, len(labels_N))
            mlp_cifar.train_step(config, model, optimizers, images_NP[index], labels_N[index], step, dtype)
    panel.plot(steps, [v[::8] for v in values], color="C0", lw=0.6)
    panel.plot(steps, [v[0] for v in values], color="C3", lw=1.2)
    if constraint not in ("none", "spectral_weight_decay"):  # (those two have no limit)
        panel.axhline(w, color="k", ls=":", lw=0.8)
    name = "AdamW" if optimizer == "adamw" else "Muon"
    panel.set_title(name if constraint == "none" else f"{name} +\n{constraint.replace('_', ' ')}", fontsize=9)
    panel.tick_params(labelsize=7)
    print(f"{optimizer} {constraint}: largest {values[-1][0]:.3f}, median {values[-1][len(values[-1]) // 2]:.3f}", flush=True)
panels[0].set_ylabel("singular values", fontsize=8)
panels[0].set_ylim(0, 8)
figure.supxlabel(f"training step (mlp_cifar.py, second layer; every eighth value, the largest in red, the limit dotted; data: {Path(data_name).name})",
                 fontsize=8)
figure.savefig(base.out or Path(__file__).with_name("method.png"), dpi=110)
