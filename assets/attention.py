"""How large attention logits get over training, and how large they could: with a constraint and without, no norm layers.

    python assets/attention.py [--data FILE ...]     # minutes on two cores; flags are those of shakespeare.py

The paper's architecture at half its width (preset compare), learning rates of shakespeare.PAIRS, seeds 0, 1, 2. *Largest* is
over 16 windows of validation text, all heads and blocks; the *bound* is s sigma(q_h) sigma(k_h) R^2 D of the worst head, R the
certified radius of the stream before it. Writes assets/attention.png.
"""

import dataclasses
import statistics
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import shakespeare  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RUNS = (("muon", "soft_cap", 4), ("muon", "none", 1), ("adamw", "none", 1))


@torch.no_grad()
def logits(model, x_BTD):
    """(largest |attention logit| on this input, its bound), over blocks and heads, in float64."""
    D, H = model.config.width, model.config.heads
    s, seen, bound = model.config.logit_scale / (D // H), 0.0, 0.0
    for block, row in zip(model.blocks, shakespeare.certificate(model)["rows"]):
        q_BHTE, k_BHTE = (shakespeare.rotate(F.linear(x_BTD, W).view(*x_BTD.shape[:2], H, D // H).transpose(1, 2))
                          for W in (block.q.double(), block.k.double()))
        seen = max(seen, (s * q_BHTE @ k_BHTE.mT).tril().abs().max().item())  # (a token attends to those before it)
        q_H, k_H = (shakespeare.sigma(W.double().view(H, D // H, D)) for W in (block.q, block.k))
        bound = max(bound, (s * q_H * k_H * row["radius"] ** 2 * D).max().item())
        x_BTD = torch.lerp(x_BTD, model.attention(block, x_BTD), model.mix)
        x_BTD = torch.lerp(x_BTD, model.mlp(block, x_BTD), model.mix)
    return seen, bound


def main():
    base = shakespeare.parse_arguments(["--compare", *sys.argv[1:]])
    shakespeare.keep_memory()
    train_N, validation_N, vocabulary, data_name = shakespeare.load_data(base)
    window_BT = validation_N[:16 * base.seq_len].view(16, -1)
    figure, panels = plt.subplots(1, len(RUNS), figsize=(11, 3), sharey=True, layout="constrained")
    for panel, (optimizer, constraint, w_max) in zip(panels, RUNS):
        seen, bounds, accuracy, steps = [], [], [], []
        for seed in range(3):
            config = dataclasses.replace(base, compare=False, optimizer=optimizer, constraint=constraint, w_max=str(w_max),
                                         lr=shakespeare.PAIRS[optimizer, constraint][0], seed=seed)
            shakespeare.check(config)
            model = shakespeare.Transformer(config, vocabulary)
            optimizers, dtype = shakespeare.make_optimizers(config, model), shakespeare.compute_dtype(config, torch.device("cpu"))
            points = []
            for step in range(config.steps + 1):
                if step % max(1, config.steps // 16) == 0:
                    points.append((step, *logits(model, F.embedding(window_BT, model.embedding_VD.detach().double()))))
                if step < config.steps:
                    shakespeare.train_step(config, model, optimizers, *shakespeare.batch_of(train_N, step, config), step, dtype)
            steps, largest, bound = zip(*points)
            panel.semilogy(steps, largest, "C0", lw=1)
            panel.semilogy(steps, bound, "C3:", lw=1)
            seen.append(max(largest))
            bounds.append(max(bound))
            accuracy.append(100 * shakespeare.evaluate(model, shakespeare.windows(validation_N, config.seq_len))[2])
        name = f"{optimizer} + {constraint} {w_max}" if constraint != "none" else f"{optimizer}, no constraint"
        panel.set_title(name, fontsize=9)
        print(f"{name:24} largest logit over training {statistics.mean(seen):.3g} ± {statistics.stdev(seen):.2g}, bound "
              f"{statistics.mean(bounds):.3g} ± {statistics.stdev(bounds):.2g}, accuracy {statistics.mean(accuracy):.1f} ± "
              f"{statistics.stdev(accuracy):.1f} %", flush=True)
    panels[0].set_ylabel("|attention logit|")
    figure.supxlabel(f"training step (shakespeare.py; solid: largest on 16 windows, dotted: bound; data: {Path(data_name).name})", fontsize=8)
    figure.savefig(base.out or Path(__file__).with_name("attention.png"), dpi=110)


if __name__ == "__main__":
    main()
