"""Tutorial 2: a transformer on Shakespeare without norm layers, and a Lipschitz bound for it that is true.

WHAT IT SHOWS. With every weight matrix held within a limit, a transformer needs no layer norm, no QK norm and no
softcapping, and has a Lipschitz constant: how much the logits can move, at most, when the tokens' embeddings move.
(The Shakespeare experiments of arXiv 2507.13338.) The bound for attention in the paper's code misses that each head may
look at a different token; the one derived here counts heads, is attacked in the tests, and is won back by architecture.

COMMANDS
    python shakespeare.py                                    # minutes on a laptop; ends with a sample
    python shakespeare.py --preset lipschitz2                # a constant below 2, embeddings to logits
    python shakespeare.py --sample runs/NAME --prompt "ROMEO:" --temperature 0.8
    python shakespeare.py --load FILE.npz                    # one of the authors' published checkpoints
    python shakespeare.py --data FILE                        # any text
    python shakespeare.py --resume runs/NAME                 # go on where a run was stopped

RESULT (tinyshakespeare, whole validation text, two cores of an AMD EPYC with bfloat16 instructions; torch 2.13).
    laptop, the default: 55.9 % of the characters right, loss 1.478, at a true bound of 1960 (mean of three seeds; about
    six minutes). plain100: 53.4 %, 1.556, at 63.9 (three seeds; 6 minutes). lipschitz2: 56.3 % at 0.772 and a loss
    temperature of 800 (one seed; 6 to 13 minutes). README.md has the tables.

ANCESTRY. The experiment is the authors' (github Arongil/lipschitz-transformers, in JAX), the text karpathy/char-rnn's;
nothing of their code is used. MaxMin is GroupSort (Anil et al. 2019).
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import shutil
import sys
import sysconfig
import time
import urllib.request
import zipfile
from pathlib import Path

SCRIPT = "shakespeare"

# ======================================================================================================================
# CONFIG: every field is a flag of the same name
# ======================================================================================================================


def option(default, text, **kwargs):
    return dataclasses.field(default=default, metadata=dict(help=text, **kwargs))


@dataclasses.dataclass
class Config:
    preset: str = option("laptop", "named settings, see the end of this help; other flags override them")
    # data
    data: str = option("auto", "auto, stand-in, or a text file")
    holdout: bool = option(False, "for tuning: evaluate on the last tenth of the training text, and do not train on it")
    # model
    width: int = option(256, "dimension D of a token's vector")
    blocks: int = option(3, "blocks; each is attention, then MLP")
    heads: int = option(4, "attention heads H, each of dimension D / H")
    hidden: int = option(1024, "neurons of an MLP")
    seq_len: int = option(256, "characters in a window")
    activation: str = option("gelu", "gelu (divided by 1.1289, its steepest slope), or maxmin, which sorts pairs of "
                                     "neurons and so loses no gradient", choices=("gelu", "maxmin"))
    positions: str = option("rope", "rope: rotated queries and keys; bias: a learned bias on the attention logits by "
                                    "distance, which costs no Lipschitz constant", choices=("rope", "bias"))
    logit_scale: float = option(1.0, "attention logits are logit_scale * q.k / (D / H); 0 leaves only the bias")
    attention_scale: float = option(1 / 3, "factor on the output of attention; 0: 1 / sqrt(H)")
    residual_scale: float = option(1.0, "x <- (1 - a) x + a block(x) with a = residual_scale / (2 * blocks)")
    final_scale: float = option(1.0, "fixed factor on the logits, part of the network and of its bound")
    w_max: str = option("6", "limit on the RMS->RMS norm of each matrix: one number, or 7 as q,k,v,o,in,out,head")
    # training
    optimizer: str = option("muon", "optimizer of the weight matrices", choices=("muon", "adamw"))
    constraint: str = option("soft_cap", "map that holds each weight matrix within w_max: none, weight_decay, "
                             "spectral_weight_decay, specnorm, stiefel, hammer, soft_cap, hard_cap (table in "
                             "constraints.py), or one of yours as FILE.py:NAME")
    constrain_every: int = option(4, "let specnorm, soft_cap, hard_cap wait about so many steps, where it is certain that "
                                  "the limit holds meanwhile (Muon only; 1: after each step)")
    steps: int = option(600, "training steps")
    batch: int = option(32, "windows a step")
    lr: float = option(0.0, "learning rate at the start, falling linearly to 0; for Muon it is the RMS->RMS norm of a "
                            "step. 0: 0.1 for Muon, 0.003 for AdamW")
    embed_lr: float = option(0.02, "learning rate of the embedding (Adam), falling likewise")
    bias_lr: float = option(0.1, "learning rate of the position bias (Adam), falling likewise")
    momentum: float = option(0.95, "Muon's momentum, or AdamW's first beta")
    adamw_wd: float = option(0.0, "AdamW's own weight decay (besides the constraint)")
    loss_temperature: float = option(1.0, "the loss sees temperature * logits; bounds and val_loss are of the logits")
    # run
    seed: int = option(0, "seed of initialisation, data order, samples")
    dtype: str = option("auto", "of the forward and backward pass; weights stay float32. auto: bfloat16 if native",
                        choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps; auto: cuda if there is one")
    evals: int = option(4, "evaluations (on the whole validation text) and checkpoints during a run")
    out: str = option("", "run folder; default runs/shakespeare_PRESET_seedN")
    resume: str = option("", "run folder to go on with; its own settings are used")
    # all pairs of optimizer and constraint
    compare: bool = option(False, "train every optimizer with every constraint at several strengths; the same command "
                           "again goes on where it was stopped. Settings: preset compare and other flags")
    minutes: float = option(55.0, "time after which --compare begins no further run, and reports")
    seeds: int = option(1, "seeds that --compare trains each point with")
    # instead of training
    load: str = option("", "a checkpoint published by the authors (.npz): evaluate, certify and sample it")
    sample: str = option("", "run folder (or checkpoint) to sample from")
    prompt: str = option("\n", "text that the sample continues")
    length: int = option(500, "characters to sample")
    temperature: float = option(0.8, "of sampling; near 0: always the most probable character")


SMALL = dict(activation="maxmin", positions="bias", logit_scale=0.0, attention_scale=0.0, blocks=4, heads=2, hidden=512,
             residual_scale=4.0, w_max="1", steps=1000, lr=0.04, embed_lr=0.05, momentum=0.9)
PRESETS = {
    "laptop": dict(SMALL, heads=4, w_max="2", final_scale=10.0, steps=800, lr=0.08),
    "paper": dict(batch=512, steps=2000, evals=10),
    "paper_adamw": dict(batch=512, steps=2000, evals=10, optimizer="adamw", constraint="none"),
    "lipschitz2": dict(SMALL, hidden=1024, w_max="1.4", final_scale=0.05, loss_temperature=800.0, steps=1400, lr=0.1,
                       embed_lr=0.02, momentum=0.95),
    "plain100": dict(SMALL, final_scale=120.0),
    # the paper's architecture at half its width, and the constraint after each step as there
    "compare": dict(width=128, hidden=512, seq_len=128, constrain_every=1, steps=200, evals=1),
}
RHOS = (0.001, 0.01, 0.03, 0.1)  # radii around the embeddings, RMS at every token, for certified token accuracy
SAMPLING = ("sample", "prompt", "length", "temperature")


class Refusal(Exception):
    """Something that the user can mend: one line, exit status 2."""


class Diverged(Refusal):
    """A loss that is not finite."""


def parse_arguments(argv=None):
    """The command line as a Config: defaults, then the preset, then the flags given."""
    presets = "\n".join(f"  {k:13} " + " ".join(f"{a}={b}" for a, b in v.items()) for k, v in PRESETS.items())
    parser = argparse.ArgumentParser(description=__doc__.split("RESULT")[0], epilog="presets:\n" + presets, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        if "choices" in f.metadata:
            kind["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name, default=argparse.SUPPRESS, **kind,
                            help=f.metadata["help"].replace("%", "%%") + f" [{str(f.default).encode('unicode_escape').decode()}]")
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "compare" if given.get("compare") else "laptop")
    if preset not in PRESETS:
        parser.error(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    for mode, allowed in (("resume", ("data", "constraint")), ("sample", ("seed", "dtype")), ("load", ("data", "seed", "out", "dtype"))):
        others = given.keys() - {mode, "device", *SAMPLING, *allowed}
        if given.get(mode) == "":
            parser.error(f"--{mode}: is empty; give a path")
        if mode in given and others:
            parser.error(f"{', '.join('--' + name for name in sorted(others))} with --{mode}: what was trained keeps its "
                         "own settings")
    if given.get("compare") and (others := given.keys() & {"optimizer", "constraint", "w_max", "lr", "seed"}):
        parser.error(f"{', '.join('--' + name for name in sorted(others))} with --compare, which sets that itself")
    settings = {**PRESETS[preset], **given, "preset": preset}
    if "lr" not in given and settings.get("optimizer", "muon") != PRESETS[preset].get("optimizer", "muon"):
        settings.pop("lr", None)  # a preset's learning rate is for its own optimizer
    return Config(**settings)


def check(config):
    """Refuse what cannot be meant, before anything is loaded or written."""
    def need(ok, name, requirement):
        if not ok:
            raise Refusal(f"--{name} {getattr(config, name)}: must be {requirement}")

    for name, largest in (("width", 2**14), ("blocks", 1000), ("heads", 2**14), ("hidden", 2**16), ("seq_len", 2**14),
                          ("steps", 2**40), ("batch", 2**20), ("evals", 2**40), ("length", 2**40), ("constrain_every", 64)):
        need(1 <= getattr(config, name) <= largest, name, f"a whole number from 1 to {largest}")
    for name in ("loss_temperature", "temperature"):
        need(0 < getattr(config, name) < math.inf, name, "a finite number above 0")
    for name in ("lr", "embed_lr", "bias_lr", "adamw_wd", "logit_scale", "attention_scale", "residual_scale",
                 "final_scale"):
        need(0 <= getattr(config, name) < math.inf, name, "a finite number of at least 0")
    need(config.width % config.heads == 0, "heads", f"a divisor of the width, {config.width}")
    need(config.positions == "bias" or config.width // config.heads % 2 == 0, "heads", "such that width / heads is even, "
         "for rope turns pairs")
    need(config.positions == "bias" or config.logit_scale > 0, "logit_scale", "above 0 for rope, which needs q and k")
    need(config.residual_scale <= 2 * config.blocks, "residual_scale", f"at most 2 * blocks, {2 * config.blocks}")
    need(config.activation == "gelu" or config.hidden % 2 == 0, "hidden", "even for maxmin, which works on pairs")
    need(0 <= config.momentum < 1, "momentum", "at least 0 and below 1")
    need(config.temperature >= 1e-9, "temperature", "at least 1e-9")
    need(config.prompt != "", "prompt", "at least one character")
    need(0 <= config.seed < 2**31, "seed", "a whole number from 0 to 2^31 - 1")
    need(0 <= config.minutes < math.inf, "minutes", "a finite number of at least 0")
    need(1 <= config.seeds <= 1000, "seeds", "a whole number from 1 to 1000")
    limits(config)
    config.evals = min(config.evals, config.steps)
    config.lr = config.lr or (0.1 if config.optimizer == "muon" else 0.003)


ROLES = ("q", "k", "v", "o", "in", "out", "head")


def limits(config):
    """w_max of each role of matrix, from the flag: {role: RMS->RMS norm}."""
    try:
        w = [float(v) for v in config.w_max.split(",")]
    except ValueError:
        w = []
    if len(w) not in (1, 7) or not all(0 < v < math.inf for v in w):
        raise Refusal(f"--w_max {config.w_max}: must be a finite number above 0, or 7 of them with commas "
                      f"({','.join(ROLES)})")
    return dict(zip(ROLES, w * 7 if len(w) == 1 else w))


if __name__ == "__main__":
    CONFIG = parse_arguments()  # before the imports that take seconds, so that --help answers at once

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from constraints import after_unknown_step, cap_rows, exact_norm, find_constraint, sigma_per_norm, singular_values  # noqa: E402
from muon import Muon, fast_dtype  # noqa: E402

# Shapes: B windows in a batch, T tokens (characters) in a window, D dimension of a token's vector, H heads, E = D / H,
# V characters in the vocabulary, N positions.


# ======================================================================================================================
# DATA: a text, as numbers
# ======================================================================================================================
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load_data(config):
    """(train_N, validation_N, vocabulary, name): int64 tokens, the characters in sorted order. 90 % is to train."""
    text, name = load_text(config)
    vocabulary = "".join(sorted(set(text)))
    if len(text) < 20 * (config.seq_len + 1) or len(vocabulary) < 2:
        raise Refusal(f"--data {name}: has {len(text)} characters, {len(vocabulary)} different ones; needed are at least "
                      f"{20 * (config.seq_len + 1)} for windows of {config.seq_len}, and 2")
    tokens_N = encode(text, vocabulary, name)
    train_N, validation_N = tokens_N.split([int(0.9 * len(tokens_N)), len(tokens_N) - int(0.9 * len(tokens_N))])
    if config.holdout:
        n = int(0.9 * len(train_N))
        train_N, validation_N, name = train_N[:n], train_N[n:], name + " (evaluated on training text held out)"
    return train_N, validation_N, vocabulary, name


def encode(text, vocabulary, name="--prompt"):
    """The characters' numbers, int64 (N,)."""
    strange = sorted(set(text) - set(vocabulary))
    if strange:
        raise Refusal(f"{name}: has characters that the model does not know ({''.join(strange[:20])!r}); it knows "
                      f"{vocabulary!r}")
    table = torch.zeros(0x110000, dtype=torch.int64)
    table[torch.tensor([ord(c) for c in vocabulary])] = torch.arange(len(vocabulary))
    return table[torch.from_numpy(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64))]


def load_text(config):
    """(text, its name)."""
    if config.data == "stand-in":
        return stand_in(), "stand-in"
    if config.data != "auto":
        return read_text(config.data), config.data
    local = Path(os.environ.get("DATA_DIR", "")) / "tinyshakespeare" / "input.txt"
    if os.environ.get("DATA_DIR") and local.is_file():
        return read_text(local), str(local)
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinyshakespeare" / "input.txt"
    try:
        if not cached.is_file() or hashlib.sha256(cached.read_bytes()).hexdigest() != TEXT_SHA256:
            data = urllib.request.urlopen(TEXT_URL, timeout=4).read(2**22)
            if hashlib.sha256(data).hexdigest() != TEXT_SHA256:
                raise OSError("what came from the network is not the text")
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cached, data)
            except OSError:
                pass  # a home that cannot be written to: the next run asks again
            return data.decode(), "tinyshakespeare"
        return read_text(cached), "tinyshakespeare"
    except (OSError, http.client.HTTPException) as problem:
        text = stand_in()
        print(f"{'!' * 100}\n!!  Shakespeare is not here: {problem}\n!!  TRAINING ON A STAND-IN: {len(text)} characters of "
              f"the source of Python's own library. Its loss compares with nothing.\n{'!' * 100}", flush=True)
        return text, "stand-in"


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise Refusal(f"--data {path}: cannot be read as text ({problem}); needed is a file in UTF-8") from problem


def stand_in(characters=1_115_394):
    """Python source that is on every machine: modules of the standard library by name, ASCII only, as long as the play."""
    parts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        part = path.read_bytes().decode("ascii", errors="ignore").replace("\r\n", "\n")
        parts.append("".join(c for c in part if c == "\n" or " " <= c <= "~"))
        total += len(parts[-1])
        if total >= characters:
            break
    return "".join(parts)[:characters]


def batch_of(tokens_N, step, config):
    """(x_BT, y_BT): random windows and what follows each token, a function of seed and step (so resuming is exact)."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    start_B = torch.randint(len(tokens_N) - config.seq_len, (config.batch,), generator=generator)
    window = tokens_N[start_B[:, None] + torch.arange(config.seq_len + 1)]
    return window[:, :-1], window[:, 1:]


# ======================================================================================================================
# MODEL: attention and MLP, each mixed into the stream by a convex combination, and no norm layer anywhere
# ======================================================================================================================
GELU_SLOPE = 1.128993069  # the steepest slope of the tanh form of GeLU, rounded up (exact form: 1.1289041452)
GELU_SCALE = 1.1289  # what the paper divides GeLU by; a little less than the slope, which the certificate has to know


def maxmin(z):
    """(max, min) of each pair (neuron i of the first half, of the second): GroupSort of Anil et al. (2019)."""
    a, b = z.chunk(2, -1)
    excess = (a - b).relu()  # (torch.maximum and minimum take twice the time in their backward pass)
    return torch.cat([b + excess, a - excess], -1)


def rotate(x_BHTE):
    """RoPE, in the paper's form: within each head, turn the pair (i, i + E/2) by position / 10000^(i / (E/2))."""
    T, E = x_BHTE.shape[-2:]
    angle = torch.arange(T, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(E // 2, dtype=torch.float64) / (E // 2))
    cos, sin = angle.cos(), angle.sin()
    by_self_TE, by_partner_TE = (torch.cat(pair, -1).to(x_BHTE) for pair in ((cos, -cos), (sin, sin)))
    partner_BHTE = torch.cat(x_BHTE.chunk(2, -1)[::-1], -1)
    return torch.addcmul(x_BHTE * by_self_TE, partner_BHTE, by_partner_TE)  # (three passes; by halves it is seven)


class Block(torch.nn.Module):
    """The matrices of a block: q, k, v, o (D, D), w_in (hidden, D), w_out (D, hidden), and the position bias (H, T)."""

    def __init__(self, config, index):
        super().__init__()
        D = config.width
        for name in ("q", "k", "v", "o") if config.logit_scale > 0 else ("v", "o"):
            setattr(self, name, torch.nn.Parameter(torch.zeros(D, D)))
        self.w_in = torch.nn.Parameter(torch.zeros(config.hidden, D))
        self.w_out = torch.nn.Parameter(torch.zeros(D, config.hidden))
        if config.positions == "bias":  # at the start head h of block i looks at about h 2^i characters ago
            step = 2 ** min(index, 5)
            centre_H = (step * torch.arange(config.heads)).clamp(max=config.seq_len - 1)
            distance_HT = (torch.arange(config.seq_len) - centre_H[:, None]).abs()
            self.bias_HT = torch.nn.Parameter(-2.0 / step * distance_HT)

    def matrices(self):
        """[(role, matrix)]"""
        names = dict(q="q", k="k", v="v", o="o", w_in="in", w_out="out")
        return [(role, getattr(self, name)) for name, role in names.items() if hasattr(self, name)]


class Transformer(torch.nn.Module):
    """Embedding (a table of V vectors of RMS at most 1), blocks, head. No biases, no norm layers.

    x <- (1 - a) x + a attention(x);  x <- (1 - a) x + a mlp(x);  logits = final_scale * head x.
    """

    def __init__(self, config, vocabulary):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        generator = torch.Generator().manual_seed(config.seed)
        self.mix = config.residual_scale / (2 * config.blocks)  # a
        self.attention_scale = config.attention_scale or config.heads**-0.5
        self.embedding_VD = torch.nn.Parameter(torch.randn(len(vocabulary), config.width, generator=generator))
        self.blocks = torch.nn.ModuleList(Block(config, i) for i in range(config.blocks))
        self.head_VD = torch.nn.Parameter(torch.zeros(len(vocabulary), config.width))
        w_max = limits(config)
        for role, W in self.matrices():
            # All singular values equal, of norm 1 or the limit. o and w_out start at 0, and so each block as (1 - a) x,
            # but where that would make them start on no manifold, or lose the signal of a deep stack.
            torch.nn.init.orthogonal_(W, generator=generator)
            W.data.mul_(sigma_per_norm(W) * (w_max[role] if config.constraint == "stiefel" else min(1.0, w_max[role])))
            if role in ("o", "out") and config.constraint != "stiefel" and self.mix < 0.4:
                W.data.zero_()
        self.shrink_embedding()

    def matrices(self):
        """[(role, matrix)] of all that the constraint holds."""
        return [pair for block in self.blocks for pair in block.matrices()] + [("head", self.head_VD)]

    @torch.no_grad()
    def shrink_embedding(self):
        """Every stored vector back to RMS at most 1."""
        self.embedding_VD.copy_(cap_rows(self.embedding_VD))

    def attention(self, block, x_BTD):
        """out_t = attention_scale * sum_h o_h sum_j softmax_j(s q_t^h . k_j^h + bias_h(t - j)) v_j^h, over j <= t."""
        B, T, D = x_BTD.shape
        H, dtype = self.config.heads, x_BTD.dtype
        s = self.config.logit_scale / (D // H)
        matrices = [s * block.q, block.k, block.v] if self.config.logit_scale > 0 else [block.v]
        parts_BTX = F.linear(x_BTD, torch.cat([W.to(dtype) for W in matrices]))
        parts_BXTE = parts_BTX.view(B, T, -1, D // H).transpose(1, 2)  # X: heads of q, of k and of v, or of v alone
        t = torch.arange(T, device=x_BTD.device)
        distance_TT = t[:, None] - t
        bias_HTT = torch.zeros(1, T, T, device=x_BTD.device)
        if self.config.positions == "bias":
            bias_HTT = block.bias_HT[:, distance_TT.clamp(min=0)]
        bias_HTT = bias_HTT.masked_fill(distance_TT < 0, -math.inf)
        if self.config.logit_scale > 0:
            qk_BXTE, v_BHTE = parts_BXTE.split([2 * H, H], 1)
            q_BHTE, k_BHTE = (rotate(qk_BXTE) if self.config.positions == "rope" else qk_BXTE).split(H, 1)
            # (at this length plain products are faster on a CPU than scaled_dot_product_attention: 306 and 420 ms a step)
            y_BHTE = (q_BHTE @ k_BHTE.mT).add_(bias_HTT.to(dtype)).softmax(-1) @ v_BHTE
        else:  # the same pattern for all windows: one large product
            y_HTX = bias_HTT.softmax(-1).to(dtype) @ parts_BXTE.permute(1, 2, 0, 3).reshape(H, T, -1)
            y_BHTE = y_HTX.view(H, T, B, D // H).permute(2, 0, 1, 3)
        return F.linear(y_BHTE.transpose(1, 2).reshape(B, T, D), (self.attention_scale * block.o).to(dtype))

    def mlp(self, block, x_BTD):
        """w_out maxmin(w_in x), or w_out gelu(w_in x) / 1.1289 with GeLU in its tanh form."""
        h_BTX, w_out = F.linear(x_BTD, block.w_in.to(x_BTD.dtype)), block.w_out
        if self.config.activation == "gelu":
            # (bfloat16 cannot tell GeLU's two forms apart, 5e-4, and a CPU is five times faster at the exact one)
            form = "none" if x_BTD.dtype == torch.bfloat16 else "tanh"
            h_BTX, w_out = F.gelu(h_BTX, approximate=form), w_out / GELU_SCALE
        else:
            h_BTX = maxmin(h_BTX)
        return F.linear(h_BTX, w_out.to(x_BTD.dtype))

    def body(self, x_BTD):
        """The stream after the last block, from embedded tokens: where the certificate speaks of."""
        for block in self.blocks:
            x_BTD = torch.lerp(x_BTD, self.attention(block, x_BTD), self.mix)
            x_BTD = torch.lerp(x_BTD, self.mlp(block, x_BTD), self.mix)
        return x_BTD

    def forward(self, tokens_BT, dtype=torch.float32):
        """Logits (B, T, V) in float32 or float64, with everything before the head computed in `dtype`."""
        x_BTD = self.body(F.embedding(tokens_BT, self.embedding_VD.to(dtype)))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return F.linear(x_BTD.to(wide), self.config.final_scale * self.head_VD.to(wide))


@torch.no_grad()
def generate(model, prompt, length, temperature, seed, dtype):
    """Yield `length` characters that follow the prompt, each seeing the seq_len characters before it."""
    generator = torch.Generator().manual_seed(seed)
    device = model.head_VD.device
    tokens = encode(prompt, model.vocabulary).tolist()
    for _ in range(length):
        window = torch.tensor([tokens[-model.config.seq_len:]], device=device)
        logits_V = model(window, dtype)[0, -1].cpu().double() * model.config.loss_temperature / temperature
        tokens.append(torch.multinomial(logits_V.softmax(0), 1, generator=generator).item())
        yield model.vocabulary[tokens[-1]]


# ======================================================================================================================
# CERTIFICATE: how far the logits can move when every token's embedding moves, from the weights alone
# ======================================================================================================================
# A sequence is measured by its largest token, max_t rms(x_t), so bounds do not depend on its length. Attention has no
# bound on all of space (its pattern moves the more, the larger the tokens are), so everything is said inside a ball:
# rms(x_t) <= R for every token, which the radius below keeps track of. The ball is convex: bounding the derivative
# bounds the differences. sigma(.) is the largest singular value, r = R sqrt(D) the l2 norm of a token, C_h = o_h v_h
# (D, D) what head h does to a token it looks at: out_t = beta sum_h C_h sum_j P^h_tj x_j. Let every token move by
# ||dx_t|| <= 1.
#   1. Head h moves by C_h (average of moved tokens) + C_h (moved pattern applied to tokens): C_h a_h and C_h u_h.
#      ||a_h|| <= 1. And ||u_h|| <= e_h r if the logits of a row move by at most e_h: the derivative of softmax takes a
#      change of at most e in each logit to a change of the row of at most e in l1 (the largest such change, over sets of
#      probability p, is 4 p (1 - p) e <= e).
#   2. A logit of head h, s q.k, moves by e_h <= s (||dq_h|| sigma(k_h) r + ||q_h|| sigma(k_h)), because keys come
#      from any token, of norm at most r and movement at most 1. Rotation (RoPE) changes no norm; a bias that depends on
#      positions only does not move.
#   3. Heads add up. For any t_h > 0, sum_h C_h u_h = [C_1/t_1 ... C_H/t_H] (t_1 u_1, ..., t_H u_H), so
#          ||sum_h C_h u_h|| <= sigma([C_h / t_h]) sqrt(sum_h t_h^2 ||u_h||^2),   and for a_h likewise.
#   4. All queries of a token come from the *same* vector and share its energy: with Q~ = q whose rows of head h are
#      multiplied by t_h sigma(k_h),  sqrt(sum t_h^2 e_h^2) <= s (r ||Q~ dx_t|| + ||Q~ x_t||) <= 2 s r sigma(Q~).
#   5. So the derivative is at most value + pattern R^2, both in RMS->RMS:
#          value   = beta min( min_t sigma([C_h/t_h]) ||t||,  sigma(o) sqrt(sum_h sigma(v_h)^2),  sum_h sigma(C_h) )
#          pattern = beta 2 s D min( min_t sigma([C_h/t_h]) sigma(Q~),  sigma(o) sigma(Q~ for t_h = sigma(v_h)) ),
#      the terms with sigma(o) because sum_h o_h (v_h u_h) is o applied to the heads side by side.
#      t is free; it is chosen by trying sigma(v_h), sqrt(sigma(C_h)), 1, and walking from the best of them.
#      A single head gives the paper's formula. For H heads that formula, with the norms of q, k, v, o as wholes, is too
#      small by up to sqrt(H) in the value and H in the pattern (reference_formula below, and the test that exceeds it).
#   6. The output of attention is at most value * R: it averages tokens of norm R in the place of 1.
#   7. MLP, GeLU: slopes in [1 - g, g], |gelu(z)| <= |z|: derivative <= g/1.1289 sigma(w_out) sigma(w_in), output <=
#      sigma(w_out) sigma(w_in) R / 1.1289. MaxMin keeps lengths and is 1-Lipschitz: sigma(w_out) sigma(w_in) for both.
#   8. Residual: R <- (1 - a) R + a gain R, and the constant is multiplied by (1 - a) + a derivative.
#      For the MLP the stream can be taken in: GeLU's slopes are 1/2 +- (g - 1/2), so the derivative of the sum is within
#          sigma((1 - a) I + a/(2 * 1.1289) w_out w_in) + a (g - 1/2)/1.1289 sigma(w_out) sigma(w_in).
#      A pair of MaxMin stays (derivative I = M + N) or swaps (M - N), with M = [[1,1],[1,1]]/2 and N = I - M; M + e N
#      with -1 <= e <= 1 covers both: sigma((1 - a) I + a w_out M w_in) + a sigma(w_out N) sigma(N w_in). The smaller one counts.
#   9. The head's RMS->RMS norm, times final_scale, ends it. Start: R = the largest RMS of an embedding (+ rho).
def certificate(model, rho=0.0, search=0):
    """Certified constants of the map from embedded tokens to logits, exact singular values in float64, rounded up.

    rho      how far (RMS) the embeddings may be from those of the table
    search   rounds of improvement of the heads' weights t (8 H eigenvalue problems each; any t is valid)
    Returns dict: rows, one per block (radius R at its start, and after its attention, value and pattern terms, gains,
    factors), body_log10 (embeddings to stream), log10 (to logits), simple_log10 (the same without searching, with whole
    norms of o and without the residual's tightening), reference_log10 (the formula of the paper's code, NOT a bound),
    radius at the end, norms {role: largest RMS->RMS norm}. Maps max-token RMS to max-token RMS.
    """
    model = copy.deepcopy(model).cpu().double()
    if not all(p.isfinite().all() for p in model.parameters()):
        raise Refusal("the model has weights that are not finite, so there is nothing to certify")
    a, up = model.mix, 1 + 1e-9
    R = R_simple = R_reference = model.embedding_VD.square().mean(1).sqrt().max().item() * up + rho
    body = simple = reference = 0.0  # log10
    rows = []
    for block in model.blocks:
        row = dict(radius=R, **attention_terms(model, block, R, search))
        row["attention"] = (1 - a) + a * (row["value"] + row["pattern"] * R * R)
        R_middle = R * ((1 - a) + a * row["value"]) * up
        row["radius_mlp"] = R_middle
        row.update(mlp_terms(model, block))
        body += log10(row["attention"] * up) + log10(row["mlp"] * up)
        R = R_middle * ((1 - a) + a * row["mlp_gain"]) * up

        attention = (1 - a) + a * (row["value_simple"] + row["pattern_simple"] * R_simple * R_simple)
        mlp = (1 - a) + a * row["mlp_derivative"]
        simple += log10(attention) + log10(mlp)
        R_simple *= ((1 - a) + a * row["value_simple"]) * ((1 - a) + a * row["mlp_gain"])
        derivative, gain, mlp = reference_formula(model, block, R_reference)
        reference += log10((1 - a) + a * derivative) + log10((1 - a) + a * mlp)
        R_reference *= ((1 - a) + a * gain) * ((1 - a) + a * mlp)
        rows.append(row)
    norms = {}
    for role, W in model.matrices():
        norms[role] = max(norms.get(role, 0.0), exact_norm(W).item())
    norms["embedding"] = model.embedding_VD.square().mean(1).sqrt().max().item()
    head = log10(norms["head"] * model.config.final_scale)
    return dict(rows=rows, body_log10=body, log10=body + head, simple_log10=simple + head,
                reference_log10=reference + head, radius=R, norms=norms)


def sigma(W):
    """Largest singular value, float64, of a matrix or each of a stack."""
    return torch.linalg.matrix_norm(W, ord=2)


@torch.no_grad()
def attention_terms(model, block, R, search=0):
    """value and pattern of step 5 (the derivative is at most value + pattern R^2), and their simple forms."""
    H, D, beta = model.config.heads, model.config.width, model.attention_scale
    v_HED, o_DHE = block.v.view(H, D // H, D), block.o.view(D, H, D // H)
    C_HDD = o_DHE.transpose(0, 1) @ v_HED
    CC_HDD = C_HDD @ C_HDD.mT
    content = hasattr(block, "q")
    if content:
        q_HED, k_H = block.q.view(H, D // H, D), sigma(block.k.view(H, D // H, D))
        QQ_HDD = (q_HED.mT @ q_HED) * k_H[:, None, None].square()

    def bracket(t_H):  # sigma([C_h / t_h])
        return torch.linalg.eigvalsh((CC_HDD / t_H[:, None, None].square()).sum(0))[-1].clamp(min=0).sqrt().item()

    def value(t_H):
        return bracket(t_H) * t_H.norm().item()

    def pattern(t_H):  # (a scale of t cancels)
        shared = torch.linalg.eigvalsh((QQ_HDD * t_H[:, None, None].square()).sum(0))[-1].clamp(min=0).sqrt().item()
        return 2 * model.config.logit_scale / (D // H) * D * bracket(t_H) * shared

    v_H, C_H = sigma(v_HED), sigma(C_HDD)
    tiny = 1e-9 * (1 + v_H.max())
    starts = [v_H + tiny, (C_H + tiny).sqrt(), torch.ones_like(C_H)]

    def smallest(f):
        best, t_H = min(((f(t), t) for t in starts), key=lambda pair: pair[0])
        step = 0.3
        for _ in range(search):
            before = best
            for h in range(H):
                for factor in (1 + step, 1 / (1 + step)):
                    trial = t_H.clone()
                    trial[h] *= factor
                    if f(trial) < best:
                        best, t_H = f(trial), trial
            step = step if best < before * (1 - 1e-3) else step / 2
        return best

    # With t_h = sigma(v_h), ||v_h a_h / t_h|| <= ||a_h|| and the rows o_h need no bracket of their own.
    value_simple = sigma(block.o).item() * v_H.norm().item()
    terms = dict(value=beta * min(smallest(value), value_simple, C_H.sum().item()) * (1 + 1e-9),
                 value_simple=beta * value_simple, pattern=0.0, pattern_simple=0.0)
    if content:
        shared = sigma((v_H * k_H)[:, None, None].mul(q_HED).reshape(D, D)).item()
        simple = 2 * model.config.logit_scale / (D // H) * D * sigma(block.o).item() * shared
        terms.update(pattern=beta * min(smallest(pattern), simple) * (1 + 1e-9), pattern_simple=beta * simple)
    return terms


@torch.no_grad()
def mlp_terms(model, block):
    """mlp_derivative and mlp_gain of step 7, and mlp, the factor with the residual, of step 8."""
    a, w_in, w_out = model.mix, block.w_in, block.w_out
    norms = (sigma(w_in) * sigma(w_out)).item()
    eye = torch.eye(len(w_out), dtype=w_out.dtype)
    if model.config.activation == "gelu":
        derivative, gain = GELU_SLOPE / GELU_SCALE * norms, norms / GELU_SCALE
        within = sigma((1 - a) * eye + a / (2 * GELU_SCALE) * w_out @ w_in) + a * (GELU_SLOPE - 0.5) / GELU_SCALE * norms
    else:
        derivative = gain = norms
        (in_1, in_2), (out_1, out_2) = w_in.chunk(2, 0), w_out.chunk(2, 1)
        M = (out_1 + out_2) @ (in_1 + in_2) / 2  # w_out M w_in, and w_out N, N w_in in orthonormal coordinates:
        within = sigma((1 - a) * eye + a * M) + a * sigma(out_1 - out_2) * sigma(in_1 - in_2) / 2
    return dict(mlp_derivative=derivative, mlp_gain=gain, mlp=min((1 - a) + a * derivative, within.item()))


@torch.no_grad()
def reference_formula(model, block, R):
    """(attention's derivative, its gain, the MLP's of both) as the paper's code has them: whole matrices, no heads.

    True for one head, false for several (and the MLP's divides by 1.1289 once too often). For comparison only.
    """
    D, H, c = model.config.width, model.config.heads, model.config.logit_scale
    gain = model.attention_scale * (sigma(block.o) * sigma(block.v)).item()
    pattern = 2 * c * (sigma(block.q) * sigma(block.k)).item() * R * R if hasattr(block, "q") else 0.0
    mlp = (sigma(block.w_in) * sigma(block.w_out)).item() / (GELU_SCALE if model.config.activation == "gelu" else 1)
    return gain * (1 + pattern), gain, mlp


@torch.no_grad()
def token_margins(model, tokens_N):
    """What rho L_body may reach before each prediction could change, float64, in order of `windows`; < 0 where it is wrong.

    The difference of two logits is u_y - u_j, two rows of the head, applied to the stream, whose constant is that of the
    body: the prediction y stands if f_y - f_j > rho sqrt(D) L_body ||u_y - u_j|| for all j.
    """
    model = copy.deepcopy(model).cpu().double()
    head_VD, D = model.config.final_scale * model.head_VD, model.config.width
    apart_VV = torch.cdist(head_VD, head_VD, compute_mode="donot_use_mm_for_euclid_dist") * (1 + 1e-9)
    stands_up_to = []
    for x_BT, y_BT in windows(tokens_N, model.config.seq_len):
        logits_NV, y_N = model(x_BT, torch.float64).flatten(0, 1), y_BT.flatten()
        margin_NV = logits_NV.gather(1, y_N[:, None]) - logits_NV
        ratio_NV = margin_NV / (D**0.5 * apart_VV[y_N]).clamp(min=1e-300)
        stands_up_to.append(ratio_NV.scatter(1, y_N[:, None], math.inf).amin(1))
    return torch.cat(stands_up_to)


def certified_token_accuracy(model, tokens_N, rhos=RHOS):
    """{rho: share of positions predicted right, and so for every change of the embeddings of RMS <= rho at every token}.

    No margin exceeds ||u_y - u_j|| times the stream's length, so where rho L_body is its radius or more, none stands.
    """
    bounds = {rho: certificate(model, rho, search=5) for rho in rhos}
    limit = {rho: 10 ** min(300.0, bound["body_log10"]) * rho for rho, bound in bounds.items()}
    if all(limit[rho] >= bounds[rho]["radius"] for rho in rhos):
        return dict.fromkeys(rhos, 0.0)
    stands_up_to_N = token_margins(model, tokens_N)
    return {rho: (stands_up_to_N > limit[rho]).double().mean().item() for rho in rhos}


# ======================================================================================================================
# TRAINING
# ======================================================================================================================
def make_optimizers(config, model):
    """[(optimizer, its learning rate at the start)]: one for the matrices, one for the embedding and the position bias."""
    w_max = limits(config)
    biases = [block.bias_HT for block in model.blocks if config.positions == "bias"]
    if config.optimizer == "muon":
        groups = [dict(params=[W for role, W in model.matrices() if w_max[role] == w], w_max=w)
                  for w in dict.fromkeys(w_max.values()) if any(w_max[role] == w for role, _ in model.matrices())]
        matrices = Muon(groups, momentum=config.momentum, constraint=find_constraint(config.constraint),
                        every=config.constrain_every, dtype=compute_dtype(config, model.head_VD.device))
    else:
        matrices = torch.optim.AdamW([W for _, W in model.matrices()], betas=(config.momentum, 0.95),
                                     weight_decay=config.adamw_wd)
    optimizers = [(matrices, config.lr), (torch.optim.Adam([model.embedding_VD], betas=(0.9, 0.95)), config.embed_lr)]
    return optimizers + ([(torch.optim.Adam(biases, betas=(0.9, 0.95)), config.bias_lr)] if biases else [])


def train_step(config, model, optimizers, x_BT, y_BT, step, dtype):
    """One step; returns the loss (a tensor)."""
    fraction = 1 - step / config.steps
    loss = F.cross_entropy(config.loss_temperature * model(x_BT, dtype).flatten(0, 1), y_BT.flatten())
    loss.backward()
    for optimizer, lr in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * fraction
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if config.optimizer == "adamw" and config.constraint != "none":
        for role, W in model.matrices():  # (Muon does it by itself)
            W.data.copy_(after_unknown_step(find_constraint(config.constraint), W, limits(config)[role], config.lr * fraction))
    model.shrink_embedding()
    return loss.detach()


def windows(tokens_N, T, batch=32):
    """Batches (x_BT, y_BT) of windows side by side that cover a text: each token but the first is predicted once."""
    whole = (len(tokens_N) - 1) // T * T
    x_WT, y_WT = tokens_N[:whole].view(-1, T), tokens_N[1:whole + 1].view(-1, T)
    yield from zip(x_WT.split(batch), y_WT.split(batch))
    if whole + 1 < len(tokens_N):
        yield tokens_N[None, whole:-1], tokens_N[None, whole + 1:]


@torch.no_grad()
def evaluate(model, batches, dtype=torch.float32):
    """(mean cross-entropy of the logits, the same at the loss temperature, accuracy) over batches of windows."""
    device, sums, count = model.head_VD.device, torch.zeros(3, dtype=torch.float64), 0
    for x_BT, y_BT in batches:
        logits_NV, y_N = model(x_BT.to(device), dtype).flatten(0, 1), y_BT.to(device).flatten()
        hot = model.config.loss_temperature
        loss = F.cross_entropy(logits_NV, y_N, reduction="sum").item()
        loss_hot = F.cross_entropy(hot * logits_NV, y_N, reduction="sum").item() if hot != 1 else loss
        sums += torch.tensor([loss, loss_hot, (logits_NV.argmax(1) == y_N).sum().item()])
        count += len(y_N)
    return tuple((sums / count).tolist())


def paper_protocol(model, tokens_N, dtype):
    """Loss and accuracy as the paper's code measures them: 20 batches of 512 windows that start one character apart.

    That is the first 20 * 512 + T characters of the validation text, each counted up to T times.
    """
    T = model.config.seq_len
    window_WT = tokens_N.unfold(0, T + 1, 1)[:20 * 512]
    return evaluate(model, ((w[:, :-1], w[:, 1:]) for w in window_WT.split(32)), dtype)


def first_not_finite(model):
    """In words, the first matrix that is not finite."""
    for name, W in model.named_parameters():
        if not W.isfinite().all():
            return f"{name} {tuple(W.shape)} is not finite"
    return "the logits overflow though all weights are finite"


def train(config, model, optimizers, train_N, validation_N, data_name, out, progress):
    """Train from progress["step"] to the end, with `evals` evaluations and checkpoints on the way."""
    from tqdm import tqdm

    device, dtype = model.head_VD.device, compute_dtype(config, model.head_VD.device)
    eval_steps = {math.ceil(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    bar = tqdm(total=config.steps, initial=progress["step"], unit="step", disable=not sys.stderr.isatty(), leave=False)
    losses, began = [], time.perf_counter()
    for step in range(progress["step"], config.steps):
        x_BT, y_BT = batch_of(train_N, step, config)
        losses.append(train_step(config, model, optimizers, x_BT.to(device), y_BT.to(device), step, dtype))
        done = step + 1
        if done % 10 == 0 or done in eval_steps:  # (not at every step: on a GPU that would wait for it)
            if not (torch.stack(losses[-10:]).isfinite().all() and all(W.isfinite().all() for W in model.parameters())):
                raise Diverged(f"step {done}: training has diverged, as {first_not_finite(model)}; the last good checkpoint, "
                              f"if any, is in {out}; try a smaller --lr than {config.lr:g}")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update(done - bar.n)
        if done in eval_steps:
            progress["seconds"] += time.perf_counter() - began
            progress["step"] = done
            val_loss, hot_loss, val_accuracy = evaluate(model, windows(validation_N, config.seq_len))
            bound, ms = certificate(model), 1000 * progress["seconds"] / done
            record = dict(step=done, train_loss=torch.stack(losses).mean().item(), val_loss=val_loss,
                          val_loss_at_temperature=hot_loss, val_accuracy=val_accuracy, norms=bound["norms"],
                          max_weight_norm=max_weight_norm(bound), lipschitz_log10=bound["log10"], ms_per_step=ms)
            with open(out / "log.jsonl", "a") as f:
                f.write(as_json(record) + "\n")
            save_checkpoint(out, config, model, optimizers, progress, data_name, len(train_N))
            bar.write(f"step {done:5d}/{config.steps}  train loss {record['train_loss']:.3f}  validation loss {hot_loss:.3f} "
                      f" accuracy {100 * val_accuracy:5.2f} %  largest norm {max_weight_norm(bound):.3f}  bound (max-token "
                      f"RMS) {power(bound['log10'])}  {ms:.0f} ms/step  {ms / 1000 * (config.steps - done):.0f} s left",
                      file=sys.stdout)
            sys.stdout.flush()
            losses, began = [], time.perf_counter()
    bar.close()


def max_weight_norm(bound):
    return max(norm for role, norm in bound["norms"].items() if role != "embedding")


# ======================================================================================================================
# MAIN: devices, run folders, checkpoints, the report
# ======================================================================================================================
def log10(x):
    return math.log10(x) if x > 0 else -math.inf


def power(exponent):
    """10^exponent, to read, also where it overflows; rounded up, as it is a bound."""
    if not -300 < exponent < 6:
        return f"10^{math.ceil(exponent * 10) / 10:.1f}" if math.isfinite(exponent) else "0" if exponent < 0 else "infinite"
    unit = 10.0 ** (math.floor(exponent) - 3)
    return f"{math.ceil(10**exponent / unit) * unit:.4g}"


def as_json(record, **kwargs):
    """JSON has no infinity: the logarithm of a constant of 0, or of one that overflows, becomes null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}, **kwargs)


def keep_memory():
    """Have glibc keep freed blocks: by default every large tensor is mapped and page-faulted in anew."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass  # another C library: nothing lost but speed


def choose_device(config):
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise Refusal(f"--device {config.device}: cannot be used here ({reason}); try auto") from problem


def compute_dtype(config, device):
    """Precision of forward and backward. bfloat16 has the exponent range of float32, so nothing needs rescaling."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return fast_dtype(device)


def write_atomically(path, data: bytes):
    """All of it or none: a temporary file, flushed to the disk, takes the place of the old one."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(out, config, model, optimizers, progress, data_name, tokens):
    """All a run needs to go on. Data order is a function of seed and step: there is no other state."""
    buffer = io.BytesIO()
    torch.save(dict(script=SCRIPT, config=dataclasses.asdict(config), step=progress["step"], data=data_name,
                    tokens=tokens, vocabulary=model.vocabulary, training_seconds=progress["seconds"],
                    model=model.state_dict(), optimizers=[optimizer.state_dict() for optimizer, _ in optimizers]), buffer)
    write_atomically(out / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(folder):
    """The dictionary saved above: tensors, numbers and text only (weights_only), so a hostile file cannot run code."""
    path = Path(folder) / "checkpoint.pt" if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise Refusal(f"{path}: no such checkpoint; give a run folder that has a checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # truncated, no checkpoint at all, or with code in it
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise Refusal(f"{path}: cannot be read as a checkpoint ({type(problem).__name__}: {reason[:120]}); it is "
                      "damaged, foreign or unsafe") from problem
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        made_by = state.get("script") if isinstance(state, dict) else None
        raise Refusal(f"{path}: is a checkpoint of {made_by or 'something else'}; needed is one of {SCRIPT}.py")
    return state


def model_from_checkpoint(state):
    """(config, model) of a checkpoint; a Refusal if they do not fit each other."""
    try:
        config = Config(**state["config"])
        check(config)
        model = Transformer(config, state["vocabulary"])
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as problem:
        reason = str(problem).splitlines()[0][:160]
        raise Refusal(f"the checkpoint's weights do not fit its configuration ({reason})") from problem
    return config, model


# ---- the authors' published checkpoints: .npz files of pickled dictionaries -------------------------------------------
class Inert:
    """Stands for anything a file refers to that is not numpy's: it can be mentioned, and never does anything."""

    def __init__(self, *args, **kwargs):
        raise pickle.UnpicklingError("the file wants to call code")


class NumpyOnly(pickle.Unpickler):
    """Builds arrays and plain Python values. Every other name becomes Inert, and calling it ends the loading."""

    def find_class(self, module, name):
        if (module.split(".")[0], name) in (("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        return type(name, (Inert,), {})


def load_published(path):
    """(config, model) of a checkpoint of the reference: {index: matrix} in the order embedding (D, V), then for each
    block v, q, k, o, in, out, last the head."""
    def entry(name):
        with archive.open(name + ".npy") as f:
            version = np.lib.format.read_magic(f)
            (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(f)
            return NumpyOnly(f).load().item()

    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > 2**31:
                raise ValueError("more than 2 GB when unpacked")
            args, stored = entry("args"), entry("weights_checkpoint_0")
        weights = [torch.from_numpy(np.array(stored[i], dtype=np.float32)) for i in range(len(stored))]
        weights = [W.reshape(W.shape[-2:]) for W in weights]
        config = Config(preset="paper", width=int(args["d_embed"]), blocks=int(args["num_blocks"]), heads=int(args["num_heads"]),
                        hidden=len(weights[5]), logit_scale=float(args["softmax_scale"]),
                        residual_scale=float(args["residual_scale"]), final_scale=float(args.get("final_scale", 1)), w_max=repr(1e9))
        check(config)
        model = Transformer(config, VOCABULARY)
        names = [f"blocks.{i}.{name}" for i in range(config.blocks) for name in ("v", "q", "k", "o", "w_in", "w_out")]
        weights[0] = weights[0].T.contiguous()
        model.load_state_dict(dict(zip(["embedding_VD", *names, "head_VD"], weights, strict=True)))
    except Refusal:
        raise
    except Exception as problem:  # a file may be wrong in dozens of ways
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise Refusal(f"--load {path}: is no checkpoint in the published form ({type(problem).__name__}: {reason[:160]}); "
                      "nothing in it was run") from problem
    return config, model


VOCABULARY = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # of tinyshakespeare, sorted


# ---- run folders and the report --------------------------------------------------------------------------------------
def new_run_folder(config):
    """A folder that was empty or not there. Nothing is ever overwritten."""
    name = f"{SCRIPT}_{Path(config.load).stem}" if config.load else f"{SCRIPT}_{config.preset}_seed{config.seed}"
    out, number = Path(config.out) if config.out else Path("runs") / name, 1
    while not config.out and out.exists():
        number += 1
        out = out.with_name(f"{name}_{number}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refusal(f"--out {out}: exists and is not empty; choose another" +
                      f", or --resume {out} to go on with it" * (out / "checkpoint.pt").is_file())
    out.mkdir(parents=True, exist_ok=True)
    return out


def report(config, model, out, data_name, validation_N, options, brief=False):
    """The tables, the picture, a sample and summary.json at the end of a run (or of --load). brief: no sample, one
    radius, and no paper's protocol, which reads each character 256 times."""
    device = model.head_VD.device
    dtype = compute_dtype(config, device)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] if (out / "log.jsonl").exists() else []
    val_loss, hot_loss, val_accuracy = ([log[-1][key] for key in ("val_loss", "val_loss_at_temperature", "val_accuracy")] if log
                                        else evaluate(model, windows(validation_N, config.seq_len)))
    if not brief:
        print("Now the paper's protocol, the best bound and what it certifies: a minute or two ...", flush=True)
    _, protocol_loss, protocol_accuracy = (math.nan,) * 3 if brief else paper_protocol(model, validation_N, dtype)
    bound = certificate(model, search=20)
    certified = certified_token_accuracy(model, validation_N, (float(CERTIFIED[1]),) if brief else RHOS)
    seconds = log[-1]["ms_per_step"] * config.steps / 1000 if log else 0.0
    summary = dict(
        script=SCRIPT, preset=config.preset, params=sum(p.numel() for p in model.parameters()),
        steps=config.steps if log else 0, val_loss=val_loss, val_loss_at_temperature=hot_loss, val_accuracy=val_accuracy,
        paper_protocol_loss=protocol_loss, paper_protocol_accuracy=protocol_accuracy,
        lipschitz_log10=bound["log10"], lipschitz_product_log10=bound["simple_log10"],
        reference_formula_log10=bound["reference_log10"],
        lipschitz_norm="max-token RMS->max-token RMS, embeddings to logits, inside the ball",
        certified_token_accuracy={str(rho): share for rho, share in certified.items()},
        max_weight_norm=max_weight_norm(bound), norms=bound["norms"],
        w_max=limits(config) if config.constraint != "none" and log else None, loss_temperature=config.loss_temperature,
        train_seconds=seconds, ms_per_step=log[-1]["ms_per_step"] if log else None,
        data=data_name, device=str(device), dtype=str(dtype).removeprefix("torch."), seed=config.seed,
        torch=torch.__version__)

    title = f"{config.preset}: {config.optimizer} + {config.constraint}, {config.steps} steps, seed {config.seed}" if log else config.load
    print(f"\n{title}, data: {data_name}")
    at = f"   ({hot_loss:.3f} at the loss temperature, {config.loss_temperature:g})" * (config.loss_temperature != 1)
    print(f"  whole {'held-out' if config.holdout else 'validation'} text    accuracy {100 * val_accuracy:.2f} %   "
          f"cross-entropy of the logits {val_loss:.3f}{at}")
    print(f"  the paper's protocol     accuracy {100 * protocol_accuracy:.2f} %   cross-entropy {protocol_loss:.3f} (the first "
          f"{20 * 512 + config.seq_len:,} characters, windows at stride 1)")
    print(f"  certified token accuracy at rho (RMS, every embedding)   "
          + "   ".join(f"{rho:g}: {100 * share:.2f} %" for rho, share in certified.items()))
    print("  largest norm (RMS->RMS)  " + "   ".join(f"{role} {norm:.4g}" for role, norm in bound["norms"].items()))
    print("  certificate, max-token RMS, inside the ball of radius R; factors include the residual (a = "
          f"{model.mix:.3g})\n    block        R   value   pattern*R^2   attention        R   MLP alone       MLP")
    for i, row in enumerate(bound["rows"]):
        print(f"    {i + 1:5d} {row['radius']:8.3g} {row['value']:7.3g} {row['pattern'] * row['radius'] * row['radius']:13.3g} "
              f"{row['attention']:11.4g} {row['radius_mlp']:8.3g} {row['mlp_derivative']:11.3g} {row['mlp']:9.4g}")
    print(f"    body {power(bound['body_log10'])} x head {bound['norms']['head'] * config.final_scale:.4g} = LIPSCHITZ CONSTANT "
          f"{power(bound['log10'])}   (embeddings to logits; simplest form {power(bound['simple_log10'])})")
    print(f"    what the formula of the paper's code gives, which misses heads: {power(bound['reference_log10'])}")
    if data_name.startswith("stand-in"):
        print("  data: stand-in. These figures are not about Shakespeare.")
    draw(config, model, out, log, bound, certified, title)
    write_atomically(out / "summary.json", (as_json(summary, indent=1) + "\n").encode())
    if brief:
        return
    print(f"\nA sample at temperature {options.temperature:g}:\n{'-' * 80}")
    sample(config, model, options)
    print(f"{'-' * 80}\nPicture, log and checkpoint are in {out}. Go on: python {SCRIPT}.py --sample {out} --prompt \"ROMEO:\"")


def sample(config, model, options):
    """Stream a sample to the terminal."""
    dtype = compute_dtype(config, model.head_VD.device)
    prompt = options.prompt if options.prompt != "\n" or "\n" in model.vocabulary else model.vocabulary[0]
    encode(prompt, model.vocabulary)  # complains before anything is printed
    print(prompt.lstrip("\n"), end="")
    for character in generate(model, prompt, options.length, options.temperature, options.seed, dtype):
        print(character, end="", flush=True)
    print()


def draw(config, model, out, log, bound, certified, title):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(f"{SCRIPT}, {title}")
    steps = [r["step"] for r in log]
    a.plot(steps, [r["val_loss_at_temperature"] for r in log], "o-", label="validation")
    a.plot(steps, [r["train_loss"] for r in log], "o-", label="training, since the last point")
    a.set(title="loss (at the loss temperature)", xlabel="step", ylabel="nats a character")
    a.legend()
    for role in bound["norms"]:
        b.plot(steps, [r["norms"][role] for r in log], "o-", label=role)
    if config.constraint != "none" and log:
        for w in set(limits(config).values()):
            b.axhline(w, color="grey", linestyle=":")
    b.set(title="weight norms, largest of each role (dotted: limits)", xlabel="step", ylabel="RMS->RMS norm", ylim=(0, None))
    b.legend()
    for role, W in [*model.blocks[-1].matrices(), ("head", model.head_VD)]:
        s = singular_values(W)
        c.plot(np.linspace(0, 1, len(s)), s, label=role)
    c.set(title="singular values, last block and head", xlabel="rank, as a share", ylabel="RMS->RMS", ylim=(0, None))
    c.legend()
    d.semilogx(list(certified), [100 * share for share in certified.values()], "o-")
    d.set(title=f"certified token accuracy (constant {power(bound['log10'])})", xlabel="rho (RMS, every embedding)", ylabel="%",
          ylim=(0, None))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomically(out / "curves.png", buffer.getvalue())


def resumed(config):
    """(run folder, checkpoint, configuration) of a run that was stopped."""
    out, state = Path(config.resume), load_checkpoint(config.resume)
    if not out.is_dir():
        raise Refusal(f"--resume {out}: is a file; give the run folder that holds it")
    if (out / "summary.json").exists():
        raise Refusal(f"--resume {out}: that run is finished, see its summary.json; start another with --out")
    own, _ = model_from_checkpoint(state)
    if own.load:
        raise Refusal(f"--resume {out}: holds a published checkpoint, which is not trained on; --load it again")
    if ":" in own.constraint and config.constraint != own.constraint:  # (a checkpoint must not have code run by itself)
        raise Refusal(f"--resume {out}: was trained with code of yours; say that you trust it: --constraint {own.constraint}")
    own.device = config.device
    own.data = config.data if config.data != "auto" else own.data
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)  # (the last may have been cut off with the run)
    log = [line.strip() for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
    write_atomically(out / "log.jsonl", "".join(line + "\n" for line in log).encode())
    return out, state, own


# ---- --compare: every optimizer with every constraint (a twin of mlp_cifar.py's) ---------------------------------------
# (optimizer, constraint): (learning rate, strengths). A strength is w_max, so for the decays the inverse of a weight decay.
# Learning rates: the best of two to four on held-out training text (--holdout), at the middle strength, one seed.
PAIRS = {
    ("muon", "none"): (0.2, (1,)), ("adamw", "none"): (0.012, (1,)),
    ("muon", "weight_decay"): (0.2, (1, 2, 4)), ("adamw", "weight_decay"): (0.012, (0.03, 0.1, 0.3)),
    ("muon", "spectral_weight_decay"): (0.2, (0.1, 0.3, 1)), ("adamw", "spectral_weight_decay"): (0.012, (0.01, 0.03, 0.1)),
    ("muon", "specnorm"): (0.2, (1, 2, 4)), ("adamw", "specnorm"): (0.0015, (1, 2, 4)),
    ("muon", "stiefel"): (0.2, (1, 2, 4)), ("adamw", "stiefel"): (0.024, (1, 2, 4)),
    ("muon", "hammer"): (0.1, (1, 2, 4)), ("adamw", "hammer"): (0.012, (1, 2, 4)),
    ("muon", "soft_cap"): (0.2, (1, 2, 4)), ("adamw", "soft_cap"): (0.012, (1, 2, 4)),
    ("muon", "hard_cap"): (0.2, (1, 2, 4)), ("adamw", "hard_cap"): (0.012, (1, 2, 4)),
}
BOUND, BOUND_NAME, BOUNDS = "lipschitz_log10", "max-token RMS, heads counted", (3, 6, 9, 12)  # where the table compares
CERTIFIED = ("certified_token_accuracy", "0.001", "rho 0.001")
COLUMNS = ("val_accuracy", "val_loss", "lipschitz_log10", "lipschitz_product_log10", "max_weight_norm", "ms_per_step")


def compare(config):
    """Train each point of PAIRS with each seed, in a folder of its own below --out, until all are there or the time is
    over; then a table, compare.csv and compare.png of all that are there."""
    base, began, trained, rows, missing = Path(config.out or f"runs/{SCRIPT}_compare"), time.perf_counter(), 0, [], 0
    if base.exists() and not (base / "compare.json").exists() and (not base.is_dir() or any(base.iterdir())):
        raise Refusal(f"--out {base}: exists and is no comparison; choose another")
    data = load_data(config)
    settings = dataclasses.asdict(dataclasses.replace(config, compare=False, minutes=0.0, seeds=1, out="", device="auto"))
    settings = json.dumps(dict(settings, data=data[-1]), indent=1) + "\n"
    if (base / "compare.json").exists() and (base / "compare.json").read_text() != settings:
        raise Refusal(f"--out {base}: holds a comparison with other settings (see compare.json there); choose another")
    base.mkdir(parents=True, exist_ok=True)
    write_atomically(base / "compare.json", settings.encode())
    points = [(seed, *pair, w, lr) for seed in range(config.seeds) for pair, (lr, strengths) in PAIRS.items() for w in strengths]
    for seed, optimizer, constraint, w, lr in points:
        out, spent = base / f"{optimizer}_{constraint}_{w:g}_seed{seed}", time.perf_counter() - began
        fresh = not (out / "summary.json").exists()
        if fresh and (missing or spent + spent / max(1, trained) > 60 * config.minutes):
            missing += 1
            continue
        if fresh:
            shutil.rmtree(out, ignore_errors=True)  # (what an interrupted run has left: less than a minute's work)
            point = dataclasses.replace(config, compare=False, optimizer=optimizer, constraint=constraint, w_max=str(w), lr=lr,
                                        seed=seed, out=str(out))
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    main(point, data)
            except Diverged as problem:
                write_atomically(out / "summary.json", (json.dumps(dict(diverged=str(problem))) + "\n").encode())
            trained += 1
        summary, row = json.loads((out / "summary.json").read_text()), dict(optimizer=optimizer, constraint=constraint, w_max=w, lr=lr, seed=seed)
        row.update({key: summary[key] for key in COLUMNS if key in summary})
        if "diverged" not in summary:
            row["certified"] = summary[CERTIFIED[0]][CERTIFIED[1]]
        rows.append(row)
        if fresh:
            print(f"{len(rows):3d}/{len(points)}  {optimizer:5} {constraint:21} w_max {w:<5g} seed {seed}  " + (
                "diverged" if "diverged" in summary else f"accuracy {100 * row['val_accuracy']:.2f} %  loss {row['val_loss']:.3f}  bound 10^"
                f"{row[BOUND] or -math.inf:.2f}  certified at {CERTIFIED[2]} {100 * row['certified']:.2f} %")
                + f"  {time.perf_counter() - began:.0f} s", flush=True)
    report_comparison(rows, base, data[-1])
    if missing:
        print(f"{missing} of {len(points)} runs are still to come: give the same command again.")


def accuracy_within(rows, bound_log10):
    """Accuracy reached at no more than this bound by runs of one pair and seed: linear in the bound's logarithm between two."""
    points = sorted((row[BOUND], row["val_accuracy"]) for row in rows if row.get(BOUND) is not None)
    x, y = zip(*points) if points else ((math.inf,), (0.0,))
    return float(np.interp(bound_log10, x, np.maximum.accumulate(y), left=math.nan))


def report_comparison(rows, base, data_name):
    """compare.csv, a line a run; compare.png; on the terminal each constraint's accuracy at equal bounds, Muon / AdamW."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def spread(values):
        values = [100 * v for v in values if not math.isnan(v)]
        return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "") if values else "-"

    with io.StringIO() as text:
        writer = csv.DictWriter(text, ["optimizer", "constraint", "w_max", "lr", "seed", *COLUMNS, "certified"])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(base / "compare.csv", text.getvalue().encode())
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    seeds, constraints = sorted({row["seed"] for row in rows}), list(dict.fromkeys(constraint for _, constraint in PAIRS))
    print(f"\naccuracy (%) at a bound ({BOUND_NAME}) of at most, Muon / AdamW; {len(seeds)} seed(s), data: {data_name}\n" + " " * 23
          + "".join(f"{f'10^{bound:g}':^27}" for bound in BOUNDS) + "best: accuracy at bound 10^, Muon / AdamW")
    for constraint in constraints:
        cells, best = [[] for _ in BOUNDS], []
        for optimizer, style in (("muon", "o-"), ("adamw", "x--")):
            mine = [row for row in rows if (row["optimizer"], row["constraint"]) == (optimizer, constraint)]
            by_seed = [[row for row in mine if row["seed"] == seed] for seed in seeds]
            by_seed = [curve for curve in by_seed if len(curve) == len(PAIRS.get((optimizer, constraint), (0, ()))[1])]  # (whole ones)
            for cell, bound in zip(cells, BOUNDS):
                cell.append(spread([accuracy_within(curve, bound) for curve in by_seed]))
            mine = [row for row in mine if row.get(BOUND) is not None]
            means = [{key: np.mean([row[key] for row in mine if row["w_max"] == w]) for key in ("val_accuracy", BOUND, "certified")}
                     for w in sorted({row["w_max"] for row in mine})]
            top = max(means, key=lambda point: point["val_accuracy"], default=None)
            best.append(f"{100 * top['val_accuracy']:.1f} at {top[BOUND]:.2f}" if top else "-")
            accuracy, color = [100 * point["val_accuracy"] for point in means], f"C{constraints.index(constraint)}"
            panels[0].plot([point[BOUND] for point in means], accuracy, style, color=color, label=f"{optimizer} {constraint}")
            panels[1].plot(accuracy, [100 * point["certified"] for point in means], style, color=color)
        print(f"  {constraint:21}" + "".join(f"{' / '.join(cell):^27}" for cell in cells) + " / ".join(best))
    panels[0].set(title=f"{SCRIPT}, data: {'/'.join(Path(data_name).parts[-2:])}", xlabel=f"log10 of the Lipschitz bound ({BOUND_NAME})", ylabel="accuracy (%)")
    panels[1].set(title=f"certified at {CERTIFIED[2]}", xlabel="accuracy (%)", ylabel="certified accuracy (%)")
    panels[0].legend(fontsize=6)
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=110)
        write_atomically(base / "compare.png", buffer.getvalue())
    plt.close(figure)
    print(f"Every run: {base / 'compare.csv'}; picture: {base / 'compare.png'}")


def main(options, data=None):
    """One training (or sample, or evaluation), or with --compare many; `data` as of load_data, where it is loaded already."""
    check(options)
    keep_memory()
    if options.compare:
        return compare(options)
    device = choose_device(options)
    if options.sample:
        config, model = model_from_checkpoint(load_checkpoint(options.sample))
        return sample(options, model.to(device), options)

    state, config = None, options
    if options.load:
        config, model = load_published(options.load)
        for name in ("load", "out", "seed", "data", "device", "dtype"):
            setattr(config, name, getattr(options, name))
    elif options.resume:
        out, state, config = resumed(options)
    try:
        find_constraint(config.constraint)
    except ValueError as problem:
        raise Refusal(f"--constraint {config.constraint}: {problem}") from problem
    train_N, validation_N, vocabulary, data_name = data or load_data(config)
    if options.load and vocabulary != model.vocabulary:
        raise Refusal(f"--load {options.load}: knows the {len(VOCABULARY)} characters of tinyshakespeare, and {data_name} has "
                      f"{len(vocabulary)}; give its text with --data FILE")
    if state and (state["tokens"] != len(train_N) or state["vocabulary"] != vocabulary):
        raise Refusal(f"--resume {out}: was trained on {state['tokens']} characters ({state['data']}), and this is "
                      f"{data_name} with {len(train_N)}; give the same with --data")
    encode(options.prompt.replace("\n", ""), vocabulary)
    if not state:
        out = new_run_folder(config)
        write_atomically(out / "config.json", (json.dumps(dataclasses.asdict(config), indent=1) + "\n").encode())
    if not options.load:
        model = model_from_checkpoint(state)[1] if state else Transformer(config, vocabulary)
    model.to(device)
    print(f"device {device}, computing in {compute_dtype(config, device)} with float32 weights, data: {data_name} "
          f"({len(train_N):,} characters to train, {len(validation_N):,} to validate, {len(vocabulary)} different), run folder "
          f"{out}", flush=True)
    if options.load:
        save_checkpoint(out, config, model, [], dict(step=0, seconds=0.0), data_name, len(train_N))
    else:
        optimizers = make_optimizers(config, model)
        if state:
            for (optimizer, _), saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
        progress = dict(step=state["step"], seconds=state["training_seconds"]) if state else dict(step=0, seconds=0.0)
        train(config, model, optimizers, train_N, validation_N, data_name, out, progress)
    report(config, model, out, data_name, validation_N, options, brief=data is not None)


if __name__ == "__main__":
    try:
        main(CONFIG)
    except Refusal as refusal:
        print(f"{SCRIPT}.py: {refusal}", file=sys.stderr)
        sys.exit(2)
    except OSError as problem:
        print(f"{SCRIPT}.py: {problem}; mend that and start again, or --resume from the last checkpoint", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{SCRIPT}.py: interrupted; --resume RUN_FOLDER goes on from its last checkpoint, if there was one", file=sys.stderr)
        sys.exit(130)
