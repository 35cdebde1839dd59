"""How many queries, keys and values --cap scales down in a finished run of nanogpt_lipschitz.py.

    python results/capped.py runs/NAME ...

A cap on all vectors is QK norm by another name; a cap on few is hardly there. So this counts them, on the first
16 sequences of the validation text, for each block that attends by content: the share whose RMS is above the cap,
and the smallest, middle and largest RMS before it.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import nanogpt_lipschitz as nano  # noqa: E402
from constraints import cap_rows  # noqa: E402
from norm_free import largest_logit  # noqa: E402

NAMES = ("queries", "keys", "values")


def lengths_before_cap(config, model):
    """The RMS of each vector that the cap sees: a list, per use of the cap, of tensors (B, 3 H, T)."""
    seen = []

    def record(parts_BHTE, limit):
        seen.append(parts_BHTE.square().mean(-1).sqrt())
        return cap_rows(parts_BHTE, limit)

    with torch.no_grad(), mock.patch.object(nano, "cap_rows", record):
        largest_logit(config, model)  # which reads those sequences
    return seen


def rows(folder):
    """(block, name, share above the cap, least, median, largest RMS) of each block by content."""
    config, model, _ = nano.load_checkpoint(folder)
    if not config.cap:
        raise nano.UserError(f"{folder}: was trained without --cap")
    blocks = [i for i, block in enumerate(model.blocks) if block.sees_content]
    seen = lengths_before_cap(config, model)
    found = []
    for i, block in enumerate(blocks):
        rms_BHT = torch.cat(seen[i::len(blocks)])
        for name, rms in zip(NAMES, rms_BHT.chunk(3, 1)):
            share = (rms > config.cap).double().mean().item()
            found.append((block, name, share, rms.min().item(), rms.median().item(), rms.max().item()))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    options = parser.parse_args(argv)
    print("| run | block | vectors | above the cap | smallest, median and largest RMS before it |\n|---|---|---|---|---|")
    for folder in options.runs:
        try:
            found = rows(folder)
        except nano.UserError as problem:
            parser.error(str(problem))
        for block, name, share, least, median, largest in found:
            print(f"| {Path(folder).name} | {block} | {name} | {share:.1%} | {least:.2g}, {median:.2g}, {largest:.2g} |")


if __name__ == "__main__":
    main()
