"""For the time being: shakespeare.py and nanogpt_lipschitz.py with the interface that verify_lipschitz.py is written to.

When both have it, remove this file and the line of verify_lipschitz.py that imports it.
"""

import functools
from types import SimpleNamespace

import nanogpt_lipschitz as nano
import shakespeare as small


def certificate(script, model, *arguments, **options):
    bound = script.certificate(model, *arguments, **options)
    return {"product_log10": bound.get("simple_log10"), **bound}


def certified_tokens(script, model, tokens_N):
    options = dict(search=5) if script is small else {}
    log = {rho: script.certificate(model, rho, **options)["body_log10"] for rho in small.RHOS}
    margin_N = small.token_margins(model, tokens_N)
    return {rho: margin_N > rho * 10 ** min(300.0, log[rho]) for rho in log}


def load_checkpoint(folder):
    state = nano.load_checkpoint(folder)
    config, model = nano.model_from_checkpoint(state)
    for block in model.blocks:
        block.attention = functools.partial(model.attention, block)
        block.mlp = functools.partial(model.mlp, block)
    return config, model, state


def load_data(config):
    """Without the last, partial window, which the old evaluation leaves out."""
    train, validation, name = nano.load_data(config)
    n = max(1, min(config.val_tokens, len(validation) - 1) // config.seq_len) * config.seq_len + 1
    tokens_N = validation.read(0, n)

    class Whole:
        def __len__(self):
            return n

        def read(self, start, count):
            return tokens_N[start:start + count]

    return train, Whole(), name


shakespeare, nanogpt_lipschitz = small, nano
if not hasattr(small, "certified_tokens"):
    shakespeare = SimpleNamespace(**vars(small))
    shakespeare.certificate = functools.partial(certificate, small)
    shakespeare.certified_tokens = functools.partial(certified_tokens, small)
if hasattr(nano, "Refusal"):
    nano.Config.limits = nano.limits
    nanogpt_lipschitz = SimpleNamespace(**vars(nano))
    nanogpt_lipschitz.UserError = nano.Refusal
    nanogpt_lipschitz.certificate = functools.partial(certificate, nano)
    nanogpt_lipschitz.load_checkpoint, nanogpt_lipschitz.load_data = load_checkpoint, load_data
if not hasattr(nano, "certified_tokens"):
    nanogpt_lipschitz.certified_tokens = functools.partial(certified_tokens, nano)
