"""Attacks every certificate of a training run, from its checkpoint alone. Exit status 0: all held; 1: one is broken.

WHAT IT SHOWS. A certificate is a claim that no pair of inputs exceeds a number. This script computes the
numbers again, in float64, and then looks for the pair: layer by layer, block by block and end to end, in
the norm in which each is claimed and inside the ball for which it is claimed. What it finds is a lower
bound on the true constant; found / certified is the tightness. Above 1 is a bug. Besides: weight norms
against their limits, activations against the radius, certified predictions against attacks.

COMMANDS
    python verify_lipschitz.py runs/NAME [...]      # run folders, folders of them, or published .npz files
    python verify_lipschitz.py                      # all of runs/; if there is none, trains two small models
    python verify_lipschitz.py runs/NAME --budget 20                        # search twenty times as long

RESULT. Every preset of the three tutorials held, in 10 s to two minutes each on two cores (results/).

ANCESTRY. Projected gradient attacks: Madry et al. (2018), with the margin of Carlini and Wagner (2017).
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import mlp_cifar
import nanogpt_lipschitz
import shakespeare
from constraints import exact_norm


# ==== Config ======================================================================================
def flag(default, text, low, high):
    """A field: its default, its help and its range."""
    return dataclasses.field(default=default, metadata=dict(help=text, range=(low, high)))


@dataclasses.dataclass
class Config:
    budget: float = flag(1.0, "multiplies the steps of every search", 1e-6, 1e4)
    images: int = flag(300, "test images to attack", 1, 10_000)
    windows: int = flag(24, "windows of validation text to attack", 1, 10_000)
    data: str = flag("", "data to take these from; default: as in training", "", "\U0010ffff")
    seed: int = flag(0, "seed of the searches", 0, 2**31 - 1)


class UserError(Exception):
    """What the user can mend, in one line. Exit status 2."""


ERRORS = (UserError, mlp_cifar.UserError, shakespeare.UserError, nanogpt_lipschitz.Refusal)


def parse_arguments(argv=None):
    """(run folders and files, Config) of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("RESULT")[0], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run folders, folders of run folders, published .npz [runs]")
    for f in dataclasses.fields(Config):
        parser.add_argument("--" + f.name, type=f.type, default=f.default, help=f"{f.metadata['help']} [{f.default}]")
    given = vars(parser.parse_args(argv))
    runs, config = given.pop("runs"), Config(**given)
    for f in dataclasses.fields(Config):
        low, high = f.metadata["range"]
        if not low <= getattr(config, f.name) <= high:
            parser.error(f"--{f.name} {getattr(config, f.name)}: must be from {low} to {high}")
    return runs, config


# Shapes: S searches side by side, T tokens (1 for an image), D dimension of a token's vector, O of an output's, N images
# or positions, P pixels, K classes, V characters. Everything here is float64 and on the CPU: a claim about real numbers
# is not to be tried in an arithmetic that makes errors of the size looked for.
TOLERANCE = 1e-8  # what rounding can add to a quotient of differences at the smallest distance below, relative


# ==== SEARCH: two inputs whose outputs are as far apart as possible for their distance ============
# A map f of sequences has constant L on a ball if for all x, d with x + d and x - d in the ball
#     max_t rms(f(x + d)_t - f(x - d)_t)  <=  L * 2 max_t rms(d_t).
# So any such quotient is a lower bound on L, whatever the distance, and the Jacobian is the case of d -> 0. Differences at
# finite distance are searched, not Jacobians: where f is piecewise linear (ReLU, MaxMin) a Jacobian does not change with x,
# and gives no direction in which to move x. For d = h w with rms(w_t) = 1 at every token and output token t:
#   1. u = (f(x + d) - f(x - d))_t, made of length 1, is the direction in which that output moved.
#   2. v = d/dw <u, f(x + h w)_t - f(x - h w)_t>; the w that maximises <v, w> is v, normalised token by token.
#      With x fixed, f linear and one token this is power iteration; it never gets worse.
#   3. Each token of x follows the gradient of the same quantity, by steps that shrink to 0, and stays in the ball; w goes
#      0.3 of the way to v only, or x, w and the patterns of attention do not find each other (with several heads).
# Each search has an output token of its own to move (following whichever moved most, all end in the first ones, which
# see few others), and a distance h of its own, from 1e-6 to 0.5 of the ball's radius. In the last third x rests where it was
# best, h is small, and w takes the whole steps of 2.
def rms(x):
    return x.square().mean(-1).sqrt()


def into_ball(x_STD, radius):
    """Each token scaled back to an RMS of at most radius."""
    return x_STD * (radius / rms(x_STD).clamp(min=radius))[..., None] if math.isfinite(radius) else x_STD


def climb(f, x_STD, radius=math.inf, steps=80, seed=0, aim_SO=None, w_STD=None):
    """The largest quotient found, (S,): max_t rms(f(x + d) - f(x - d))_t / (2 max_t rms(d_t)), both ends in the ball.

    f       maps (S, T, D) to (S, T, O), each of S by itself
    x_STD   where to start (put into the ball); w_STD likewise for the direction, random if not given
    radius  of the ball, in RMS at every token; infinite for maps whose constant is global
    aim_SO  instead of the rms of the output, look at |<aim, output>| * sqrt(1 / D): for a single linear function of it
    """
    generator = torch.Generator().manual_seed(seed)
    S, T, _ = x_STD.shape
    scale = radius if math.isfinite(radius) else 1.0
    h_S = scale * torch.logspace(-6, math.log10(0.5), S, dtype=torch.float64)[torch.randperm(S, generator=generator)]
    x_STD = into_ball(x_STD.double(), radius)
    w_STD = torch.randn(x_STD.shape, generator=generator, dtype=torch.float64) if w_STD is None else w_STD
    own_S = T - 1 - torch.arange(S) % T
    best_S, best = torch.zeros(S, dtype=torch.float64), [x_STD.clone(), w_STD.clone()]
    moving = steps * 2 // 3
    for step in range(steps):
        if step == moving:  # from here on w alone is improved, where it was best, at a small distance
            x_STD, w_STD = best
            h_S = torch.full_like(h_S, 1e-4 * scale)
        x_STD = into_ball(x_STD, radius - h_S.max().item() if step >= moving else radius)
        x, w = x_STD.detach().requires_grad_(), (w_STD / rms(w_STD).clamp(min=1e-300)[..., None]).detach().requires_grad_()
        d = h_S[:, None, None] * w
        if math.isfinite(radius):  # both ends inside, or the claim is not about them
            ends = [into_ball(x + d, radius), into_ball(x - d, radius)]
        else:
            ends = [x + d, x - d]
        apart_STO = f(ends[0]) - f(ends[1])
        distance_S = rms((ends[0] - ends[1]).detach()).amax(-1).clamp(min=1e-300)
        if aim_SO is None:
            length_ST = rms(apart_STO.detach())
            found_S = length_ST.amax(-1) / distance_S
            t_S = own_S if step < moving else length_ST.argmax(-1)
            u_SO = apart_STO.detach()[torch.arange(S), t_S]
        else:
            t_S = torch.zeros(S, dtype=torch.int64)
            u_SO = aim_SO
            found_S = (apart_STO.detach()[:, 0] * u_SO).sum(-1).abs() / distance_S / x_STD.shape[-1] ** 0.5
        better = found_S > best_S
        best_S = torch.where(better, found_S, best_S)
        best = [torch.where(better[:, None, None], new, old) for new, old in zip((x.detach(), w.detach()), best)]
        u_SO = u_SO / u_SO.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        gain = (apart_STO[torch.arange(S), t_S] * u_SO).sum()
        x_gradient, w_gradient = torch.autograd.grad(gain, (x, w), allow_unused=True, materialize_grads=True)
        # (a token that the output does not see has no gradient: it keeps its direction)
        silent_ST = rms(w_gradient) < 1e-12 * rms(w_gradient).amax(-1, keepdim=True).clamp(min=1e-300)
        w_STD = torch.where(silent_ST[..., None], w.detach(), w_gradient / rms(w_gradient).clamp(min=1e-300)[..., None])
        if step < moving:
            w_STD = 0.7 * w.detach() + 0.3 * w_STD
            x_STD = x.detach() + 0.15 * scale * (1 - step / moving) * x_gradient / rms(x_gradient).clamp(min=1e-300)[..., None]
    return best_S


class Table:
    """The claims and what was found against them."""

    def __init__(self):
        self.rows = []

    def add(self, where, what, certified, found, norm, slack=TOLERANCE):
        """One row; broken if found is above certified by more than a relative `slack`. Logarithms may be given as Log."""
        certified, found = log10(certified), log10(found)
        broken = math.isnan(certified) or math.isnan(found) or found > certified + math.log10(1 + slack)
        tightness = 10 ** (found - certified) if math.isfinite(found) and certified < math.inf else 0.0
        self.rows.append(dict(where=where, what=what, norm=norm, certified_log10=certified, found_log10=found,
                              tightness=tightness, broken=broken))

    def add_shares(self, where, what, attacked_N, certified_N, norm):
        """Predictions that survived an attack, and those certified: the share of the second is at most that of the first,
        and no prediction that fell may be among the certified."""
        attacked, certified = attacked_N.double().mean().item(), certified_N.double().mean().item()
        self.rows.append(dict(where=where, what=what, norm=norm, certified_log10=log10(certified), found_log10=log10(attacked), share=True,
                              tightness=certified / max(attacked, 1e-300), broken=(certified_N & ~attacked_N).any().item()))

    def broken(self):
        return [row for row in self.rows if row["broken"]]


class Log(float):
    """A number given by its logarithm to base 10, as it may overflow."""


def log10(x):
    return float(x) if isinstance(x, Log) else math.nan if math.isnan(x) else math.log10(x) if x > 0 else -math.inf


# ==== MLP: an image is one token, so that the same search serves. RMS->RMS = l2->l2 * sqrt(3072 / 10) 
HELD_EVERY_STEP = ("specnorm", "stiefel", "soft_cap", "hard_cap")  # constraints that promise a limit, whatever the optimizer
SLACK = 1e-4  # of that promise, in float32: see constraints.py


def promised(config):
    return config.constraint in HELD_EVERY_STEP or (config.constraint, getattr(config, "optimizer", "muon")) == ("weight_decay", "muon")


def verify_mlp(config, run, model, state, claim):
    """(table, extras) of a checkpoint of mlp_cifar.py."""
    table, model = Table(), model.double()
    if not finite(table, model):
        return table, {}
    bound = mlp_cifar.certificate(model)
    steps = max(6, int(120 * config.budget))
    images_NP, labels_N, data_name = test_images(config, run, state)
    x_NP = images_NP.double() / 255

    for i, (W, norm, limit) in enumerate(zip(model.weights, bound["norms"], run.limits())):
        if promised(run):
            table.add(f"layer {i + 1}", "limit on the weights", limit, exact_norm(W).item(), "RMS->RMS", SLACK)
        start = torch.randn(8, 1, W.shape[1], generator=torch.Generator().manual_seed(config.seed), dtype=torch.float64)
        table.add(f"layer {i + 1}", "norm", norm, climb(lambda x, W=W: F.linear(x, W), start, steps=steps,
                                                        seed=config.seed).max().item(), "RMS->RMS")

    def network(x_STP):
        return model(x_STP.flatten(0, 1)).view(*x_STP.shape[:2], 10)

    noise = torch.rand(8, 1, 3072, generator=torch.Generator().manual_seed(config.seed), dtype=torch.float64)
    found = climb(network, torch.cat([x_NP[:24, None], noise]), steps=steps, seed=config.seed).max().item()
    to_rms = mlp_cifar.RMS_PER_L2
    table.add("network", "product", bound["product"] * to_rms, found, "RMS->RMS")
    table.add("network", "tight certificate", bound["tight"] * to_rms, found, "RMS->RMS")
    if claim is not None:
        table.add("network", "as printed in summary.json", Log(claim), found, "RMS->RMS")
    # a difference of two logits; and images, two by two
    y_S, j_S = torch.triu_indices(10, 10, 1)
    aim_SK = F.one_hot(y_S, 10).double() - F.one_hot(j_S, 10).double()
    found_S = climb(network, x_NP[torch.arange(len(y_S)) % len(x_NP), None], steps=steps, seed=config.seed, aim_SO=aim_SK)
    certified_S = bound["pairs_KK"][y_S, j_S]
    worst = (found_S / certified_S).nan_to_num(0).argmax()
    table.add("network", f"logit {y_S[worst]} - logit {j_S[worst]}, the worst pair", certified_S[worst].item(),
              found_S[worst].item(), "l2->abs")
    with torch.no_grad():
        a, b = x_NP[:len(x_NP) // 2], x_NP[len(x_NP) // 2:len(x_NP) // 2 * 2]
        ratio = (model(a) - model(b)).norm(dim=1) / (a - b).norm(dim=1).clamp(min=1e-300)
    table.add("network", "test images, two by two", bound["tight"], ratio.max().item() if len(ratio) else 0.0, "l2->l2")

    # Every image with a certified radius above eps must survive an attack at eps.
    radius_N = mlp_cifar.certified_radii(model, bound["pairs_KK"], images_NP, labels_N)
    curve = []
    for eps in (0.0, *mlp_cifar.RADII.values()):
        stands_N, certified_N = withstands(model, x_NP, labels_N, eps, config), radius_N > eps
        curve.append(dict(radius=eps, certified=certified_N.double().mean().item(), attacked=stands_N.double().mean().item()))
        table.add_shares("test images", f"share of predictions right within {eps:.3g}", stands_N, certified_N, "l2")
    return table, dict(curve=curve, curve_norm="l2 radius, pixels in [0, 1]", data=data_name)


def test_images(config, run, state):
    run.data = config.data or ("stand-in" if state["data"].startswith("stand-in") else run.data)
    _, (images_NP, labels_N), name = mlp_cifar.load_data(run)
    return images_NP[:config.images], labels_N[:config.images], name


def withstands(model, x_NP, labels_N, eps, config, restarts=4):
    """(N,) bool: classified right, and still after projected gradient descent of the margin within eps (l2)."""
    generator = torch.Generator().manual_seed(config.seed)
    steps = max(2, int(20 * config.budget))

    def margin(x):
        logits = model(x)
        right = logits.gather(1, labels_N[:, None])
        return (right - logits.scatter(1, labels_N[:, None], -math.inf)).amin(1)

    with torch.no_grad():
        stands_N = margin(x_NP) > 0
    for restart in range(restarts if eps else 0):
        d = torch.randn(x_NP.shape, generator=generator, dtype=torch.float64) * (restart > 0)
        d = eps * d / d.norm(dim=1, keepdim=True).clamp(min=1e-300)
        for step in range(steps):
            d.requires_grad_()
            m = margin(x_NP + d)
            gradient, = torch.autograd.grad(m.sum(), d)
            stands_N &= (m > 0).detach()
            d = d.detach() - 2.5 * eps / steps**0.5 * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-300)
            d = d * (eps / d.norm(dim=1, keepdim=True).clamp(min=eps))
        with torch.no_grad():
            stands_N &= margin(x_NP + d) > 0
    return stands_N


# ==== TRANSFORMER: sublayers, blocks and the whole, inside the ball that the certificate speaks of 
SEARCH = {"shakespeare": dict(search=20), "nanogpt_lipschitz": {}}  # how each certificate is made
VOCABULARY = 1024  # above this, single predictions are not attacked: pairs of tokens would fill the memory


def verify_transformer(config, script, run, model, claim, data_of_run):
    """(table, extras) of a model of shakespeare.py or nanogpt_lipschitz.py."""
    table, model, baseline = Table(), model.double(), getattr(run, "baseline", False)
    if not finite(table, model):
        return table, {}
    bound = script.certificate(model, **SEARCH[script.SCRIPT])
    steps, D, T = max(6, int(120 * config.budget)), run.width, min(32, run.seq_len)
    norm = "max-token RMS->RMS"
    tokens_N, data_name = validation_text(config, script, run, model, data_of_run)

    limits = script.limits(run) if script is nanogpt_lipschitz else run.limits()
    for name, role, W in named_matrices(model):
        if promised(run):
            table.add(name, "limit on the weights", limits[role], exact_norm(W).item(), "RMS->RMS", SLACK)
    if not baseline:
        table.add("embedding", "largest RMS of a stored vector", 1.0, rms(model.embedding_VD).max().item(), "RMS", 1e-6)

    generator = torch.Generator().manual_seed(config.seed)
    start_W = torch.randint(len(tokens_N) - T, (8,), generator=generator)
    with torch.no_grad():
        real_STD = F.embedding(tokens_N[start_W[:, None] + torch.arange(T)], model.embedding_VD)  # the stream, on real text
    head_VD, R0 = run.final_scale * model.head_VD, rms(model.embedding_VD).max().item() * (1 + 1e-9)
    random_STD = torch.randn(8, T, D, generator=generator, dtype=torch.float64)
    starts = torch.cat([real_STD, R0 * random_STD / rms(random_STD)[..., None]])

    def network(x_STD):
        stream = model.body(x_STD)
        return model.logits(stream) if baseline else F.linear(stream, head_VD)

    if not baseline:  # (whose norm layers have a slope of up to 1000: nothing to learn from single layers)
        verify_layers(table, config, script, run, model, bound, real_STD, steps)
        found = climb(lambda x: F.linear(x, head_VD), random_STD[:, :1], steps=2 * steps, seed=config.seed).max().item()
        table.add("head", "norm", bound["norms"]["head"] * run.final_scale, found, norm)
    found = climb(network, starts, R0, steps, config.seed).max().item()
    table.add("network", "embeddings to logits", Log(bound["log10"]), found, norm)
    if claim is not None:
        table.add("network", "as printed in summary.json", Log(claim), found, norm)
    for what, ratio in pairs_of_windows(model, network, tokens_N, config, T):
        table.add("network", what, Log(bound["log10"]), ratio, norm)
    extras = dict(data=data_name)
    if script is shakespeare:
        extras["reference_formula_log10"] = reference_formula(model)
    if len(model.embedding_VD) <= VOCABULARY and not baseline:
        extras.update(curve=attacked_tokens(table, script, model, tokens_N, config), curve_norm="rho: RMS at every embedding")
    return table, extras


@torch.no_grad()
def reference_terms(model, block, R):
    """(attention's derivative, its gain, the MLP's of both) as the paper's code has them: no heads.

    True for one head, too small for several; the MLP's divides by 1.1289 once too often. To compare with.
    """
    sigma = {role: shakespeare.sigma(W).item() for role, W in block.matrices()}
    gain = block.attention_scale * sigma["o"] * sigma["v"]
    pattern = 2 * model.config.logit_scale * sigma.get("q", 0.0) * sigma.get("k", 0.0) * R * R
    scale = shakespeare.GELU_SCALE if model.config.activation == "gelu" else 1
    return gain * (1 + pattern), gain, sigma["in"] * sigma["out"] / scale


def reference_formula(model):
    """log10 of the whole constant by that formula."""
    R, total, a = rms(model.embedding_VD).max().item(), 0.0, model.mix
    for block in model.blocks:
        derivative, gain, mlp = reference_terms(model, block, R)
        total += log10((1 - a) + a * derivative) + log10((1 - a) + a * mlp)
        R *= ((1 - a) + a * gain) * ((1 - a) + a * mlp)
    return total + log10(exact_norm(model.head_VD).item() * model.config.final_scale)


def sublayers(model, block):
    """(attention, mlp) of a block, as functions of the stream."""
    if hasattr(block, "mlp"):
        return block.attention, block.mlp
    return functools.partial(model.attention, block), functools.partial(model.mlp, block)


def verify_layers(table, config, script, run, model, bound, real_STD, steps):
    """Each sublayer, alone and with the stream, and the ball it is to stay in."""
    norm, generator = "max-token RMS->RMS", torch.Generator().manual_seed(config.seed)
    _, T, D = real_STD.shape
    with torch.no_grad():
        stream_STD = real_STD
        streams = []
        for block in model.blocks:
            for f in sublayers(model, block):
                streams.append(stream_STD)
                stream_STD = torch.lerp(stream_STD, f(stream_STD), model.mix)
    for i, (block, row) in enumerate(zip(model.blocks, bound["rows"])):
        where, R = f"block {i + 1}", row["radius"]
        random_STD = torch.randn(8, T, D, generator=generator, dtype=torch.float64)
        starts = torch.cat([streams[2 * i], R * random_STD / rms(random_STD)[..., None], split_tokens(block, run.heads, T, R)])
        attention, mlp = sublayers(model, block)

        def with_stream(f):
            return lambda x: torch.lerp(x, f(x), model.mix)

        for what, f, certified, radius, x_STD in (
                ("attention", attention, row["value"] + row["pattern"] * R**2, R, starts),
                ("attention + stream", with_stream(attention), row["attention"], R, starts),
                ("MLP", mlp, row["mlp_derivative"], row["radius_mlp"], starts[:, -4:].reshape(-1, 1, D)),
                ("MLP + stream", with_stream(mlp), row["mlp"], row["radius_mlp"], streams[2 * i + 1][:, -8:].reshape(-1, 1, D))):
            table.add(where, what, certified, climb(f, x_STD, radius, steps, config.seed).max().item(), norm)
        if hasattr(block, "q"):
            table.add(where, "attention logits (largest)", *logits_of_attention(script, model, block, R, starts), "abs")

    R0 = bound["rows"][0]["radius"]
    random_STD = torch.randn(8, T, D, generator=generator, dtype=torch.float64)
    starts = torch.cat([real_STD, R0 * random_STD / rms(random_STD)[..., None]])
    seen = largest_activations(model, starts, R0, steps)
    for i, row in enumerate(bound["rows"]):
        table.add(f"block {i + 1}", "radius: largest RMS before attention", row["radius"], seen[2 * i], "max-token RMS")
        table.add(f"block {i + 1}", "radius: largest RMS before the MLP", row["radius_mlp"], seen[2 * i + 1], "max-token RMS")
    table.add("stream", "radius: largest RMS at the end", bound["radius"], seen[-1], "max-token RMS")


def named_matrices(model):
    for i, block in enumerate(model.blocks):
        for role, W in block.matrices():
            yield f"block {i + 1} {role}", role, W
    yield "head", "head", model.head_VD


def validation_text(config, script, run, model, data_of_run):
    run.data = config.data or ("stand-in" if data_of_run.startswith("stand-in") else run.data)
    if script is nanogpt_lipschitz:
        _, validation, name = script.load_data(run)
        return validation.read(0, min(len(validation), 200_000)), name
    _, validation_N, vocabulary, name = shakespeare.load_data(run)
    if vocabulary != model.vocabulary:
        raise UserError(f"{name} has {len(vocabulary)} different characters, and the model was trained on {len(model.vocabulary)} "
                      "others; give the text it was trained on with --data")
    return validation_N, name


def split_tokens(block, heads, T, R):
    """Inputs that break a count without heads: each head finds its slice of the value in a token of its own."""
    D = block.v.shape[1]
    _, _, Vh = torch.linalg.svd(block.v.detach().view(heads, D // heads, D), full_matrices=False)
    x_STD = torch.stack([torch.stack([Vh[(t + s) % heads, 0] for t in range(T)]) for s in range(8)])
    return R * x_STD / rms(x_STD)[..., None]


@torch.no_grad()
def logits_of_attention(script, model, block, R, x_STD):
    """(bound s sigma(q_h) sigma(k_h) R^2 D of the largest head, largest logit found on x and on aligned singular vectors)."""
    H, D = model.config.heads, model.config.width
    s = model.config.logit_scale / (D // H)
    q_HED, k_HED = block.q.view(H, D // H, D), block.k.view(H, D // H, D)
    bound_H = s * script.sigma(q_HED) * script.sigma(k_HED) * R * R * D * (1 + 1e-9)
    U, _, Vh = torch.linalg.svd(q_HED.mT @ k_HED)
    crafted_HTD = R * D**0.5 * torch.stack([U[:, :, 0], Vh[:, 0]], 1)
    found = 0.0
    for x in (into_ball(x_STD, R), crafted_HTD):
        q, k = (F.linear(x, W).view(*x.shape[:2], H, D // H).transpose(1, 2) for W in (block.q, block.k))
        if model.config.positions == "rope":
            q, k = script.rotate(q), script.rotate(k)
        found = max(found, (s * q @ k.mT).abs().max().item())
    return bound_H.max().item(), found


def largest_activations(model, x_STD, radius, steps):
    """Largest RMS of a token before each sublayer and at the end, by ascent of that at the end over the embeddings' ball."""
    seen = [0.0] * (2 * len(model.blocks) + 1)
    for step in range(steps):
        x_STD = into_ball(x_STD, radius).detach().requires_grad_()
        stream, points = x_STD, [x_STD]
        for block in model.blocks:
            for f in sublayers(model, block):
                points.append(torch.lerp(points[-1], f(points[-1]), model.mix))
        seen = [max(a, rms(p.detach()).max().item()) for a, p in zip(seen, points)]
        gradient, = torch.autograd.grad(rms(points[-1]).amax(-1).sum(), stream)
        x_STD = x_STD.detach() + 0.3 * radius * gradient / rms(gradient).amax(-1).clamp(min=1e-300)[:, None, None]
    return seen


@torch.no_grad()
def pairs_of_windows(model, network, tokens_N, config, T):
    """[(what, largest quotient)] of real windows, two by two, and of windows with one character swapped for another."""
    generator = torch.Generator().manual_seed(config.seed)
    start_SB = torch.randint(len(tokens_N) - T, (2, 64), generator=generator)
    a, b = tokens_N[start_SB[..., None] + torch.arange(T)]
    swapped = a.clone()
    place = torch.randint(T, (64,), generator=generator)
    swapped[torch.arange(64), place] = b[torch.arange(64), place]
    for what, other in (("real windows, two by two", b), ("one character swapped", swapped)):
        x, y = F.embedding(a, model.embedding_VD), F.embedding(other, model.embedding_VD)
        distance = rms(x - y).amax(-1)
        ratio = rms(network(x) - network(y)).amax(-1) / distance.clamp(min=1e-300)
        yield what, ratio[distance > 0].amax().item() if (distance > 0).any() else 0.0


def attacked_tokens(table, script, model, tokens_N, config):
    """Every prediction certified at rho must survive an attack on all embeddings at rho. Returns the curve."""
    D, T = model.config.width, model.config.seq_len
    head_VD = model.config.final_scale * model.head_VD
    text_N = tokens_N[:config.windows // 4 * T + T + 1]
    curve, steps = [], max(2, int(10 * config.budget))
    stands_up_to_N = shakespeare.token_margins(model, text_N)
    x_WT, y_WT = (torch.cat(parts) for parts in zip(*((x, y) for x, y in shakespeare.windows(text_N, T) if x.shape[1] == T)))
    clean_WTD = F.embedding(x_WT, model.embedding_VD).detach()
    stands_up_to_N = stands_up_to_N[:y_WT.numel()]
    for rho in shakespeare.RHOS:
        certified_N = stands_up_to_N > rho * 10 ** min(300.0, script.certificate(model, rho, **SEARCH[script.SCRIPT])["body_log10"])
        d, right_N = torch.zeros_like(clean_WTD), torch.ones(y_WT.numel(), dtype=torch.bool)
        for step in range(steps):
            d.requires_grad_()
            logits_NV = F.linear(model.body(clean_WTD + d), head_VD).flatten(0, 1)
            y_N1 = y_WT.flatten()[:, None]
            margin_N = (logits_NV.gather(1, y_N1) - logits_NV.scatter(1, y_N1, -math.inf)).amin(1)
            right_N &= (margin_N > 0).detach()
            # tokens still right, those nearest to the edge first
            weight_N = (margin_N > 0).detach() / (margin_N.detach().abs() + 1e-3 * margin_N.detach().abs().mean())
            gradient, = torch.autograd.grad((weight_N * margin_N).sum(), d)
            d = d.detach() - 0.5 * rho * gradient / rms(gradient)[..., None].clamp(min=1e-300)
            d = d * (rho / rms(d).clamp(min=rho))[..., None]
        curve.append(dict(radius=rho, certified=certified_N.double().mean().item(), attacked=right_N.double().mean().item()))
        table.add_shares("validation text", f"share of predictions right within {rho:g}", right_N, certified_N, "RMS, tokens")
    return curve


# ==== MAIN: runs, the report ======================================================================
def finite(table, model):
    """Whether all weights are finite; if not, a row that says which are not."""
    for name, W in model.named_parameters():
        if not W.isfinite().all():
            table.add(name, "is not finite", math.nan, math.nan, "")
    return not table.rows


def find_runs(names):
    """Paths to verify: run folders, folders of them, .npz. Without names those of runs/, or two small ones trained now."""
    if not names:
        found = sorted(p.parent for p in Path("runs").glob("*/checkpoint.pt"))
        return found or [small_run(mlp_cifar, steps=150, width=64), small_run(shakespeare, steps=60, width=64, hidden=128, seq_len=64)]
    paths = []
    for name in map(Path, names):
        inside = sorted(p.parent for p in name.glob("*/checkpoint.pt")) if name.is_dir() and not (name / "checkpoint.pt").exists() else []
        paths += inside or [name]
    return paths


def small_run(script, **changes):
    """Train the smallest model of a script for seconds, on data that are built in."""
    out = Path("runs") / f"verify_{script.SCRIPT}"
    print(f"runs/ is empty: training a small model of {script.SCRIPT}.py first", flush=True)
    script.main(script.Config(data="stand-in", out=str(out), evals=1, **changes))
    return out


def verify(config, path):
    """(table, extras) of one run folder or file."""
    claim = None
    if path.suffix == ".npz":
        run, model = shakespeare.load_published(path)
        run.constraint = "none"  # (the file does not say what its weights were held to)
        return verify_transformer(config, shakespeare, run, model, claim, "")
    summary = path / "summary.json"
    if summary.is_file():
        try:
            claim = float(json.loads(summary.read_text())["lipschitz_log10"])
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{summary}: cannot be read ({problem}); remove it, or train again") from problem
    problems = []
    for script in (mlp_cifar, shakespeare):
        try:
            run, model, state = script.load_checkpoint(path)
        except script.UserError as problem:
            problems.append(str(problem))
            continue
        if script is mlp_cifar:
            return verify_mlp(config, run, model, state, claim)
        return verify_transformer(config, script, run, model, claim, state["data"])
    try:
        state = nanogpt_lipschitz.load_checkpoint(path)
    except nanogpt_lipschitz.Refusal:
        raise UserError(problems[0]) from None
    run, model = nanogpt_lipschitz.model_from_checkpoint(state)
    return verify_transformer(config, nanogpt_lipschitz, run, model, claim, state["data"])


def number(log):
    """To read: of a logarithm."""
    return "0" if log == -math.inf else "nan" if math.isnan(log) else f"{10**log:.5g}" if -5 < log < 7 else f"10^{log:.2f}"


def print_report(path, table, extras, seconds):
    print(f"\n{path}" + (f", data: {extras['data']}" if extras else ""))
    for share, third, fourth in ((False, "found", "tightness"), (True, "attacked", "quotient")):
        rows = [row for row in table.rows if row.get("share", False) == share]
        if rows:
            print(f"  {'where':17} {'what':46} {'certified':>11} {third:>11} {fourth:>9}  norm")
        for row in rows:
            print(f"  {row['where']:17} {row['what']:46} {number(row['certified_log10']):>11} {number(row['found_log10']):>11} "
                  f"{row['tightness']:9.4f}  {row['norm']}" + "   <-- BROKEN" * row["broken"])
    if "reference_formula_log10" in extras:
        print(f"  (the formula of the paper's code, which misses heads: {number(extras['reference_formula_log10'])})")
    broken = table.broken()
    print(f"  {'BROKEN: ' + ', '.join(r['where'] + ' (' + r['what'] + ')' for r in broken) if broken else 'held'}, "
          f"{len(table.rows)} claims, {seconds:.0f} s")


def draw(path, table, extras, curves):
    """certified against found, row by row; the curves of all runs verified together; low precision."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    a, b = figure.subplots(1, 2, width_ratios=(2, 1))
    figure.suptitle(f"verify_lipschitz, {path.name}")
    rows = [r for r in table.rows if math.isfinite(r["certified_log10"]) and math.isfinite(r["found_log10"]) and "share" not in r]
    place = range(len(rows))
    a.plot([r["certified_log10"] for r in rows], place, "|", ms=12, label="certified")
    a.plot([r["found_log10"] for r in rows], place, ".", label="found")
    a.set_yticks(place, [f"{r['where']}: {r['what']}" for r in rows], fontsize=6)
    a.invert_yaxis()
    a.set(title="certified and found", xlabel="log10")
    a.legend()
    for i, (name, curve) in enumerate(curves):
        r = [p["radius"] for p in curve]
        b.plot(r, [100 * p["attacked"] for p in curve], "o--", color=f"C{i}", label=f"{name}: attacked")
        b.plot(r, [100 * p["certified"] for p in curve], "-", color=f"C{i}", label=f"{name}: certified")
    b.set(title="accuracy", xlabel=extras.get("curve_norm", ""), ylabel="%", ylim=(0, None))
    b.legend(fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main(runs, config):
    """Verify all; returns the exit status."""
    done, unchecked = [], 0
    for path in find_runs(runs):
        began = time.perf_counter()
        try:
            table, extras = verify(config, path)
        except ERRORS as refusal:
            print(f"verify_lipschitz.py: {path}: could not be checked: {refusal}", file=sys.stderr)
            unchecked += 1
            continue
        print_report(path, table, extras, time.perf_counter() - began)
        sys.stdout.flush()
        done.append((path, table, extras))
    for path, table, extras in done:
        folder = path if path.is_dir() else Path("runs") / f"verify_{path.stem}"
        folder.mkdir(parents=True, exist_ok=True)
        same = [(p.name, e["curve"]) for p, _, e in done if e.get("curve_norm") == extras.get("curve_norm") and "curve" in e]
        result = dict(held=not table.broken(), rows=table.rows, **extras)
        mlp_cifar.write(folder / "verify.json", json.dumps(result, indent=1).replace("NaN", "null"))
        if extras:
            mlp_cifar.write(folder / "verify.png", draw(path, table, extras, same))
        print(f"Table and picture are in {folder}/verify.json and verify.png.")
    broken = [path for path, table, _ in done if table.broken()]
    print(f"{len(done)} verified: {len(done) - len(broken)} held, {len(broken)} broken" + f"; {unchecked} could not be checked" * (unchecked > 0))
    return 1 if broken else 2 if unchecked or not done else 0


if __name__ == "__main__":
    try:
        sys.exit(main(*parse_arguments()))
    except ERRORS as refusal:
        print(f"verify_lipschitz.py: {refusal}", file=sys.stderr)
        sys.exit(2)
    except OSError as problem:
        print(f"verify_lipschitz.py: {problem}; mend that and start again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nverify_lipschitz.py: interrupted", file=sys.stderr)
        sys.exit(130)
