"""How large attention logits get over training, and how large they could: with a constraint and without one.

    python results/attention.py                      # minutes on two cores
    python results/attention.py --data FILE --out FOLDER

The paper's architecture at half its width, without norm layers, with the settings and learning rates of
results/compare.py, seeds 0, 1, 2. Largest: over 16 windows of validation text, all heads and blocks. Bound:
s sigma(q_h) sigma(k_h) R^2 D of the worst head, R the certified radius of the stream before it. With soft cap
also what the limits promise whatever the weights become: that bound with every norm at its limit. Flags are
those of shakespeare.py. Writes attention.png to --out, by default to results/.
"""

import itertools
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.modules.module import register_module_forward_pre_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

import shakespeare  # noqa: E402
from compare import STUDIES, change, train  # noqa: E402
from promise import drive_to_limits  # noqa: E402

STUDY = STUDIES["shakespeare"]
SEEDS = (0, 1, 2)
RUNS = (("muon", "soft_cap", 4), ("muon", "none", 1), ("adamw", "none", 1))


@torch.no_grad()
def attention_logits(model, window_BT):
    """(largest |attention logit| on these windows, its bound), over blocks and heads, in float64."""
    H = model.config.heads
    D = model.config.width
    s = model.config.logit_scale / (D // H)
    seen = 0.0
    bound = 0.0
    x_BTD = F.embedding(window_BT, model.embedding_VD.double())
    for block, row in zip(model.blocks, shakespeare.certificate(model)["rows"]):
        turned = []  # queries and keys
        norms = []
        for W in (block.q.double(), block.k.double()):
            heads_BHTE = F.linear(x_BTD, W).unflatten(-1, (H, -1)).transpose(1, 2)
            turned.append(shakespeare.rotate(heads_BHTE))
            norms.append(torch.linalg.matrix_norm(W.unflatten(0, (H, -1)), ord=2))
        logits_BHTT = s * turned[0] @ turned[1].mT
        seen = max(seen, logits_BHTT.tril().abs().max().item())  # a token attends to those before it
        largest = s * (norms[0] * norms[1]).max().item() * 10 ** (2 * row["radius_log10"]) * D
        bound = max(bound, largest)
        x_BTD = block(x_BTD)
    return seen, bound


def logits_over_training(config, data, window_BT):
    """([(step, largest logit, bound)], summary) of a run, by a hook before each forward pass."""
    points = []
    steps = itertools.count()

    def look(module, args):
        if isinstance(module, shakespeare.Transformer):
            step = next(steps)  # the first evaluation, after the last step, counts as well
            if step % max(1, config.steps // 16) == 0 and step <= config.steps:
                points.append((step, *attention_logits(module, window_BT)))

    hook = register_module_forward_pre_hook(look)
    try:
        return points, train(shakespeare, config, data)
    finally:
        hook.remove()


def promised(config, window_BT):
    """The bound with every norm at its limit."""
    model = shakespeare.Transformer(config, "".join(map(chr, range(window_BT.max() + 1)))).double()
    drive_to_limits(model, config.limits())
    return attention_logits(model, window_BT)[1]


def spread(values):
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}"


def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    base = shakespeare.parse_arguments([*STUDY["flags"].split(), *flags])
    data = shakespeare.load_data(base)
    window_BT = data[1][:16 * base.seq_len].view(16, -1)
    if base.out:
        Path(base.out).mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, len(RUNS), sharey=True)
    for panel, (optimizer, constraint, w_max) in zip(panels, RUNS):
        seen, bounds, accuracy = [], [], []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as out:
                config = change(base, STUDY, out, optimizer=optimizer, constraint=constraint, w_max=w_max,
                                lr=STUDY["pairs"][constraint][optimizer][0], seed=seed)
                points, summary = logits_over_training(config, data, window_BT)
            steps, largest, bound = zip(*points)
            panel.semilogy(steps, largest, "C0", lw=1)
            panel.semilogy(steps, bound, "C3:", lw=1)
            seen.append(max(largest))
            bounds.append(max(bound))
            accuracy.append(100 * summary["val_accuracy"])
        name = f"{optimizer} + {constraint} {w_max}"
        if constraint == "none":
            name = f"{optimizer}, no constraint"
        panel.set_title(name, fontsize=9)
        print(f"{name:24} largest logit over training {spread(seen)}, bound {spread(bounds)}, "
              f"accuracy {spread(accuracy)} %", flush=True)
        if constraint != "none":
            print(f"{name:24} bound with every norm at its limit {promised(config, window_BT):.3g}", flush=True)
    panels[0].set_ylabel("|attention logit|")
    figure.supxlabel("training step (shakespeare.py; solid: largest on 16 windows, dotted: bound; "
                     f"data: {Path(data[-1]).name})", fontsize=8)
    figure.savefig((Path(base.out) if base.out else Path(__file__).parent) / "attention.png", dpi=110)


if __name__ == "__main__":
    try:
        main()
    except (shakespeare.UserError, OSError) as problem:
        print(f"attention.py: {problem}", file=sys.stderr)
        sys.exit(2)
