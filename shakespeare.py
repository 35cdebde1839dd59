"""Tutorial 2: a transformer on Shakespeare without norm layers, with a valid Lipschitz bound.

WHAT IT SHOWS. A constraint holds every weight matrix within a limit. So activations stay small, and
the transformer needs no layer norm, QK norm or softcapping. Among embeddings within a ball it then
has a Lipschitz constant: how far its logits can move, at most, when embeddings move. The bound on
attention in the paper's code misses that heads may look at different tokens. The bounds here count
heads.

COMMANDS
    python shakespeare.py                      # minutes on a laptop; ends with a sample
    python shakespeare.py --preset plain100    # half an hour; a constant below 100
    python shakespeare.py --sample runs/NAME --prompt "ROMEO:"
    python shakespeare.py --data FILE          # any text in UTF-8
    python shakespeare.py --out DIR            # stopped, the same command goes on

RESULT (tinyshakespeare, whole validation text; seeds 0 to 2; 9 minutes on one core of an AMD EPYC)
    55.8 +- 0.1 % of the characters right, loss 1.474 +- 0.002, at a bound of 395 +- 5. Presets:
    results/README.md.

ANCESTRY. The experiments are those of arXiv 2507.13338, whose code is in JAX. The text is that of
karpathy/char-rnn. MaxMin is GroupSort (Anil et al. 2019).
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import signal
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F

from constraints import (LN10, after_unknown_step, block_bounds, cap_rows, ellipsoid_blocks,
                         ellipsoid_norm, ellipsoid_pairs, exact_norm, find_constraint, maxmin,
                         norm_at_start, power, sigma_per_norm, transformer_bounds, tune)
from muon import Muon, fast_dtype

SCRIPT = "shakespeare"
ROLES = ("q", "k", "v", "o", "in", "out", "head")  # of the matrices: attention, MLP, unembedding
RHOS = (0.001, 0.003, 0.01, 0.03, 0.1)  # radii of certified tokens: RMS, at every embedding
TUNED_WIDTH = 512  # largest width at which the certificate is tuned: that takes minutes there
AT_ONCE = 32  # windows whose gradient is computed at a time; the sum is the same but for rounding

# Capitals at the end of a name are the shape of a tensor: x_BTD is (B, T, D).
# Shapes: B windows in a batch, T tokens (characters) in a window, D dimension of a token's vector,
# H heads, E = D / H, V characters in the vocabulary, N positions in a text, S windows of a text.


# ==== Settings (the same text in the three tutorials) =============================================
# How a config becomes flags. On a first reading go on with Config.
class UserError(Exception):
    """What the user can mend, in one line: what was given, what is needed, how. Exit status 2."""


@contextlib.contextmanager
def explain(what, remedy):
    """Whatever a library raises, as a UserError. Files, devices and networks fail in many ways."""
    try:
        yield
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}".split("\n")[0][:300]
        raise UserError(f"{what} ({reason}); {remedy}") from problem


class Settings:
    """Every field of a config is a flag, and the comment behind it is its help."""

    def __post_init__(self):
        """Give each value the type of its field, be it a number of numpy. Counts are at least 1."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (list, tuple)):
                value = ",".join(map(str, value))  # w_max=[3, 4, 5]
            kind = field.type
            least = 1 if kind is int and field.default else 0
            needed = f"give a finite {kind.__name__}, at least {least}"
            with explain(f"--{field.name} {value!r}", needed):
                converted = kind(value)
                if kind is not str:
                    exact = converted == float(value)  # int(3.5) is not
                    if not exact or not least <= converted < math.inf:
                        raise ValueError("out of range")
            setattr(self, field.name, converted)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"--{name} {value}: must be one of {', '.join(choices)}")

    @classmethod
    def of(cls, preset=None, **changes):
        """The settings of a preset, with changes."""
        preset = preset or cls.preset
        if preset not in PRESETS:
            raise UserError(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[preset], **changes, "preset": preset})


def parse_arguments(argv=None):
    """The command line as a Config: the settings of a preset, then the flags given."""
    presets = ["presets:"]
    for name, settings in PRESETS.items():
        words = [f"{key}={value}" for key, value in settings.items()]
        presets.append(f"  {name:14} {' '.join(words)}")
    parser = argparse.ArgumentParser(
        description=__doc__.split("RESULT")[0], epilog="\n".join(presets),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    comments = dict(re.findall(r"\n    (\w+): .*?  # (.*)", inspect.getsource(Config)))
    for field in dataclasses.fields(Config):
        names = {f"--{field.name}", f"--{field.name.replace('_', '-')}"}
        action = argparse.BooleanOptionalAction if field.type is bool else "store"
        text = f"{comments[field.name]} [{field.default}]"
        parser.add_argument(*sorted(names), action=action, help=text)
    return Config.of(**vars(parser.parse_args(argv)))


@dataclasses.dataclass
class Config(Settings):
    preset: str = "laptop"  # named settings, listed below; other flags override them
    # data
    data: str = "auto"  # auto, stand-in, or a text file in UTF-8
    holdout: bool = False  # for tuning: evaluate on the last tenth of the training text
    # model
    width: int = 256  # dimension D of a token's vector
    blocks: int = 3  # blocks, each of attention and an MLP
    heads: int = 4  # attention heads H, each of dimension D / H
    hidden: int = 1024  # neurons of an MLP
    seq_len: int = 256  # characters in a window
    activation: str = "gelu"  # gelu, divided by 1.1289, or maxmin, which sorts pairs of neurons
    content: str = "all"  # blocks by content, others by position: all, odd, last, none, or as 0,2
    positions: str = "rope"  # of content: rope, or bias on logits, as by position
    logit_scale: float = 1.0  # factor on the attention logits q.k / (D / H), by content
    cap: float = 0.0  # largest RMS of a head's queries, keys and values by content; 0: no cap
    key_offset: bool = False  # half of the heads by content give a token the key of the one before
    attention_scale: float = 1 / 3  # factor on the output of attention; 0: 1 / sqrt(H)
    residual_scale: float = 1.0  # x <- (1 - a) x + a f(x), with a = residual_scale / (2 * blocks)
    final_scale: float = 1.0  # fixed factor on the logits, counted in bounds
    w_max: str = "6"  # limit on RMS->RMS norms: one for all, or 7, of q,k,v,o,in,out,head
    # training
    optimizer: str = "muon"  # of the matrices: muon or adamw
    constraint: str = "soft_cap"  # a name in constraints.py, or a function of yours: FILE.py:NAME
    constrain_every: int = 4  # a constraint that can wait runs at about every so many steps
    steps: int = 600  # training steps
    batch: int = 32  # windows a step
    lr: float = 0.0  # peak learning rate of the matrices; 0: 0.1 for Muon, or 0.003 for AdamW
    warmup: int = 0  # steps over which learning rates rise to their peaks
    embed_lr: float = 0.02  # peak learning rate of the embedding (Adam)
    bias_lr: float = 0.1  # peak learning rate of the position bias (Adam)
    momentum: float = 0.95  # Muon's momentum, or AdamW's first beta
    loss_temperature: float = 1.0  # factor on the logits in the loss; bounds are without it
    margin: float = 0.0  # taken from the right logit in the training loss, after the temperature
    # run
    seed: int = 0  # of initialisation, order of the data, samples
    dtype: str = "auto"  # of the products in training: auto, float32, bfloat16
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto: cuda if there is one
    evals: int = 4  # evaluations on all validation text, each with a checkpoint
    out: str = ""  # run folder, in which a stopped run goes on; default: a new one in runs/
    # sample
    sample: str = ""  # a run folder: do not train, only sample from its model
    prompt: str = ""  # text that the sample continues; default: the start of a line
    length: int = 500  # characters to sample
    temperature: float = 0.8  # of the sample; 0: always the most probable character

    def limits(self):
        """{role of a matrix: its w_max}. UserError where settings do not fit each other."""
        with explain(f"--w_max {self.w_max}", "give a number above 0, or 7 of them with commas"):
            limits = [float(limit) for limit in self.w_max.split(",")]
            if len(limits) == 1:
                limits *= 7
            if len(limits) != 7 or not all(0 < limit < math.inf for limit in limits):
                raise ValueError(f"it is {limits}")
        if self.width % (2 * self.heads):
            raise UserError(f"--heads {self.heads}: must divide the width, {self.width}, into even "
                            "parts, as RoPE turns pairs")
        with explain(f"--content {self.content}", "give all, odd, last, none, or as 0,2"):
            if not self.content_blocks() <= set(range(self.blocks)):
                raise ValueError(f"the last block is {self.blocks - 1}")
        if self.residual_scale > 2 * self.blocks:
            raise UserError(f"--residual_scale {self.residual_scale}: must be at most 2 * blocks")
        if self.activation == "maxmin" and self.hidden % 2:
            raise UserError(f"--hidden {self.hidden}: must be even for maxmin, which sorts pairs")
        preset_lr = PRESETS.get(self.preset, {}).get("lr")
        if self.optimizer == "adamw" and self.lr == preset_lr:
            raise UserError(f"--lr {self.lr}: is the preset's, for Muon, and too large for AdamW; "
                            "give such as --lr 0.003 --warmup 100")
        return dict(zip(ROLES, limits))

    @property
    def mix(self):
        """The share a of each sublayer in x <- (1 - a) x + a f(x)."""
        return self.residual_scale / (2 * self.blocks)

    def content_blocks(self):
        """The set of blocks whose attention looks at content."""
        n = self.blocks
        named = dict(none=[], odd=range(1, n, 2), last=[n - 1], all=range(n))
        if self.content in named:
            return set(named[self.content])
        return {int(number) for number in self.content.split(",")}


CHOICES = dict(activation=("gelu", "maxmin"), positions=("rope", "bias"),
               optimizer=("muon", "adamw"), dtype=("auto", "float32", "bfloat16"))
PAPER = dict(batch=512, steps=2000, evals=10)  # and the defaults above
# For a small constant: attention by position, where the pattern does not depend on the input, so
# that it adds nothing to the bound; MaxMin, which shortens no vector; a larger share a.
SMALL = dict(activation="maxmin", content="none", attention_scale=0.0, blocks=4, heads=2,
             residual_scale=4.0, w_max="1.3", lr=0.1)
PLAIN100 = dict(SMALL, final_scale=39.5, steps=3200)
PRESETS = {
    "laptop": dict(SMALL, heads=4, hidden=512, w_max="2", final_scale=10.0, steps=800, lr=0.08,
                   embed_lr=0.05, momentum=0.9),
    "paper": PAPER,
    "paper_adamw": dict(PAPER, optimizer="adamw", constraint="none", momentum=0.9, warmup=100),
    "plain100": PLAIN100,  # a constant below 100, with a loss temperature of 1
    # The same training with a constant below 2: a 50th of the logits, and the loss sees 50 times
    # them. Where the loss temperature is free, compare certified tokens, not constants.
    "lipschitz2": dict(PLAIN100, final_scale=0.79, loss_temperature=50.0),
    "certified": dict(SMALL, w_max="1", final_scale=12.0, steps=1400, margin=2.0),
}


# ==== Model: attention and MLP, each mixed into the residual stream, and no norm layer ============
GELU_SLOPE = 1.128993069  # the steepest slope of GeLU's tanh form, rounded up (erf form: 1.1289042)
GELU_SCALE = 1.1289  # what the paper divides GeLU by: a little less than its slope


def rotate(x_BHTE):
    """The paper's RoPE: at t each pair (i, i + E/2) is reflected at a line through the origin.

    The line has the angle t / (2 period). (x, y) becomes (x cos + y sin, x sin - y cos), which
    keeps its length. A product of two reflections is a rotation. So of the positions t and j, q.k
    depends on t - j alone.
    """
    T, E = x_BHTE.shape[-2:]
    period = 10000 ** (torch.arange(E // 2).double() / (E // 2))  # longer from pair to pair
    angle = torch.arange(T).double()[:, None] / period
    cos = angle.cos().to(x_BHTE)
    sin = angle.sin().to(x_BHTE)
    x, y = x_BHTE.chunk(2, -1)
    # addcmul(a, b, c) is a + b c, with one rounding less in bfloat16.
    return torch.cat([torch.addcmul(x * cos, y, sin), torch.addcmul(-y * cos, x, sin)], -1)


class Block(torch.nn.Module):
    """x <- (1 - a) x + a attention(x), then x <- (1 - a) x + a mlp(x), with a = mix. No biases.

    For a <= 1 that is an average: if attention and mlp have a Lipschitz constant of 1, the block
    has it, too, and so has a chain of any number of blocks.
    """

    def __init__(self, config, index):
        super().__init__()
        self.config = config
        self.mix = config.mix
        self.attention_scale = config.attention_scale or config.heads**-0.5
        D = config.width
        self.sees_content = index in config.content_blocks()
        self.has_bias = config.positions == "bias" or not self.sees_content
        if self.sees_content:
            self.q = torch.nn.Parameter(torch.zeros(D, D))
            self.k = torch.nn.Parameter(torch.zeros(D, D))
        self.v = torch.nn.Parameter(torch.zeros(D, D))
        self.o = torch.nn.Parameter(torch.zeros(D, D))
        self.w_in = torch.nn.Parameter(torch.zeros(config.hidden, D))
        self.w_out = torch.nn.Parameter(torch.zeros(D, config.hidden))
        if self.has_bias:
            # At first head h of block i looks h * 2^i characters back (h * 32 from i = 5 on). The
            # shorter these steps are, the more sharply it looks.
            step = 2 ** min(index, 5)
            centre_H = (step * torch.arange(config.heads)).clamp(max=config.seq_len - 1)
            distance_HT = (torch.arange(config.seq_len) - centre_H[:, None]).abs()
            self.bias_HT = torch.nn.Parameter(-2.0 / step * distance_HT)

    def matrices(self):
        """[(role, matrix)]"""
        parameters = self.named_parameters()
        return [(name.removeprefix("w_"), W) for name, W in parameters if name != "bias_HT"]

    def attention(self, x_BTD):
        """out_t = beta sum_h o_h sum_(j <= t) P^h_tj v_h x_j, with the pattern
        P^h_t = softmax over j of s (q_h x_t) . (k_h x_j) + bias_h(t - j), RoPE before the dot,
        beta = attention_scale and s = logit_scale / E. With a cap queries, keys and values are
        scaled down first.
        """
        B, T, D = x_BTD.shape
        position_T = torch.arange(T, device=x_BTD.device)
        distance_TT = position_T[:, None] - position_T
        bias_HTT = torch.zeros(1, T, T, device=x_BTD.device)
        if self.has_bias:
            bias_HTT = self.bias_HT[:, distance_TT.clamp(min=0)]
        bias_HTT = bias_HTT.masked_fill(distance_TT < 0, -math.inf)  # tokens to come are not seen
        average = self.by_content if self.sees_content else self.by_position
        y_BTD = average(x_BTD, bias_HTT).transpose(1, 2).reshape(B, T, D)
        return F.linear(y_BTD, (self.attention_scale * self.o).to(x_BTD.dtype))

    def by_content(self, x_BTD, bias_HTT):
        """sum_j P^h_tj v_h x_j (B, H, T, E), where each window has patterns of its own."""
        B, T, D = x_BTD.shape
        H = self.config.heads
        s = self.config.logit_scale / (D // H)
        W = torch.cat([s * self.q, self.k, self.v]).to(x_BTD.dtype)
        parts = F.linear(x_BTD, W).view(B, T, 3 * H, D // H).transpose(1, 2)
        q_BHTE, k_BHTE, v_BHTE = parts.chunk(3, 1)
        if self.config.cap:
            # Vectors above the cap are scaled down to it, and others stay as they are. That is the
            # projection onto a ball, which brings no two vectors further apart. So attention has a
            # Lipschitz constant for tokens of any length, and q.k adds at most logit_scale * cap^2
            # to each attention logit.
            q_BHTE = cap_rows(q_BHTE, s * self.config.cap)
            k_BHTE = cap_rows(k_BHTE, self.config.cap)
            v_BHTE = cap_rows(v_BHTE, self.config.cap)
        if self.config.key_offset:
            # In half of the heads a token gets the key of the one before it. Such a head finds what
            # came after characters like the present one. So one block can copy, where otherwise two
            # are needed. The bound is the same, as it lets keys come from any token. From
            # modded-nanogpt, which offsets half of each head: that would lengthen keys, and so the
            # bound, by up to sqrt(2).
            own_BHTE = k_BHTE[:, H // 2:]
            before_BHTE = torch.cat([own_BHTE[:, :, :1], own_BHTE[:, :, :-1]], 2)
            k_BHTE = torch.cat([k_BHTE[:, :H // 2], before_BHTE], 1)
        if self.config.positions == "rope":
            q_BHTE = rotate(q_BHTE)
            k_BHTE = rotate(k_BHTE)
        # On a CPU this is faster than scaled_dot_product_attention: 306 and 420 ms a step.
        logits_BHTT = (q_BHTE @ k_BHTE.mT).add_(bias_HTT.to(x_BTD.dtype))
        return logits_BHTT.softmax(-1) @ v_BHTE

    def by_position(self, x_BTD, bias_HTT):
        """The same where patterns depend on distances only, so that all windows share them."""
        B, T, D = x_BTD.shape
        H = self.config.heads
        v_BTHE = F.linear(x_BTD, self.v.to(x_BTD.dtype)).view(B, T, H, D // H)
        v_HTBE = v_BTHE.permute(2, 1, 0, 3)
        pattern_HTT = bias_HTT.softmax(-1).to(x_BTD.dtype)
        y_HTBE = (pattern_HTT @ v_HTBE.reshape(H, T, -1)).view(v_HTBE.shape)  # one large product
        return y_HTBE.permute(2, 0, 1, 3)

    def mlp(self, x_BTD):
        """w_out maxmin(w_in x), or w_out gelu(w_in x) / 1.1289 with GeLU in its tanh form."""
        dtype = x_BTD.dtype
        h = F.linear(x_BTD, self.w_in.to(dtype))
        if self.config.activation == "maxmin":
            return F.linear(maxmin(h), self.w_out.to(dtype))
        # In bfloat16 the exact form: faster on a CPU, and GELU_SLOPE is above its slope, too.
        form = "none" if dtype == torch.bfloat16 else "tanh"
        return F.linear(F.gelu(h, approximate=form), (self.w_out / GELU_SCALE).to(dtype))

    def forward(self, x_BTD):
        x_BTD = torch.lerp(x_BTD, self.attention(x_BTD), self.mix)
        return torch.lerp(x_BTD, self.mlp(x_BTD), self.mix)


class Transformer(torch.nn.Module):
    """Embedding (V vectors of RMS at most 1), blocks, head: logits = final_scale * head x."""

    def __init__(self, config, vocabulary):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.mix = config.mix
        generator = torch.Generator().manual_seed(config.seed)
        embedding_VD = torch.randn(len(vocabulary), config.width, generator=generator)
        self.embedding_VD = torch.nn.Parameter(cap_rows(embedding_VD))
        self.blocks = torch.nn.Sequential(*[Block(config, i) for i in range(config.blocks)])
        self.head_VD = torch.nn.Parameter(torch.zeros(len(vocabulary), config.width))
        limits = config.limits()
        stiefel = config.constraint == "stiefel"
        for role, W in self.matrices():
            # All singular values are equal. norm_at_start says what the norm is.
            torch.nn.init.orthogonal_(W, generator=generator)
            if role == "q":
                q_DD = W.detach().clone()
            if role == "k" and config.key_offset:
                # With equal key and query matrices a token attends most to tokens like itself. In
                # the heads with offset keys it attends to what came after these, so it can copy
                # from the first step on: without that some seeds never learn to copy. In the other
                # heads the key matrix has the rows of the query matrix moved on by one, so that no
                # token is preferred.
                half = config.heads // 2 * (config.width // config.heads)
                W.data.copy_(torch.cat([q_DD[:half].roll(1, 0), q_DD[half:]]))
            norm = norm_at_start(config.constraint, limits[role])
            W.data.mul_(sigma_per_norm(W) * norm)
            # o and w_out start at 0, so that each sublayer begins as (1 - a) x. Not where a is
            # large: too little of x would reach the head.
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


def build_model(config, state):
    """The model of a checkpoint, before its weights are loaded."""
    return Transformer(config, state["vocabulary"])


# ==== Certificate: how far logits can move when embeddings do, from the weights alone =============
# Two sequences of embeddings differ by an RMS of at most 1 at each token, and all are in a ball.
# How far can the outputs of the blocks differ? Part III of constraints.py derives it, by a product
# of norms that counts heads, and by ellipsoids, which know in what directions a difference is long.
# The smaller of the two counts. What is this model's own:
#   1. In attention by position, ellipsoids use the least weight that a head gives to the token at
#      which it stands. The more tokens a softmax sees, the less it gives to one of them. So that is
#      the weight at the last position, softmax(bias)[0].
#   2. Let f be the logits, and u the rows of U = final_scale head. If all embeddings change by an
#      RMS of at most 1, f_y - f_j changes by at most L_yj, the smaller of two bounds. One is the
#      largest |(u_y - u_j) z| in the last ellipsoid. The other is |u_y - u_j| sqrt(D) times the
#      product without the head.
#   3. If f_y - f_j > rho L_yj for all j != y, y stays the largest logit when every embedding moves
#      by RMS <= rho. All these embeddings are in a ball, whose radius is the largest RMS in the
#      table plus rho. L_yj is computed for that ball.
#   4. The ellipsoids have trainable weights: of the parts of a sum, of neurons and their share, of
#      heads, of pairs that RoPE turns. Any weights give a valid bound. They start at zero, and
#      `tuned` improves them by descent on the bound.
@torch.no_grad()
def certificate(model, rho=0.0, free=None):
    """Bounds of a model: what transformer_bounds in constraints.py returns, and norms.

    log10     the certificate used, log10 of a constant from embeddings to logits (max-token RMS)
    norms     {role: largest RMS->RMS norm of its matrices; of the embedding: largest RMS}
    max_weight_norm: the largest of them, without the embedding
    Arguments: rho is how far (RMS) embeddings may be from those of the table; free, the trainable
    weights of step 4 that `tuned` found, or None for zeros.
    """
    model = exact_copy(model)
    norms = {}
    for role, W in model.matrices():
        norms[role] = max(norms.get(role, 0.0), exact_norm(W).item())
    largest = max(norms.values())
    norms["embedding"] = largest_embedding(model)
    U_VD = model.config.final_scale * model.head_VD
    bounds = transformer_bounds(describe_blocks(model), norms["embedding"] + rho, U_VD, free)
    return dict(bounds, norms=norms, max_weight_norm=largest)


def exact_copy(model):
    """The model in float64 on the CPU, without gradients. UserError if a weight is not finite."""
    model = copy.deepcopy(model).cpu().double().requires_grad_(False)
    for name, values in model.named_parameters():
        if not values.isfinite().all():
            raise UserError(f"{name} of the model is not finite: there is nothing to certify")
    return model


def largest_embedding(model):
    """The largest RMS of a token's vector: radius of the ball."""
    return model.embedding_VD.square().mean(1).max().sqrt().item()


def describe_blocks(model):
    """Of each block what transformer_bounds takes; of a model in float64."""
    config = model.config
    gelu = (GELU_SLOPE, GELU_SCALE) if config.activation == "gelu" else None
    described = []
    for block in model.blocks:
        own_share_H = None  # unknown, by content
        if not block.sees_content:
            own_share_H = block.bias_HT.softmax(1)[:, 0]  # step 1
        described.append(block_bounds(
            dict(block.matrices()), config.heads, block.mix, block.attention_scale, own_share_H,
            config.logit_scale, rotates=config.positions == "rope", gelu=gelu, cap=config.cap))
    return described


@torch.enable_grad()
def tuned(model, steps=30, free=None, pairs=False):
    """The weights of step 4, trained from `free` on: for the bound, or the mean log of pairs.

    Those of networks wider than TUNED_WIDTH stay as they are.
    """
    if model.config.width > TUNED_WIDTH:
        steps = 0
    model = exact_copy(model)
    blocks = describe_blocks(model)
    R = largest_embedding(model)
    U_VD = model.config.final_scale * model.head_VD

    def goal(weights):
        S, log = ellipsoid_blocks(blocks, R, weights)[-1]
        if not pairs:
            return ellipsoid_norm(S, log, U_VD)
        log_VV = ellipsoid_pairs(S, log, U_VD)
        return log_VV[log_VV > -math.inf].mean()

    return tune(goal, copy.deepcopy(free or {}), steps)


@torch.no_grad()
def certified_tokens(model, tokens_N, free=None, rhos=RHOS):
    """{rho: bool of each position}: right, however far up to rho (RMS) every embedding moves."""
    model = exact_copy(model)
    U_VD = model.config.final_scale * model.head_VD
    D = model.config.width
    steps = 20 if len(U_VD) <= 1024 else 0  # with more characters a step takes seconds
    weights = tuned(model, steps, free, pairs=True)
    eye_DD = torch.eye(D).double()
    rows_VV = ellipsoid_pairs(eye_DD, math.log(D), U_VD) / LN10  # |u_y - u_j| sqrt(D)
    needed_VV = {}  # {rho: rho L_yj, which margins must exceed}
    for rho in rhos:
        bound = certificate(model, rho, weights)
        pairs_VV = ellipsoid_pairs(*bound["after"][-1], U_VD) / LN10
        constant_VV = torch.minimum(pairs_VV, rows_VV + bound["body_log10"])  # L_yj of step 2
        needed_VV[rho] = 10 ** (constant_VV + math.log10(rho))
        needed_VV[rho].fill_diagonal_(-math.inf)
    certified = {rho: [] for rho in rhos}
    for x_BT, y_BT in windows(tokens_N, model.config.seq_len):
        logits_NV = model(x_BT, torch.float64).flatten(0, 1)
        y_N = y_BT.flatten()
        margin_NV = logits_NV.gather(1, y_N[:, None]) - logits_NV
        margin_NV -= 1e-9 * logits_NV.abs().amax(1, keepdim=True)  # for rounding
        for rho in rhos:
            certified[rho].append((margin_NV > needed_VV[rho][y_N]).all(1))
    return {rho: torch.cat(parts) for rho, parts in certified.items()}


# ==== Data: a text, as numbers ====================================================================
TEXT_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load_data(config):
    """(train_N, validation_N, vocabulary, name): int64 tokens, sorted characters; 90 % to train."""
    text, name = load_text(config.data)
    vocabulary = "".join(sorted(set(text)))
    needed = 20 * (config.seq_len + 1)
    if len(text) < needed or not 2 <= len(vocabulary) <= 4096:  # certificates hold tables of V x V
        raise UserError(f"--data {name}: has {len(text)} characters, {len(vocabulary)} different; "
                        f"give {needed} or more (or a smaller --seq_len), 2 to 4096 different")
    tokens_N = encode(text, vocabulary)
    split = int(0.9 * len(tokens_N))
    if config.holdout:
        tokens_N = tokens_N[:split]
        split = int(0.9 * split)
        name += ", evaluated on training text held out"
    return tokens_N[:split], tokens_N[split:], vocabulary, name


def load_text(data):
    """(text, name): of a file, of Shakespeare's plays, or of the stand-in."""
    path = Path(data).expanduser()
    if data == "auto":
        path = Path(os.environ.get("DATA_DIR", "nowhere"), "tinyshakespeare", "input.txt")
        if not path.is_file():
            try:
                path = download()
            except Exception as problem:  # networks and caches fail in dozens of ways
                print("Shakespeare is not in $DATA_DIR/tinyshakespeare/input.txt, and cannot be "
                      f"downloaded: {problem}\n"
                      "TRAINING ON A STAND-IN, source code of Python's library.", flush=True)
                data = "stand-in"
    if data == "stand-in":
        return stand_in(), STAND_IN
    with explain(f"--data {data}: cannot be read", "give a text file in UTF-8 (iconv makes one)"):
        return path.read_text(encoding="utf-8-sig"), str(path)  # -sig drops a byte-order mark


def download():
    """Path of Shakespeare's plays in torch's cache, to which they come from the network."""
    path = Path(torch.hub.get_dir(), "tinyshakespeare", "input.txt")
    if not path.is_file():
        text = urllib.request.urlopen(TEXT_URL, timeout=4).read(2**22)
        if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
            raise OSError("what came from the network is another text")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text)
    return path


STAND_IN = f"stand-in, Python {platform.python_version()}"  # another version's text differs


def stand_in(characters=1_115_394):
    """Text that is on every machine: the source of Python's standard library, ASCII only."""
    other = bytes(set(range(256)) - {ord("\n"), *range(ord(" "), ord("~") + 1)})
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes().translate(None, other) for path in paths)
    return text[:characters].decode()


def encode(text, vocabulary):
    """The characters' numbers, int64 (N,)."""
    number = {character: i for i, character in enumerate(vocabulary)}
    unknown = sorted(set(text) - number.keys())
    if unknown:
        raise UserError(f"--prompt: the model does not know {unknown}, only {vocabulary[:100]!r}")
    return torch.tensor([number[character] for character in text], dtype=torch.int64)


def choose_batch(step, tokens_N, config):
    """(x_BT, y_BT): random windows, and what follows each character."""
    # They depend on seed and step alone: so a run that goes on has the same.
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    places = len(tokens_N) - config.seq_len
    start_B1 = torch.randint(places, (config.batch, 1), generator=generator)
    index_BT = start_B1 + torch.arange(config.seq_len)
    return tokens_N[index_BT], tokens_N[index_BT + 1]


def windows(tokens_N, T, batch=None):
    """Batches (x_BT, y_BT) of windows side by side: each token but the first is predicted once."""
    batch = batch or max(1, 8192 // T)
    whole = (len(tokens_N) - 1) // T * T
    x_ST = tokens_N[:whole].view(-1, T)
    y_ST = tokens_N[1:whole + 1].view(-1, T)
    yield from zip(x_ST.split(batch), y_ST.split(batch))
    if whole + 1 < len(tokens_N):
        yield tokens_N[None, whole:-1], tokens_N[None, whole + 1:]


# ==== A run, its folder and its checkpoint (the same text in the three tutorials) =================
# On a first reading go on with Main. Some names here occur in the other tutorials only.
# What may change where a stopped run goes on: where things are, how many sequences are in memory at
# once, and what is for sampling only.
PLACES = ("out", "data", "device", "micro_batch", "sample", "prompt", "length", "temperature")


def choose_device(config):
    """(device, dtype that the model computes in)."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"--device {name}: cannot be used here", "try auto"):
        device = torch.zeros(1, device=name).device
    if config.dtype == "auto":
        return device, fast_dtype(device)
    return device, getattr(torch, config.dtype)


def load_checkpoint(folder):
    """(config, model, all that was saved) of a run. Tensors, numbers and text are read, no code."""
    path = Path(folder).expanduser() / "checkpoint.pt"
    with explain(f"{path}: is no checkpoint of {SCRIPT}.py", "give the folder of another run"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**state["config"])
        model = build_model(config, state)
        model.load_state_dict(state["model"])
    return config, model, state


def find_run(config):
    """(all that was saved, summary) of the run in --out; None for what it does not have."""
    folder = Path(config.out).expanduser()
    if not config.out or not (folder / "checkpoint.pt").exists():
        return None, None
    own, _, state = load_checkpoint(folder)
    for name, value in vars(own).items():
        wanted = getattr(config, name)
        if value != wanted and name not in PLACES:
            raise UserError(f"--out {folder}: its run has --{name} {value}, not {wanted}; give "
                            "that, or another --out")
    summary = folder / "summary.json"
    if not summary.exists():
        return state, None
    print(f"The run in {folder} is finished; start another with another --out.")
    return state, json.loads(summary.read_text())


def make_folder(config):
    """The folder of a run, with its config.json: --out, or a new one that no other run shares."""
    stem = f"runs/{SCRIPT}_{config.preset}_seed{config.seed}"
    out = Path(config.out or stem).expanduser()
    number = 1
    while out.exists() and not config.out:
        number += 1
        out = Path(f"{stem}_{number}")
    out.mkdir(parents=True, exist_ok=bool(config.out))
    write(out / "config.json", json.dumps(vars(config), indent=1))
    return out


def write(path, data):
    """Text or bytes, all of it or none: what is written beside takes the place of the old file."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(data if isinstance(data, bytes) else data.encode())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def finite(number):
    """For JSON, which has no infinity: such a number as a word."""
    return number if math.isfinite(number) else str(number)


def save(out, config, step, log, **state):
    """The checkpoint and the log of a run, each written whole."""
    state.update(script=SCRIPT, config=vars(config), step=step, log=log)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(out / "checkpoint.pt", buffer.getvalue())
    write(out / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log))


# ==== Tools of a training loop (the same text in the three tutorials) =============================
def count_steps(start, steps):
    """The steps to come, with a sign of life every ten seconds."""
    began = spoke = time.perf_counter()
    for step in range(start, steps):
        now = time.perf_counter()
        if now - spoke > 10:
            spoke = now
            seconds = (now - began) / (step - start) * (steps - step)
            print(f"step {step:5d}/{steps}  about {seconds:.0f} s left", flush=True)
        yield step


@contextlib.contextmanager
def catch_ctrl_c():
    """A list that Ctrl-C fills, so that a run stops between two steps. A second one interrupts."""
    stops = []

    def stop(number, frame):
        stops.append(number)
        signal.signal(number, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stops
    finally:
        signal.signal(signal.SIGINT, before)


def set_learning_rates(optimizers, factor):
    """Each group of parameters has a peak_lr of its own, and all follow one schedule."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def check_finite(model, losses, step, out):
    """UserError if a loss or a weight is not finite. The last good checkpoint stays."""
    for name, values in [("the loss", losses), *model.named_parameters()]:
        if not values.isfinite().all():
            raise UserError(f"step {step}: training has diverged, {name} is not finite; try a "
                            f"smaller --lr. A last good checkpoint may be in {out}")


def progress(record, steps):
    """A line of the log in words."""
    loss = record.get("val_loss_at_temperature", record["val_loss"])
    bound = power(float(record["lipschitz_log10"]))
    return (f"step {record['step']:5d}/{steps}  train loss {record['train_loss']:.3f}  validation "
            f"loss {loss:.3f}  accuracy {record['val_accuracy']:.2%}  largest norm "
            f"{record['max_weight_norm']:.3f}  untuned bound {bound}  "
            f"{record['ms_per_step']:.0f} ms/step")


def summarize(config, model, record, dtype, **more):
    """summary.json: the last line of the log, what was trained, and where."""
    summary = {key: record[key] for key in record if key not in ("step", "train_loss", "losses")}
    summary.update(
        script=SCRIPT, preset=config.preset, steps=config.steps, seed=config.seed,
        params=sum(p.numel() for p in model.parameters()),
        w_max=None if config.constraint == "none" else config.limits(),
        train_seconds=record["ms_per_step"] * config.steps / 1000,
        device=str(next(model.parameters()).device), dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__, **more)
    return summary


def print_norms(norms, limits):
    """Each norm beside its limit. One that is above it is named, whoever wrote the constraint."""
    for name, norm in norms.items():
        limit = limits.get(name, math.inf)
        verdict = "  ABOVE ITS LIMIT" if norm > limit * (1 + 1e-4) else ""
        print(f"  {name:10} norm (RMS->RMS) {norm:9.4f}   limit {limit:g}{verdict}")


def draw(path, title, log, norms, limits, levels_log10):
    """A picture of a run over its steps.

    norms: of each record {name: norm}; limits: dotted. levels_log10: {name: log10 of a Lipschitz
    constant of the final weights}, dashed beside the bounds.
    """
    from matplotlib.figure import Figure  # not pyplot: whoever calls main keeps their backend
    bounds_log10 = [float(record["lipschitz_log10"]) for record in log]
    small = max(bounds_log10) < 4  # drawn as it is; a larger one by its exponent
    curves = {
        "share of predictions that are right": [record["val_accuracy"] for record in log],
        "norms of the weights, RMS->RMS": [list(each.values()) for each in norms],
        "Lipschitz bound" if small else "Lipschitz bound, log10":
            [10**bound if small else bound for bound in bounds_log10]}
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3)
    steps = [record["step"] for record in log]
    for panel, (label, values) in zip(panels, curves.items()):
        panel.plot(steps, values, ".-")
        panel.set(xlabel="step", ylabel=label)
    for limit in set(limits):
        panels[1].axhline(limit, color="grey", linestyle=":")
    panels[1].legend([*norms[0], "limits"])
    panels[2].lines[0].set_label("valid bound, untuned")
    for (name, level), color in zip(levels_log10.items(), ("black", "tab:red")):
        if math.isfinite(level):
            height = 10**level if small else level
            panels[2].axhline(height, color=color, linestyle="--", label=name)
    panels[2].legend()
    figure.savefig(path, dpi=110)


# ==== Main ========================================================================================
def main(config):
    """Train, go on or sample; certify; report. Returns the summary, or the text sampled."""
    # ---- load
    limits = config.limits()
    if config.sample:
        _, model, _ = load_checkpoint(config.sample)
        device, dtype = choose_device(config)
        return sample(model.to(device), config, dtype)
    with explain(f"--constraint {config.constraint}", "see --help"):
        constraint = find_constraint(config.constraint)
    state, summary = find_run(config)
    if summary:
        return summary
    device, dtype = choose_device(config)
    train_N, validation_N, vocabulary, data_name = load_data(config)
    if state:
        same = (state["vocabulary"], state["tokens"]) == (vocabulary, len(train_N))
        if not same or "stand-in" in data_name + state["data"] and data_name != state["data"]:
            raise UserError(f"--data {data_name}: is another text than that which the run began "
                            f"with, {state['data']}")
    encode(config.prompt, vocabulary)  # so that a wrong prompt is reported before training

    # ---- build
    model = Transformer(config, vocabulary).to(device)
    with explain("These settings of the optimizer cannot be used", "see --help"):
        optimizers = build_optimizers(model, config, limits, constraint, dtype)
    start = 0
    log = []
    if state:
        start = state["step"]
        log = state["log"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    out = make_folder(config)
    print(f"device {device}, {torch.get_num_threads()} CPU threads (OMP_NUM_THREADS), computing in "
          f"{dtype} (--dtype), from step {start}, run folder {out}\n"
          f"data: {data_name}, {len(train_N):,} characters to train, {len(validation_N):,} to "
          f"validate, {len(vocabulary)} different", flush=True)

    # ---- train
    eval_steps = {math.ceil(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    losses = []
    began = time.perf_counter()
    with catch_ctrl_c() as stops:
        for step in count_steps(start, config.steps):
            # A batch consists of windows at random positions of the text. At each position the
            # model sees the characters up to there and must predict the next one. That makes B * T
            # predictions a step.
            inputs_BT, targets_BT = choose_batch(step, train_N, config)

            # The loss multiplies the logits by loss_temperature. A network with a small Lipschitz
            # constant has small logits; the factor lets it be confident all the same. The Lipschitz
            # bound is for the unscaled logits. Subtracting a margin from the scaled logit of the
            # right character asks that it lead by that margin, so that the answer survives a small
            # change of the embeddings.
            #
            # The gradients of a few windows at a time add up to that of the batch. What autograd
            # keeps of many windows would fill a laptop's memory.
            loss = torch.zeros((), device=device)
            for x_BT, y_BT in zip(inputs_BT.split(AT_ONCE), targets_BT.split(AT_ONCE)):
                y_BT = y_BT.to(device)
                logits_BTV = config.loss_temperature * model(x_BT.to(device), dtype)
                if config.margin:
                    logits_BTV = logits_BTV - config.margin * F.one_hot(y_BT, len(vocabulary))
                share = len(x_BT) / config.batch
                part = share * F.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten())
                part.backward()
                loss += part.detach()

            # The learning rate decays linearly to 0. A step of Muon does not become smaller by
            # itself near an optimum, so only this averages the noise of the batches out. AdamW also
            # needs a warmup. Its first step changes every entry by lr, so the norm of a matrix by
            # up to lr * fan_in. Without one the first losses of AdamW in results/compare.py, at a
            # rate of 0.012, are 4.19, 3.66, 7.50. A step of Muon has norm lr from the first on.
            warm = min(1, (step + 1) / max(1, config.warmup))
            set_learning_rates(optimizers, (1 - step / config.steps) * warm)

            # Muon changes every W by an update whose RMS->RMS norm is at most lr, in bfloat16
            # 1.07 lr, whatever the gradient. So the norm of W grows by no more than that. Where it
            # could now exceed w_max, the constraint lowers it, still inside optimizer.step(), and
            # somewhat further than needed, so that it may rest for some steps (constrain_every).
            # Constraints that cannot wait act after every step. With a constraint that guarantees
            # its limit, every matrix is then within it, and so the residual stream and the products
            # q.k are bounded. Other transformers need norm layers for that. The bias by position
            # has no limit. It does not depend on the input, so no bound needs one.
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if config.optimizer == "adamw" and config.constraint != "none":
                # The norm of an AdamW step is not known in advance. So the norm of W is measured
                # after it, and the constraint starts from there. The decays need lr as well.
                for role, W in model.matrices():
                    lr = optimizers[0].param_groups[0]["lr"]
                    W.data.copy_(after_unknown_step(constraint, W, limits[role], lr))
            # Without a cap the bound of attention by content holds only in a ball. Larger
            # embeddings would need a larger one, and so a larger bound: each row's RMS stays at
            # most 1.
            model.embedding_VD.data.copy_(cap_rows(model.embedding_VD.data))

            losses.append(loss)
            done = step + 1
            if done % 10 and done not in eval_steps and not stops:
                continue  # what follows forces a GPU to synchronise
            check_finite(model, torch.stack(losses[-10:]), done, out)
            if done in eval_steps:
                ms_per_step = 1000 * (time.perf_counter() - began) / len(losses)
                log.append(measure(model, validation_N, done, losses, ms_per_step))
                print(progress(log[-1], config.steps), flush=True)
                losses = []
            if done in eval_steps or stops:
                save(out, config, done, log, vocabulary=vocabulary, tokens=len(train_N),
                     data=data_name, model=model.state_dict(),
                     optimizers=[o.state_dict() for o in optimizers])
                began = time.perf_counter()
            if stops:
                raise KeyboardInterrupt(f"saved at step {done}; to resume, repeat the command with "
                                        f"--out {out}")
    return report(config, model, out, log, data_name, validation_N, dtype)


def build_optimizers(model, config, limits, constraint, dtype):
    """The one of the matrices, and Adam for embeddings and biases."""
    if config.optimizer == "muon":
        by_limit = {}  # a group has one limit; in it Muon takes matrices of one shape together
        for role, W in model.matrices():
            by_limit.setdefault(limits[role], []).append(W)
        groups = [dict(params=matrices, w_max=limit, peak_lr=config.lr or 0.1)
                  for limit, matrices in by_limit.items()]
        of_matrices = Muon(groups, momentum=config.momentum, constraint=constraint, dtype=dtype,
                           every=config.constrain_every)
    else:
        matrices = [W for _, W in model.matrices()]
        groups = [dict(params=matrices, peak_lr=config.lr or 0.003)]
        of_matrices = torch.optim.AdamW(groups, betas=(config.momentum, 0.95), weight_decay=0.0)
    groups = [dict(params=[model.embedding_VD], peak_lr=config.embed_lr)]
    biases = [block.bias_HT for block in model.blocks if block.has_bias]
    if biases:
        groups.append(dict(params=biases, peak_lr=config.bias_lr))
    return [of_matrices, torch.optim.Adam(groups, betas=(0.9, 0.95))]


@torch.no_grad()
def evaluate(model, batches):
    """(mean cross-entropy of the logits, that at the loss temperature, accuracy), in float32."""
    device = model.head_VD.device
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    for x_BT, y_BT in batches:
        logits_NV = model(x_BT.to(device)).flatten(0, 1)
        y_N = y_BT.to(device).flatten()
        plain = F.cross_entropy(logits_NV, y_N, reduction="sum")
        hot = F.cross_entropy(model.config.loss_temperature * logits_NV, y_N, reduction="sum")
        right = (logits_NV.argmax(1) == y_N).sum()
        sums += torch.tensor([plain.item(), hot.item(), right.item()])
        count += len(y_N)
    return (sums / count).tolist()


def measure(model, validation_N, step, losses, ms_per_step):
    """A record of the log. Its bound is untuned, which is quicker."""
    val_loss, hot, val_accuracy = evaluate(model, windows(validation_N, model.config.seq_len))
    bound = certificate(model)
    return dict(
        step=step, train_loss=torch.stack(losses).mean().item(), val_loss=val_loss,
        val_loss_at_temperature=hot, val_accuracy=val_accuracy, norms=bound["norms"],
        max_weight_norm=bound["max_weight_norm"], lipschitz_log10=finite(bound["log10"]),
        ms_per_step=ms_per_step)


def report(config, model, out, log, data_name, validation_N, dtype):
    """The end of a run: tuned certificate, summary.json, table, picture, sample. Returns the
    summary.
    """
    print("Tuning the certificate, counting certified tokens: up to a minute, at width 256 ...",
          flush=True)
    weights = tuned(model)
    bound = certificate(model, free=weights)
    certified = certified_tokens(model, validation_N, weights)
    shares = {f"{rho:g}": right_N.double().mean().item() for rho, right_N in certified.items()}
    summary = summarize(
        config, model, log[-1], dtype, data=data_name, loss_temperature=config.loss_temperature,
        lipschitz_log10=finite(bound["log10"]),
        lipschitz_product_log10=finite(bound["product_log10"]),
        lipschitz_norm="max-token RMS->max-token RMS, embeddings to logits, inside the ball",
        certified_token_accuracy=shares)
    write(out / "summary.json", json.dumps(summary, indent=1))

    print(f"\n{config.preset}: {config.optimizer} + {config.constraint}, {config.steps} steps, "
          f"seed {config.seed}, data: {data_name}\n"
          f"  accuracy {summary['val_accuracy']:.2%}, "
          f"cross-entropy {summary['val_loss_at_temperature']:.3f}")
    if config.loss_temperature != 1:
        print(f"  at a loss temperature of {config.loss_temperature:g}; bounds are without it")
    limits = dict(summary["w_max"] or {}, embedding=1.0)
    print_norms(bound["norms"], limits)
    print("  Lipschitz constant, embeddings to logits (max-token RMS)")
    print(f"    product                   {power(bound['product_log10']):>12}\n"
          f"    ellipsoid                 {power(bound['ellipsoid_log10']):>12}\n"
          f"    certificate: the smaller  {power(bound['log10']):>12}")
    print("  Certified tokens: right, however far up to rho (RMS) every embedding moves")
    for rho, share in shares.items():
        print(f"    rho {rho:21} {share:10.2%}")
    norms = [record["norms"] for record in log]
    title = f"{config.preset}, {data_name}"
    levels_log10 = {"valid bound, tuned, at the end": float(summary["lipschitz_log10"])}
    draw(out / "curves.png", title, log, norms, limits.values(), levels_log10)

    print("-" * 80)
    sample(model, config, dtype)
    print("-" * 80)
    print(f"Picture, log, checkpoint: {out}. Sample: python {SCRIPT}.py --sample {out}\n"
          f"Attack its claims: python verify_lipschitz.py {out}")
    return summary


@torch.no_grad()
def sample(model, config, dtype):
    """Print and return the prompt and `length` characters. Each sees the seq_len before it."""
    vocabulary = model.vocabulary
    text = config.prompt
    tokens = encode(text or vocabulary[0], vocabulary).tolist()  # the first is mostly a newline
    print(text, end="")
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.length):
        window_BT = torch.tensor([tokens[-model.config.seq_len:]], device=model.head_VD.device)
        logits_V = model(window_BT, dtype)[0, -1].cpu().double() * model.config.loss_temperature
        z_V = (logits_V - logits_V.max()) / (config.temperature or 1e-30)
        token = torch.multinomial(z_V.softmax(0), 1, generator=generator).item()
        tokens.append(token)
        text += vocabulary[token]
        print(vocabulary[token], end="", flush=True)
    print()
    return text


# ==== On the command line (the same text in the three tutorials) ==================================
def run_script():
    """main on the command line. What the user can mend is one line, without a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack characters of a text
        sys.stdout.reconfigure(errors="replace")
    torch.set_flush_denormal(True)  # a softmax has many such numbers, which are slow on a CPU
    try:
        main(parse_arguments())
        return 0
    except (UserError, OSError, KeyboardInterrupt) as problem:
        interrupted = "interrupted outside of training; nothing new is saved"
        print(f"{SCRIPT}.py: {str(problem) or interrupted}", file=sys.stderr)
        return 130 if isinstance(problem, KeyboardInterrupt) else 2


if __name__ == "__main__":
    sys.exit(run_script())
