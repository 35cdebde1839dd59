"""Tutorial 2: a transformer on Shakespeare without norm layers, and a Lipschitz bound that is true.

With every weight matrix held within a limit, a transformer needs no layer norm, QK norm or
softcapping, and has a Lipschitz constant: how much its logits can move, at most, when the
embeddings of its tokens move. The bound on attention in the paper's code misses that each head may
look at a different token. The bounds here, derived in constraints.py, count heads.

COMMANDS
    python shakespeare.py                      # minutes on a laptop; ends with a sample
    python shakespeare.py --preset lipschitz2  # a constant below 2, embeddings to logits
    python shakespeare.py --sample runs/NAME --prompt "ROMEO:"
    python shakespeare.py --data FILE          # any text in UTF-8
    python shakespeare.py --out DIR            # DIR holds a stopped run: it goes on
RESULT (tinyshakespeare, whole validation text; seed 0; 4 minutes on one core with bfloat16)
    55.8 % of the characters right, loss 1.476, at a bound of 393. Presets: results/README.md.
ANCESTRY. Experiments of arXiv 2507.13338 (github Arongil/lipschitz-transformers, in JAX; its code
is not used), text of karpathy/char-rnn. MaxMin is GroupSort (Anil et al. 2019).
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import sysconfig
import time
import urllib.request
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from constraints import (CONSTRAINTS, LN10, after_unknown_step, block_bounds, cap_rows,
                         ellipsoid_blocks, ellipsoid_norm, ellipsoid_pairs, exact_norm,
                         find_constraint, maxmin, power, sigma_per_norm, transformer_bounds, tune)
from muon import Muon, fast_dtype

SCRIPT = "shakespeare"
ROLES = ("q", "k", "v", "o", "in", "out", "head")  # of the matrices: attention, MLP, unembedding
RHOS = (0.001, 0.003, 0.01, 0.03, 0.1)  # radii of certified token accuracy: RMS, every embedding

# Shapes: B windows in a batch, T tokens (characters) in a window, D dimension of a token's vector,
# H heads, E = D / H, V characters in the vocabulary, N positions in a text.


# ==== Config: every field is a flag ===============================================================
def flag(default, help, low=None, high=1e15, choices=()):
    """A field: its default, its help, and the range or the choices that it is checked against."""
    return dataclasses.field(default=default, metadata=dict(help=help, limits=(low, high, choices)))


class UserError(Exception):
    """In one line what was given, what is needed, how to mend it. Exit status 2."""


@dataclasses.dataclass
class Config:
    preset: str = flag("laptop", "named settings, see the end of this help; other flags override")
    data: str = flag("auto", "auto, stand-in, or a text file in UTF-8")
    holdout: bool = flag(False, "for tuning: evaluate on the last tenth of the training text")
    # model
    width: int = flag(256, "dimension D of a token's vector", 1, 2**14)
    blocks: int = flag(3, "blocks, each of attention and an MLP", 1, 1000)
    heads: int = flag(4, "attention heads H, each of dimension D / H", 1, 2**14)
    hidden: int = flag(1024, "neurons of an MLP", 1, 2**16)
    seq_len: int = flag(256, "characters in a window", 1, 2**14)
    activation: str = flag("gelu", "gelu / 1.1289, or maxmin on pairs", choices=("gelu", "maxmin"))
    positions: str = flag("rope", "rope, or bias: learned, by distance", choices=("rope", "bias"))
    logit_scale: float = flag(1.0, "on the attention logits q.k / (D / H); 0: no content", 0)
    attention_scale: float = flag(1 / 3, "factor on the output of attention; 0: 1 / sqrt(H)", 0)
    residual_scale: float = flag(1.0, "2 * blocks * a in x <- (1 - a) x + a block(x)", 0)
    final_scale: float = flag(1.0, "fixed factor on the logits, counted in bounds", 0)
    w_max: str = flag("6", "limit on RMS->RMS norms: one number, or 7: " + ",".join(ROLES))
    # training
    optimizer: str = flag("muon", "muon or adamw, of the matrices", choices=("muon", "adamw"))
    constraint: str = flag("soft_cap", f"{', '.join(CONSTRAINTS)}, or yours as FILE.py:NAME")
    constrain_every: int = flag(4, "about how many steps a constraint waits that can", 1, 64)
    steps: int = flag(600, "training steps", 1, 10**9)
    batch: int = flag(32, "windows a step", 1, 2**20)
    lr: float = flag(0.0, "learning rate, falling to 0; 0: 0.1 for Muon, 0.003 for AdamW", 0, 1e30)
    embed_lr: float = flag(0.02, "learning rate of the embedding (Adam), falling likewise", 0)
    bias_lr: float = flag(0.1, "learning rate of the position bias (Adam), falling likewise", 0)
    momentum: float = flag(0.95, "Muon's momentum, or AdamW's first beta", 0, 0.9999)
    loss_temperature: float = flag(1.0, "factor on the logits in the loss, not in bounds", 1e-30)
    seed: int = flag(0, "of initialisation, data order, samples", 0, 2**31 - 1)
    dtype: str = flag("auto", "or float32, bfloat16", choices=("auto", "float32", "bfloat16"))
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps; auto: cuda if there is one")
    evals: int = flag(4, "evaluations on all validation text, each with a checkpoint", 1, 10**6)
    out: str = flag("", "run folder, a stopped run goes on; default: a new one in runs/")
    # the sample
    sample: str = flag("", "a run folder: do not train, only sample from it")
    prompt: str = flag("", "text that the sample continues; default: the start of a line")
    length: int = flag(500, "characters to sample", 1, 10**9)
    temperature: float = flag(0.8, "of the sample; 0: always the most probable character", 0)

    @classmethod
    def of(cls, preset=None, **given):
        """A preset with changes. `given` is kept: a model that is loaded must not contradict it."""
        if preset not in (None, *PRESETS):
            raise UserError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
        given = {"preset": preset, **given} if preset else given
        settings = PRESETS[preset or "laptop"]
        if given.get("optimizer", "muon") != settings.get("optimizer", "muon"):
            settings = dict(settings, lr=0.0)  # (a preset's learning rate is for its own optimizer)
        config = cls(**{**settings, **given})
        config.given = given
        return config

    def limits(self):
        """{role of a matrix: its w_max}. UserError if a setting is out of its range."""
        def need(name, right, requirement):
            if not right:
                raise UserError(f"--{name} {getattr(self, name)!r:.99}: must be {requirement}")

        for f in dataclasses.fields(self):
            value, (low, high, choices) = getattr(self, f.name), f.metadata["limits"]
            kind = (int, float) if f.type is float else f.type
            right = isinstance(value, kind) and isinstance(value, bool) == (f.type is bool)
            need(f.name, right, f"of type {f.type.__name__}")
            need(f.name, not choices or value in choices, f"one of {', '.join(choices)}")
            need(f.name, low is None or low <= value <= high, f"from {low} to {high}")
        rope = self.positions == "rope"
        fit = self.width % (2 * self.heads if rope else self.heads) == 0
        need("heads", fit, f"a divisor of the width, {self.width}; width / heads even for rope")
        need("logit_scale", not rope or self.logit_scale > 0, "above 0 for rope: it turns q and k")
        need("residual_scale", self.residual_scale <= 2 * self.blocks, "at most 2 * blocks")
        need("hidden", self.activation == "gelu" or self.hidden % 2 == 0, "even for maxmin")
        try:
            find_constraint(self.constraint)
            numbers = [float(w) for w in self.w_max.split(",")]
        except ValueError as bad:
            raise UserError(f"--constraint {self.constraint}, --w_max {self.w_max!r:.99} (1 or 7): "
                            f"{bad}") from bad
        right = len(numbers) in (1, 7) and all(1e-30 <= w <= 1e30 for w in numbers)
        need("w_max", right, "a finite number above 0, or 7 of them, with commas")
        return dict(zip(ROLES, numbers * 7))


SMALL = dict(activation="maxmin", positions="bias", logit_scale=0.0, attention_scale=0.0, blocks=4,
             heads=2, hidden=512, residual_scale=4.0, w_max="1", steps=1000, lr=0.04, embed_lr=0.05,
             momentum=0.9)
PRESETS = {
    "laptop": dict(SMALL, heads=4, w_max="2", final_scale=10.0, steps=800, lr=0.08),
    "paper": dict(batch=512, steps=2000, evals=10),  # and the defaults above
    "paper_adamw": dict(batch=512, steps=2000, evals=10, optimizer="adamw", constraint="none"),
    "lipschitz2": dict(SMALL, hidden=1024, w_max="1.4", final_scale=0.05, loss_temperature=800.0,
                       steps=1400, lr=0.1, embed_lr=0.02, momentum=0.95),
    "plain100": dict(SMALL, heads=4, w_max="1.3", final_scale=64.0, steps=1200, lr=0.08),
    "certified": dict(SMALL, final_scale=12.0),
}


def parse_arguments(argv=None):
    """The command line as a Config: defaults, then the preset, then the flags given."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("RESULT")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"preset {name}: {settings}" for name, settings in PRESETS.items()),
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        text = f"{f.metadata['help']} [{getattr(Config.of(), f.name)}]"
        parser.add_argument(f"--{f.name}", help=text, **kind)
    return Config.of(**vars(parser.parse_args(argv)))


# ==== Model: attention and MLP, each mixed into the residual stream, and no norm layer ============
GELU_SLOPE = 1.128993069  # the steepest slope of GeLU's tanh form, rounded up (erf form: 1.1289042)
GELU_SCALE = 1.1289  # what the paper divides GeLU by: a little less than its slope


def rotate(x_BHTE):
    """The paper's RoPE: reflects a pair (i, i + E/2) at an angle of position / 10000^(2i / E)."""
    # (Of q and k together that leaves a turn by the difference of positions.)
    T, E = x_BHTE.shape[-2:]
    rate_E = 10000 ** (torch.arange(E // 2, dtype=torch.float64) / (E // 2))
    angle_TE = torch.arange(T, dtype=torch.float64)[:, None] / rate_E
    cos, sin = angle_TE.cos(), angle_TE.sin()
    by_self_TE = torch.cat([cos, -cos], -1).to(x_BHTE)
    by_partner_TE = torch.cat([sin, sin], -1).to(x_BHTE)
    return torch.addcmul(x_BHTE * by_self_TE, x_BHTE.roll(E // 2, -1), by_partner_TE)


class Block(torch.nn.Module):
    """x <- (1 - a) x + a attention(x), then x <- (1 - a) x + a mlp(x), with a = mix. No biases."""

    def __init__(self, config, index):
        super().__init__()
        self.config = config
        self.mix = config.residual_scale / (2 * config.blocks)
        self.attention_scale = config.attention_scale or config.heads**-0.5
        D, Parameter = config.width, torch.nn.Parameter
        if config.logit_scale > 0:  # else attention does not look at content
            self.q, self.k = Parameter(torch.zeros(D, D)), Parameter(torch.zeros(D, D))
        self.v = Parameter(torch.zeros(D, D))
        self.o = Parameter(torch.zeros(D, D))
        self.w_in = Parameter(torch.zeros(config.hidden, D))
        self.w_out = Parameter(torch.zeros(D, config.hidden))
        if config.positions == "bias":  # head h of block i starts h 2^min(i, 5) characters ago
            step = 2 ** min(index, 5)
            centre_H = (step * torch.arange(config.heads)).clamp(max=config.seq_len - 1)
            distance_HT = (torch.arange(config.seq_len) - centre_H[:, None]).abs()
            self.bias_HT = Parameter(-2.0 / step * distance_HT)

    def matrices(self):
        """[(role, matrix)]"""
        named = self.named_parameters()
        return [(name.removeprefix("w_"), W) for name, W in named if name != "bias_HT"]

    def attention(self, x_BTD):
        """out_t = beta sum_h o_h sum_(j <= t) softmax_j(s q_t^h . k_j^h + bias_h(t - j)) v_j^h"""
        B, T, D = x_BTD.shape
        H, dtype, content = self.config.heads, x_BTD.dtype, self.config.logit_scale > 0
        s = self.config.logit_scale / (D // H)
        matrices = [s * self.q, self.k, self.v] if content else [self.v]
        parts_BTX = F.linear(x_BTD, torch.cat([W.to(dtype) for W in matrices]))
        parts_BXTE = parts_BTX.view(B, T, -1, D // H).transpose(1, 2)  # X: heads of q, k, v
        t = torch.arange(T, device=x_BTD.device)
        distance_TT, bias_HTT = t[:, None] - t, torch.zeros(1, T, T, device=x_BTD.device)
        if self.config.positions == "bias":
            bias_HTT = self.bias_HT[:, distance_TT.clamp(min=0)]
        bias_HTT = bias_HTT.masked_fill(distance_TT < 0, -math.inf)
        if content:
            qk_BXTE, v_BHTE = parts_BXTE.split([2 * H, H], 1)
            if self.config.positions == "rope":
                qk_BXTE = rotate(qk_BXTE)
            q_BHTE, k_BHTE = qk_BXTE.split(H, 1)
            # (on a CPU faster than scaled_dot_product_attention: 306 and 420 ms a step)
            y_BHTE = (q_BHTE @ k_BHTE.mT).add_(bias_HTT.to(dtype)).softmax(-1) @ v_BHTE
        else:  # the same pattern for all windows: one large product
            v_HTX = parts_BXTE.permute(1, 2, 0, 3).reshape(H, T, -1)
            y_HTX = bias_HTT.softmax(-1).to(dtype) @ v_HTX
            y_BHTE = y_HTX.view(H, T, B, D // H).permute(2, 0, 1, 3)
        y_BTD = y_BHTE.transpose(1, 2).reshape(B, T, D)
        return F.linear(y_BTD, (self.attention_scale * self.o).to(dtype))

    def mlp(self, x_BTD):
        """w_out maxmin(w_in x), or w_out gelu(w_in x) / 1.1289 with GeLU in its tanh form."""
        h_BTX, dtype = F.linear(x_BTD, self.w_in.to(x_BTD.dtype)), x_BTD.dtype
        if self.config.activation == "maxmin":
            return F.linear(maxmin(h_BTX), self.w_out.to(dtype))
        # (in bfloat16 the exact form: faster on a CPU, and GELU_SLOPE is above its slope, too)
        h_BTX = F.gelu(h_BTX, approximate="none" if dtype == torch.bfloat16 else "tanh")
        return F.linear(h_BTX, (self.w_out / GELU_SCALE).to(dtype))

    def forward(self, x_BTD):
        x_BTD = torch.lerp(x_BTD, self.attention(x_BTD), self.mix)
        return torch.lerp(x_BTD, self.mlp(x_BTD), self.mix)


class Transformer(torch.nn.Module):
    """Embedding (V vectors of RMS at most 1), blocks, head: logits = final_scale * head x."""

    def __init__(self, config, vocabulary):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.mix = config.residual_scale / (2 * config.blocks)
        limits, stiefel = config.limits(), config.constraint == "stiefel"
        generator = torch.Generator().manual_seed(config.seed)
        embedding_VD = torch.randn(len(vocabulary), config.width, generator=generator)
        self.embedding_VD = torch.nn.Parameter(cap_rows(embedding_VD))
        self.blocks = torch.nn.Sequential(*(Block(config, i) for i in range(config.blocks)))
        self.head_VD = torch.nn.Parameter(torch.zeros(len(vocabulary), config.width))
        for role, W in self.matrices():
            # All singular values equal: norm 1 if that is within the limit; on it for stiefel.
            torch.nn.init.orthogonal_(W, generator=generator)
            W.data.mul_(sigma_per_norm(W) * (limits[role] if stiefel else min(1.0, limits[role])))
            # o and w_out start at 0, blocks as (1 - a) x. Not if so little of x would reach the head.
            if role in ("o", "out") and not stiefel and self.mix < 0.4:
                W.data.zero_()

    def matrices(self):
        """[(role, matrix)] of all that the constraint holds."""
        in_blocks = [pair for block in self.blocks for pair in block.matrices()]
        return [*in_blocks, ("head", self.head_VD)]

    def forward(self, tokens_BT, dtype=torch.float32):
        """Logits (B, T, V) in float32 or float64; all before the head is computed in `dtype`."""
        x_BTD = self.blocks(F.embedding(tokens_BT, self.embedding_VD.to(dtype)))
        high = torch.float64 if dtype == torch.float64 else torch.float32
        return F.linear(x_BTD.to(high), self.config.final_scale * self.head_VD.to(high))


# ==== Certificate: how far logits can move if all embeddings move, from the weights alone =========
# constraints.py derives it, for blocks like these: by a product of norms that counts heads, and by
# ellipsoids, which follow in what directions a movement is long. What is this model's own:
#   1. The more tokens a softmax of a bias sees, the less it gives to one: what a head gives a token
#      of itself, at least, is its share at the last position.
#   2. f_y - f_j, two logits, moves by at most L_yj = sqrt((u_y - u_j) S (u_y - u_j)^T) in E(S), with
#      rows of U = final_scale head; and by |u_y - u_j| sqrt(D) times the product without the head.
#   3. If f_y - f_j > rho L_yj for all j, y stays the largest logit when all embeddings move by RMS
#      <= rho: both ends are in the ball, whose radius is the largest embedding's + rho.
#   4. Weights of parts and neurons are free: `tuned` descends from zeros, the untuned start.
@torch.no_grad()
def certificate(model, rho=0.0, free=None):
    """transformer_bounds (constraints.py), embeddings to logits, and norms: {role: largest RMS->RMS norm}.

    rho: how far (RMS) embeddings may be from the table's. free: what `tuned` found; None: untuned.
    """
    model, norms = copied(model), {}
    for role, W in model.matrices():
        norms[role] = max(norms.get(role, 0.0), exact_norm(W).item())
    norms["embedding"] = R = model.embedding_VD.square().mean(1).max().sqrt().item()
    U = model.config.final_scale * model.head_VD
    return dict(transformer_bounds(layers(model), R + rho, U, free), norms=norms)


def layers(model):
    """Of each block what transformer_bounds takes; of a model in float64."""
    config = model.config
    gelu = (GELU_SLOPE, GELU_SCALE) if config.activation == "gelu" else None
    return [block_bounds(
        dict(block.matrices()), config.heads, block.mix, block.attention_scale,
        None if config.logit_scale > 0 else block.bias_HT.softmax(1)[:, 0],  # (step 1)
        config.logit_scale, config.positions == "rope", gelu) for block in model.blocks]


@torch.enable_grad()
def tuned(model, steps=30, free=None, pairs=False):
    """Step 4 from `free` on: for the least norm, or the least mean logarithm of pairs."""
    model, free = copied(model), copy.deepcopy(free or {})
    U, blocks = model.config.final_scale * model.head_VD, layers(model)
    R = model.embedding_VD.square().mean(1).max().sqrt().item()

    def goal(free):
        S, log = ellipsoid_blocks(blocks, R, free)[-1]
        if not pairs:
            return ellipsoid_norm(S, log, U)
        log_VV = ellipsoid_pairs(S, log, U)
        return log_VV[log_VV > -math.inf].mean()

    return tune(goal, free, steps)


def copied(model):
    """The model in float64 on the CPU, without gradients. UserError if a weight is not finite."""
    model = copy.deepcopy(model).cpu().double().requires_grad_(False)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError("the model has weights that are not finite: there is nothing to certify")
    return model


@torch.no_grad()
def certified_tokens(model, tokens_N, free=None, rhos=RHOS):
    """{rho: bool of each position}: right however far, up to rho (RMS), each embedding moves."""
    model, reach, stands = copied(model), {}, {rho: [] for rho in rhos}  # (steps 2, 3)
    U, D = model.config.final_scale * model.head_VD, model.config.width
    free = tuned(model, 20 if len(U) <= 1024 else 0, free, pairs=True)  # (minutes for 4096)
    apart_VV = ellipsoid_pairs(torch.eye(D).double(), math.log(D), U) / LN10  # |u_y - u_j| sqrt(D)
    for rho in rhos:
        bound = certificate(model, rho, free)
        pairs_VV = ellipsoid_pairs(*bound["end"], U) / LN10
        log_VV = torch.minimum(pairs_VV, apart_VV + bound["body_log10"])
        reach[rho] = (10 ** (log_VV + math.log10(rho))).fill_diagonal_(-math.inf)
    for x_BT, y_BT in windows(tokens_N, model.config.seq_len):
        y_N, logits_NV = y_BT.flatten(), model(x_BT, torch.float64).flatten(0, 1)
        margin_NV = logits_NV.gather(1, y_N[:, None]) - logits_NV
        margin_NV -= 1e-9 * logits_NV.abs().amax(1, keepdim=True)  # (for rounding)
        for rho in rhos:
            stands[rho].append((margin_NV > reach[rho][y_N]).all(1))
    return {rho: torch.cat(parts) for rho, parts in stands.items()}


# ==== Data: a text, as numbers ====================================================================
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
LONGEST, VARIED = 10**8, 4096  # most characters of a text, and most different ones: 4 GB of memory


def load_data(config):
    """(train_N, validation_N, vocabulary, name): int64 tokens, sorted characters; 90 % to train."""
    text, name = load_text(config.data)
    vocabulary, needed = "".join(sorted(set(text))), 20 * (config.seq_len + 1)
    if len(text) < needed or not 2 <= len(vocabulary) <= VARIED:
        raise UserError(f"--data {name}: has {len(text)} characters, {len(vocabulary)} different; give "
                        f"{needed} or more (or a smaller --seq_len), 2 to {VARIED} different")
    tokens_N, n = encode(text, vocabulary), int(0.9 * len(text))
    if config.holdout:
        tokens_N, n, name = tokens_N[:n], int(0.9 * n), name + ", evaluated on training text held out"
    return tokens_N[:n], tokens_N[n:], vocabulary, name


def load_text(data):
    """(text, name): of a file, DATA_DIR, a cache, the network, or the stand-in."""
    local = Path(os.environ.get("DATA_DIR", "nowhere"), "tinyshakespeare/input.txt")
    if data == "stand-in":
        return stand_in(), data
    if data == "auto" and local.is_file():
        data = str(local)
    if data != "auto":
        with reading(f"--data {data}", "text in UTF-8; to convert one: iconv -f ENCODING -t UTF-8"):
            with open(data, encoding="utf-8-sig") as file:  # (which drops a byte-order mark)
                text = file.read(LONGEST + 1)  # (a file may have no end)
            if len(text) > LONGEST or "\0" in text:
                raise ValueError(f"it has more than {LONGEST} characters, or NUL, as UTF-16 has")
            return text, data
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home, "tinyshakespeare/input.txt")
        text = cache.read_bytes() if cache.is_file() else b""
        if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
            text = urllib.request.urlopen(TEXT_URL, timeout=4).read(2**22)
            if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
                raise OSError("what came from the network is not the text")
            with contextlib.suppress(OSError):  # (no cache: the next run downloads again)
                cache.parent.mkdir(parents=True, exist_ok=True)
                write(cache, text)
        return text.decode(), "tinyshakespeare"
    except Exception as problem:  # (a network fails in dozens of ways)
        print(f"!!  Shakespeare is not here (see DATA_DIR): {problem}\n!!  TRAINING ON A STAND-IN: source "
              "code of Python's library. Its loss compares with nothing.", flush=True)
        return stand_in(), "stand-in"


def stand_in(characters=1_115_394):
    """Text that is on every machine: the source of Python's standard library, ASCII only."""
    other = bytes(set(range(256)) - {ord("\n"), *range(ord(" "), ord("~") + 1)})
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(path.read_bytes().translate(None, other) for path in paths)[:characters].decode()


def encode(text, vocabulary):
    """The characters' numbers, int64 (N,)."""
    number = {character: i for i, character in enumerate(vocabulary)}
    if strange := set(text) - number.keys():
        raise UserError(f"--prompt: the model does not know {strange}, only {vocabulary[:100]!r}")
    return torch.tensor([number[character] for character in text], dtype=torch.int64)


def batch_of(tokens_N, step, config):
    """(x_BT, y_BT): random windows, and what follows each token. A function of seed and step."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    start_B = torch.randint(len(tokens_N) - config.seq_len, (config.batch,), generator=generator)
    window = tokens_N[start_B[:, None] + torch.arange(config.seq_len + 1)]
    return window[:, :-1], window[:, 1:]


def windows(tokens_N, T, batch=None):
    """Batches (x_BT, y_BT) of windows side by side: each token but the first is predicted once."""
    batch = batch or max(1, 8192 // T)
    whole = (len(tokens_N) - 1) // T * T
    x_WT, y_WT = tokens_N[:whole].view(-1, T), tokens_N[1:whole + 1].view(-1, T)
    yield from zip(x_WT.split(batch), y_WT.split(batch))
    if whole + 1 < len(tokens_N):
        yield tokens_N[None, whole:-1], tokens_N[None, whole + 1:]


# ==== Run folders: one rule for starting and going on =============================================
def go_on(config):
    """(config, model, checkpoint) of what is stored, if anything. Other settings are an error."""
    sample, given = config.sample, getattr(config, "given", dataclasses.asdict(config))
    if not sample and not (config.out and Path(config.out, "checkpoint.pt").exists()):
        return config, None, None
    own, model, state = load_checkpoint(sample or config.out)
    free = {"out", "device", "data", "prompt", "length", "temperature"}
    free |= {"sample", "holdout", "seed", "dtype"} if sample else set()
    for name, value in given.items():
        if name not in free and value != getattr(own, name):
            raise UserError(f"--{name} {value}: {sample or config.out} has {getattr(own, name)}; "
                            "leave the flag out, or start a run with another --out")
        setattr(own, name, value)
    if ":" in str(own.constraint) and not (sample or "constraint" in given):  # (no code unasked)
        raise UserError(f"--out {config.out}: was trained with code; say that you trust it: "
                        f"--constraint {own.constraint}")
    own.out, own.device = config.out, config.device
    return own, model, state


@contextlib.contextmanager
def reading(path, what):
    """One line for the user, whatever is wrong with a file."""
    try:
        yield
    except Exception as problem:
        reason = (str(problem).strip() or "no reason given").splitlines()[0][:160]
        raise UserError(f"{path}: is no {what} ({type(problem).__name__}: {reason})") from problem


def load_checkpoint(folder):
    """(config, model, all that main saved). Only tensors, numbers and text are read, no code."""
    path = Path(folder, "checkpoint.pt") if Path(folder).is_dir() else Path(folder)
    with reading(path, f"checkpoint of {SCRIPT}.py, nothing in it was run"):
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed, as no checkpoint is")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] != SCRIPT:
            raise ValueError(f"it is of {state['script']}.py")
        config = Config(**state["config"])
        model = built(config, "".join(state["vocabulary"]), state["model"])
        state["tokens"] = int(state["tokens"])
        for record in state["log"]:
            json.dumps(record), progress(record, config.steps)  # (raise, if it is no line of a log)
            record["norms"] = {role: float(norm) for role, norm in record["norms"].items()}
        return config, model, state


def built(config, vocabulary, weights):
    """The model of the settings and weights of a file. ValueError if they do not fit."""
    config = dataclasses.replace(config, constraint="none")  # (its own may be code: it is not run)
    with torch.device("meta"):  # (takes no memory: settings may say anything)
        shapes = {name: W.shape for name, W in Transformer(config, vocabulary).state_dict().items()}
    if shapes != {name: W.shape for name, W in weights.items() if W.is_contiguous()}:
        raise ValueError("it holds fewer numbers, or others, than its settings say")
    model = Transformer(config, vocabulary)
    model.load_state_dict(weights)
    return model


def write(path, data):
    """Text or bytes, all or nothing: written beside, then put in the old file's place."""
    if isinstance(data, str):  # (JSON has no infinity: the logarithm of 0 is a word)
        data = data.replace(": -Infinity", ': "-inf"').replace(": Infinity", ': "inf"').encode()
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


# ==== Main ========================================================================================
def main(config):
    """Train, go on or sample; certify; report. Returns the summary, None of --sample."""
    config.limits()  # (complains before anything is loaded)
    config, model, state = go_on(config)
    if state and not config.sample and Path(config.out, "summary.json").exists():
        print(f"The run in {config.out} is finished; start another with another --out.")
        with reading(config.out, "run with a whole summary.json"):
            return json.loads(Path(config.out, "summary.json").read_text())
    with reading(f"--device {config.device}", "device here (try auto)"):
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.zeros(1, device=auto if config.device == "auto" else config.device).device
    dtype = fast_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.sample:
        return sample(model.to(device), config, dtype)
    train_N, validation_N, vocabulary, data_name = load_data(config)
    if (model and model.vocabulary != vocabulary) or (state and state["tokens"] != len(train_N)):
        raise UserError(f"--data {data_name}: {config.out} was trained on another; give that text")
    encode(config.prompt, vocabulary)  # (a wrong prompt is reported before training)

    # ---- build
    limits, constraint = config.limits(), find_constraint(config.constraint)
    model = (model or Transformer(config, vocabulary)).to(device)
    copied(model)  # (complains of stored weights that are not finite)
    if config.optimizer == "muon":
        groups = [dict(params=[W for role, W in model.matrices() if limits[role] == w], w_max=w)
                  for w in sorted(set(limits.values()))]
        optimizer = Muon(groups, momentum=config.momentum, constraint=constraint, dtype=dtype,
                         every=config.constrain_every)
    else:
        optimizer = torch.optim.AdamW([W for _, W in model.matrices()], betas=(config.momentum, 0.95),
                                      weight_decay=0.0)
    lr = config.lr or (0.1 if config.optimizer == "muon" else 0.003)
    adam = torch.optim.Adam([model.embedding_VD], betas=(0.9, 0.95))
    optimizers = [(optimizer, lr), (adam, config.embed_lr)]
    if config.positions == "bias":
        adam = torch.optim.Adam([block.bias_HT for block in model.blocks], betas=(0.9, 0.95))
        optimizers.append((adam, config.bias_lr))
    start, seconds, log = 0, 0.0, []
    if state:
        with reading(config.out, "run that can go on"):
            start, seconds, log = int(state["step"]), float(state["seconds"]), list(state["log"])
            for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict(dict(saved, param_groups=groups))
                for W, values in optimizer.state.items():
                    fit = dict(momentum=W.shape), dict(step=(), exp_avg=W.shape, exp_avg_sq=W.shape)
                    if {name: M.cpu().numpy().shape for name, M in values.items()} not in fit:
                        raise ValueError("its momenta are of other weights")
    with reading(config.out or "runs", "folder that can be made or written in; see --out"):
        stem, number = f"runs/{SCRIPT}_{config.preset}_seed{config.seed}", 1
        out = Path(config.out or stem)
        while out.exists() and not config.out:
            number += 1
            out = Path(f"{stem}_{number}")
        out.mkdir(parents=True, exist_ok=bool(config.out))  # (so two runs never share a folder)
    settings, kept = json.dumps(dataclasses.asdict(config), indent=1), out / "config.json"
    if start == 0 and kept.exists() and kept.read_text() != settings:  # (it has no checkpoint yet)
        raise UserError(f"--out {out}: holds a run begun with other settings; give them, or another")
    write(kept, settings)
    print(f"device {device}, computing in {dtype} with float32 weights, data: {data_name} "
          f"({len(train_N):,} characters to train), run folder {out}, from step {start}", flush=True)

    # ---- train
    eval_steps = {math.ceil(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    losses, began = [], time.perf_counter()
    for step in tqdm(range(start, config.steps), disable=not sys.stderr.isatty(), leave=False):
        x_BT, y_BT = batch_of(train_N, step, config)
        logits_NV = config.loss_temperature * model(x_BT.to(device), dtype).flatten(0, 1)
        loss = F.cross_entropy(logits_NV, y_BT.to(device).flatten())
        loss.backward()
        fraction = 1 - step / config.steps
        for optimizer, start_lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = start_lr * fraction
            optimizer.step()
            optimizer.zero_grad()
        if config.optimizer == "adamw" and config.constraint != "none":  # (Muon does it by itself)
            for role, W in model.matrices():
                W.data.copy_(after_unknown_step(constraint, W, limits[role], lr * fraction))
        model.embedding_VD.data.copy_(cap_rows(model.embedding_VD.data))
        losses.append(loss.detach())

        done = step + 1
        if done % 10 == 0 or done in eval_steps:  # (not at each step: a GPU would wait for it)
            numbers = torch.stack(losses[-10:]), *model.parameters()
            if not all(t.isfinite().all() for t in numbers):
                raise UserError(f"step {done}: training has diverged: loss or weights not finite; "
                                f"{out} may have a good checkpoint; try a smaller --lr")
        if done in eval_steps:
            seconds += time.perf_counter() - began
            log.append(measure(model, validation_N, done, torch.stack(losses).mean().item(), seconds))
            buffer = io.BytesIO()
            torch.save(dict(
                script=SCRIPT, config=dataclasses.asdict(config), step=done, seconds=seconds, log=log,
                data=data_name, tokens=len(train_N), vocabulary=vocabulary, model=model.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer, _ in optimizers]), buffer)
            write(out / "checkpoint.pt", buffer.getvalue())
            write(out / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log))
            tqdm.write(progress(log[-1], config.steps))
            losses, began = [], time.perf_counter()
    return report(config, model, out, log, data_name, validation_N, dtype)


@torch.no_grad()
def evaluate(model, batches):
    """(mean cross-entropy of the logits, that at the loss temperature, accuracy), in float32."""
    device, sums, count = model.head_VD.device, torch.zeros(3, dtype=torch.float64), 0
    for x_BT, y_BT in batches:
        logits_NV, y_N = model(x_BT.to(device)).flatten(0, 1), y_BT.to(device).flatten()
        losses = [F.cross_entropy(t * logits_NV, y_N, reduction="sum").item()
                  for t in (1.0, model.config.loss_temperature)]
        sums += torch.tensor([*losses, (logits_NV.argmax(1) == y_N).sum().item()])
        count += len(y_N)
    return (sums / count).tolist()


def measure(model, validation_N, step, train_loss, seconds):
    """A line of the log. Its bound is the untuned one."""
    loss, hot, accuracy = evaluate(model, windows(validation_N, model.config.seq_len))
    bound = certificate(model)
    largest = max(norm for role, norm in bound["norms"].items() if role != "embedding")
    return dict(step=step, train_loss=train_loss, val_loss=loss, val_loss_at_temperature=hot,
                val_accuracy=accuracy, max_weight_norm=largest, norms=bound["norms"],
                lipschitz_log10=bound["log10"], ms_per_step=1000 * seconds / max(1, step))


def progress(record, steps):
    """A line of the log in words."""
    ms, step = record["ms_per_step"], record["step"]
    return (f"step {step:5d}/{steps}  train loss {record['train_loss']:.3f}  validation loss "
            f"{record['val_loss_at_temperature']:.3f}  accuracy {100 * record['val_accuracy']:5.2f} %  "
            f"largest norm {record['max_weight_norm']:.3f}  untuned bound "
            f"{power(record['lipschitz_log10'])}  {ms:.0f} ms/step  {ms / 1000 * (steps - step):.0f} s left")


def report(config, model, out, log, data_name, validation_N, dtype):
    """summary.json, tables, picture and a sample of a finished run. Returns the summary."""
    print("Now the tuned certificate and the tokens it certifies: a minute or more ...", flush=True)
    free, last = tuned(model), log[-1]
    bound, stands = certificate(model, free=free), certified_tokens(model, validation_N, free)
    certified = {f"{rho:g}": right_N.double().mean().item() for rho, right_N in stands.items()}
    summary = dict(
        {key: last[key] for key in last if key not in ("step", "train_loss")}, script=SCRIPT,
        preset=config.preset, params=sum(p.numel() for p in model.parameters()), steps=config.steps,
        lipschitz_log10=bound["log10"], lipschitz_product_log10=bound["product_log10"],
        lipschitz_norm="max-token RMS->max-token RMS, embeddings to logits, inside the ball",
        certified_token_accuracy=certified, loss_temperature=config.loss_temperature, seed=config.seed,
        w_max=config.limits() if config.constraint != "none" else None, data=data_name,
        train_seconds=last["ms_per_step"] * config.steps / 1000, device=str(model.head_VD.device),
        dtype=str(dtype).removeprefix("torch."), torch=torch.__version__)
    write(out / "summary.json", json.dumps(summary, indent=1))  # (now it is finished)
    draw(config, out, log, bound["norms"])

    print(f"\n{config.preset}: {config.optimizer} + {config.constraint}, {config.steps} "
          f"steps, seed {config.seed}, data: {data_name}\n  accuracy {100 * last['val_accuracy']:.2f} %, "
          f"loss {last['val_loss_at_temperature']:.3f} (loss temperature {config.loss_temperature:g})\n"
          "  certified token accuracy at rho (RMS, every embedding)",
          *(f"  {rho}: {100 * share:.2f} %" for rho, share in certified.items()))
    print("  largest norm (RMS->RMS)", *(f"  {role} {n:.4g}" for role, n in bound["norms"].items()))
    print(f"  LIPSCHITZ CONSTANT {power(bound['log10'])}, embeddings to logits (product "
          f"{power(bound['product_log10'])}, ellipsoid {power(bound['ellipsoid_log10'])})\n{'-' * 80}")
    sample(model, config, dtype)
    print(f"{'-' * 80}\nPicture, log, checkpoint: {out}. Sample: python {SCRIPT}.py --sample "
          f"{out}\nAttack its claims: python verify_lipschitz.py {out}")
    return summary


def draw(config, out, log, norms):
    """curves.png: losses and norms."""
    from matplotlib.figure import Figure  # (not pyplot: whoever calls main keeps their backend)

    figure, steps = Figure(figsize=(11, 4.5), layout="constrained"), [record["step"] for record in log]
    left, right = figure.subplots(1, 2)
    for name in ("val_loss_at_temperature", "train_loss"):
        left.plot(steps, [record[name] for record in log], "o-", label=name)
    for role in norms:
        right.plot(steps, [record["norms"].get(role) for record in log], "o-", label=role)
    if config.constraint != "none":
        right.hlines(list(config.limits().values()), 0, config.steps, "grey", ":")
    left.set(title=f"{SCRIPT}, {config.preset}", xlabel="step", ylabel="loss, nats a character")
    right.set(title="norms and limits (dotted)", xlabel="step", ylabel="RMS->RMS norm", ylim=(0, None))
    left.legend()
    right.legend()
    figure.savefig(out / "curves.png", dpi=110)


@torch.no_grad()
def sample(model, config, dtype):
    """Print the prompt and `length` characters; each sees the seq_len characters before it."""
    generator, vocabulary = torch.Generator().manual_seed(config.seed), model.vocabulary
    tokens = encode(config.prompt or vocabulary[0], vocabulary).tolist()  # (mostly a newline)
    print(config.prompt, end="")
    for _ in range(config.length):
        window_BT = torch.tensor([tokens[-model.config.seq_len:]], device=model.head_VD.device)
        logits_V = model(window_BT, dtype)[0, -1].cpu().double() * model.config.loss_temperature
        if not logits_V.isfinite().all():
            raise UserError("the logits of this model are not finite: it cannot be sampled")
        z_V = (logits_V - logits_V.max()) / (config.temperature or 1e-30)
        tokens.append(torch.multinomial(z_V.softmax(0), 1, generator=generator).item())
        print(vocabulary[tokens[-1]], end="", flush=True)
    print()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # (a terminal may lack characters)
    torch.set_flush_denormal(True)  # (a softmax has many such numbers, and they are slow: 10 % of a step)
    try:
        main(parse_arguments())
    except (UserError, OSError) as problem:
        print(f"{SCRIPT}.py: {problem}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{SCRIPT}.py: interrupted; with a checkpoint it goes on by --out FOLDER", file=sys.stderr)
        sys.exit(130)
