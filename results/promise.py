"""What a preset promises before training: a bound that holds whatever its weights become.

    python results/promise.py            # seconds
    python results/promise.py --w_max 2  # the same limit in every preset; writes no table

The product of norms grows with each norm, and a constraint keeps each norm within its limit. So the
product with every norm at its limit is a bound that training cannot exceed while no norm does. hard_cap
sees to that in float32; soft_cap in bfloat16 has exceeded a limit by 1.2 %. Each factor is attained:
square orthogonal matrices times the limit have that norm, and so has each head's part of them. Norms are
RMS->RMS, in which the product does not depend on the width. So a small width serves, with the
preset's blocks, heads and scales.

The ellipsoid is a bound for given weights, and no promise: it is shown at these orthogonal weights.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import nanogpt_lipschitz  # noqa: E402
import shakespeare  # noqa: E402
from constraints import power, sigma_per_norm  # noqa: E402

SLACK = 1e-4  # what a constraint may leave above a limit, relative (constraints.py)
NO_PROMISE = ("none", "weight_decay", "spectral_weight_decay", "hammer")
FIELDS = ("script", "preset", "promised_log10", "ellipsoid_log10")


def drive_to_limits(model, limits):
    """Every matrix becomes orthogonal times its limit, every embedding has an RMS of 1."""
    generator = torch.Generator().manual_seed(0)
    for role, W in model.matrices():
        torch.nn.init.orthogonal_(W, generator=generator)
        W.data.mul_(limits[role] * (1 + SLACK) * sigma_per_norm(W))
    rows = torch.randn(model.embedding_VD.shape, generator=generator)
    model.embedding_VD.data.copy_(rows / rows.square().mean(1, keepdim=True).sqrt())


def promise(script, preset, **changes):
    """A row: logarithms of the promised bound, and of the ellipsoid at orthogonal weights."""
    row = dict(script=script.SCRIPT, preset=preset)
    config = script.Config.of(preset, **changes)
    if config.constraint in NO_PROMISE or getattr(config, "baseline", False):
        return dict(row, promised_log10="inf", ellipsoid_log10="inf")
    config.width = 16 * config.heads
    config.hidden = 4 * config.width
    config.seq_len = min(config.seq_len, 256)
    if script is shakespeare:
        model = script.Transformer(config, "".join(map(chr, range(65))))
    else:
        config.vocab = 128  # a multiple of 128, so that no row of the head is padding
        model = script.Transformer(config)
    model.double()
    drive_to_limits(model, config.limits())
    bound = script.certificate(model)
    return dict(row, promised_log10=round(bound["product_log10"] + 5e-4, 3),
                ellipsoid_log10=round(bound["ellipsoid_log10"] + 5e-4, 3))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--w_max", help="in place of the presets' own")
    parser.add_argument("--csv", default="results/promise.csv")
    options = parser.parse_args(argv)
    changes = {}
    if options.w_max:
        changes["w_max"] = options.w_max
    rows = []
    print(f"{'':34} {'promised':>10} {'ellipsoid, orthogonal weights':>30}")
    for script in (shakespeare, nanogpt_lipschitz):
        for preset in script.PRESETS:
            row = promise(script, preset, **changes)
            rows.append(row)
            print(f"{row['script']:18} {preset:15} {power(float(row['promised_log10'])):>10} "
                  f"{power(float(row['ellipsoid_log10'])):>30}", flush=True)
    if not options.w_max:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return rows


if __name__ == "__main__":
    main()
