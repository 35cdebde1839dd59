"""Tutorial 1: an MLP on CIFAR-10 whose Lipschitz constant is enforced at every step of training.

WHAT IT SHOWS. Muon moves each weight matrix by a known amount, and a constraint takes back what
exceeds its limit. So after every step the network's Lipschitz constant is below a known number.
That certifies images: one with a large margin keeps its class under *every* perturbation up to a
radius.

COMMANDS
    python mlp_cifar.py                                      # a minute, once CIFAR-10 is there
    python mlp_cifar.py --preset paper                       # the paper's network; --help has more
    python mlp_cifar.py --optimizer adamw --constraint none  # no constraint: see how the norms grow
    python mlp_cifar.py --out DIR                            # stopped, the same command goes on

RESULT (seeds 0 to 2; CIFAR-10 re-encoded as JPEG; 40 s of training on one core of an AMD EPYC)
    58.6 +- 0.3 % right at a bound of 67.7 +- 0.3 (RMS->RMS), 41.5 +- 0.1 % certified at 36/255.

ANCESTRY. The experiments are those of arXiv 2507.13338, whose code is in JAX. Certification by
margins is Tsuzuku et al. (2018), the margin in the loss Prach and Lampert (2022), MaxMin Anil et
al. (2019).
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from constraints import (LN10, after_unknown_step, ellipsoid, ellipsoid_layer,
                         ellipsoid_norm, ellipsoid_pairs, exact_norm, find_constraint, log10,
                         maxmin, mlp_slopes, norm_at_start, power, sigma_per_norm, tune)
from muon import Muon, fast_dtype

SCRIPT = "mlp_cifar"
RADII = {"36/255": 36 / 255, "72/255": 72 / 255, "108/255": 108 / 255, "1": 1.0}  # l2, of pixels

# Capitals at the end of a name are the shape of a tensor: images_BP is (B, P).
# Shapes: B images in a batch, N images in a set, P = 3072 pixel values, K classes, X columns or
# rows of an image, F frequencies, M and N neurons of a certificate.


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
    preset: str = "default"  # named settings, listed below; other flags override them
    # data
    data: str = "auto"  # auto, stand-in, a folder (pictures or parquet), or a name on the Hub
    label: str = ""  # column of the labels, if it is not label, labels or fine_label
    holdout: int = 0  # for tuning: evaluate on so many training images, taken out
    augment: bool = False  # flip training images at random, and shift them by up to 2 pixels
    # model
    depth: int = 3  # number of weight matrices
    width: int = 256  # hidden width (neurons)
    activation: str = "relu"  # relu, or maxmin, which sorts pairs of neurons
    bias: bool = True  # biases in all layers; they do not enter the Lipschitz constant
    center: bool = True  # subtract the mean training image; nor does that
    lowpass: int = 12  # use only the K x K lowest frequencies of an image; 32: all
    mirror: bool = False  # average the logits of each image and its mirror image
    roll: int = 0  # K: average also over four copies, shifted around by K pixels diagonally; 0: no
    w_max: str = "3.4"  # limit on the RMS->RMS norm of each layer: one for all, or 3,4,5
    # training
    optimizer: str = "muon"  # of the matrices: muon or adamw
    constraint: str = "soft_cap"  # a name in constraints.py, or a function of yours: FILE.py:NAME
    constrain_every: int = 4  # a constraint that can wait runs at about every so many steps
    steps: int = 2000  # training steps
    batch: int = 512  # images a step
    lr: float = 0.0  # peak learning rate; 0: 0.2 for Muon or 0.0013 for AdamW. Muon's is / depth
    momentum: float = 0.9  # Muon's momentum, or AdamW's first beta
    adamw_wd: float = 0.0  # AdamW's own weight decay, besides the constraint
    loss_temperature: float = 1.0  # factor on the logits in the loss; bounds are without it
    margin: float = 0.0  # taken from the right class's logit in the loss, after the temperature
    # run
    seed: int = 0  # of initialisation, order of the data, augmentation
    dtype: str = "auto"  # of the products in training: auto, float32, bfloat16
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps; auto: cuda if there is one
    evals: int = 10  # evaluations on the whole test set, each with a checkpoint
    out: str = ""  # run folder, in which a stopped run goes on; default: a new one in runs/

    def limits(self):
        """{layer: its w_max}. UserError where settings do not fit each other."""
        with explain(f"--w_max {self.w_max}", f"give a number above 0, or {self.depth} of them"):
            limits = [float(limit) for limit in self.w_max.split(",")]
            if len(limits) == 1:
                limits *= self.depth
            if len(limits) != self.depth or not all(0 < limit < math.inf for limit in limits):
                raise ValueError(f"it is {limits}")
        if self.activation == "maxmin" and self.width % 2:
            raise UserError(f"--width {self.width}: must be even for maxmin, which works on pairs")
        if self.lowpass > 32:
            raise UserError(f"--lowpass {self.lowpass}: must be at most 32, the size of an image")
        if self.roll > 31:
            raise UserError(f"--roll {self.roll}: must be at most 31, as 32 is once around")
        return {f"layer {i}": limit for i, limit in enumerate(limits, 1)}


CHOICES = dict(optimizer=("muon", "adamw"), activation=("relu", "maxmin"),
               dtype=("auto", "float32", "bfloat16"))
# Prach and Lampert (2022) take sqrt(2) from the right logit and divide by a temperature of 1/4.
# Here that is a factor of 4 and a margin of 4 sqrt(2) after it, for a constant of 1 in l2. The
# margin is theirs. Our factor is 30, for limits of 1 in RMS->RMS. In l2 that is 30 sqrt(10 / 432) =
# 4.6, by 10 logits and 432 frequencies.
CERTIFIED = dict(activation="maxmin", augment=True, w_max="1", batch=2048, loss_temperature=30.0,
                 margin=5.66)
PRESETS = {
    "default": dict(),
    "paper": dict(bias=False, center=False, lowpass=32, w_max="6"),
    "paper_adamw": dict(bias=False, center=False, lowpass=32, optimizer="adamw", adamw_wd=0.08,
                        constraint="none"),
    "accurate": dict(mirror=True, roll=2, width=512, lowpass=9, w_max="3.5", steps=3000),
    "tight": dict(activation="maxmin", mirror=True, augment=True, depth=5, width=512,
                  w_max="1.465", batch=1024, steps=3000),
    "certified": dict(CERTIFIED, depth=7, width=512, steps=3000),
    "certified_hour": dict(CERTIFIED, depth=7, width=768, mirror=True, steps=5400),
    # The size of AOL-FC (Prach and Lampert 2022), which certifies 59.1 % at 36/255. Not run.
    "certified_gpu": dict(CERTIFIED, depth=8, width=4096, steps=12_000),
}


# ==== Model: matrices and an activation, nothing else =============================================
class MLP(torch.nn.Module):
    """logits = W_d relu(... relu(W_1 T (x - mean) + b_1) ...) + b_d, for pixels x in [0, 1].

    The mean and the biases cancel in differences, so neither enters a Lipschitz constant. T takes
    the lowest frequencies of each colour by a cosine transform: its rows are orthonormal, so that
    |T dx| <= |dx|. With `mirror` or `roll` the logits are the average of those of several views,
    each of which is a permutation of the entries of x - mean.
    """

    def __init__(self, config, mean_P=None, classes=10):
        super().__init__()
        if mean_P is None or not config.center:
            mean_P = torch.zeros(3072)
        self.register_buffer("mean_P", mean_P)
        self.mirror = config.mirror
        self.roll = config.roll
        self.activation = F.relu if config.activation == "relu" else maxmin
        self.rms_per_l2 = (3072 / classes) ** 0.5  # an l2->l2 constant times this is RMS->RMS
        frequency_F1 = torch.arange(config.lowpass).double()[:, None]
        x_X = torch.arange(32).double()
        length_F1 = (16 + 16 * (frequency_F1 == 0).double()).sqrt()
        self.cosines_FX = torch.cos(math.pi * frequency_F1 * (2 * x_X + 1) / 64) / length_F1
        sizes = [3 * config.lowpass**2] + [config.width] * (config.depth - 1) + [classes]
        self.weights = torch.nn.ParameterList()
        self.biases = torch.nn.ParameterList()
        generator = torch.Generator().manual_seed(config.seed)
        for fan_in, fan_out, limit in zip(sizes, sizes[1:], config.limits().values()):
            # All singular values are equal. The norm is 1 if the limit allows it.
            W = torch.nn.init.orthogonal_(torch.zeros(fan_out, fan_in), generator=generator)
            if config.activation == "maxmin" and fan_in == fan_out:
                torch.nn.init.eye_(W)  # as Prach and Lampert (2022) start theirs
            norm = norm_at_start(config.constraint, limit)
            self.weights.append(W * (sigma_per_norm(W) * norm))
            if config.bias:
                self.biases.append(torch.zeros(fan_out))

    def matrices(self):
        """[(layer, matrix)] of all that the constraint holds."""
        return [(f"layer {i}", W) for i, W in enumerate(self.weights, 1)]

    def views(self, x_BP):
        """The images over which the logits are averaged, (views * B, P): x first."""
        if not self.mirror and not self.roll:
            return x_BP  # no copy
        views = [x_BP.view(-1, 32, 32, 3)]
        if self.mirror:
            views.append(views[0].flip(2))
        if self.roll:
            both = (-self.roll, self.roll)
            views += [view.roll((down, right), (1, 2))
                      for view in views for down in both for right in both]
        return torch.cat(views).reshape(-1, 3072)

    def forward(self, x_BP):
        """Logits (B, K) of pixels in [0, 1], in the precision of x_BP; certificates use float64."""
        h = self.views(x_BP - self.mean_P.to(x_BP.dtype))
        if len(self.cosines_FX) < 32:  # all 32 would only rotate h
            cosines_XF = self.cosines_FX.to(h).T
            h = h.reshape(-1, 32, 96).mT @ cosines_XF  # rows: (B, 32 columns * 3, F)
            h = (h.reshape(len(h), 32, -1).mT @ cosines_XF).flatten(1)  # columns: (B, 3 * F * F)
        for i, W in enumerate(self.weights):
            if i > 0:
                h = self.activation(h)
            bias = self.biases[i].to(h.dtype) if self.biases else None
            h = F.linear(h, W.to(h.dtype), bias)
        return h.view(-1, len(x_BP), h.shape[1]).mean(0)


def build_model(config, state):
    """The model of a checkpoint, before its weights are loaded."""
    return MLP(config, classes=state["classes"])


# ==== Certificate: numbers that no pair of images can exceed, from the weights alone ==============
# Let two images differ by dx with |dx| <= 1 (l2). Let dz_i be the difference before activation i,
# and dh_i the one after it, so that dz_{i+1} = W_{i+1} dh_i. ReLU has slopes in [0, 1], and sorting
# pairs brings none further apart, so |dh_i| <= |dz_i|. So the constant is at most the product,
# prod_i sigma(W_i).
#
# The tight certificate follows an ellipsoid E(S) = {z : z^T S^-1 z <= 1} in place of a length; see
# part II of constraints.py.
#   1. dz_1 = W_1 T dx lies in E(W_1 W_1^T), as |T dx| <= 1.
#   2. ReLU: dh = dz / 2 + v / 2 with |v_i| <= |dz_i|. MaxMin of a pair is ((a + b) +- |a - b|) / 2,
#      and |a - b| changes by at most |d(a - b)|.
#   3. With the next matrix behind it, dz' = A dz + B v with |v_i| <= |(J dz)_i| for known A, B, J
#      (mlp_slopes), which lies in another ellipsoid (ellipsoid_layer).
#   4. At the end |dz_d| <= sqrt(sigma(S_d)).
#   5. The difference of two logits, f_y - f_j, changes by at most the largest |z_y - z_j| for z in
#      E(S_d). It changes by at most |w_y - w_j| sigma(W_1) ... sigma(W_{d-1}), too, with the rows w
#      of W_d. L_yj is the smaller of the two.
#   6. If f_y(x) - f_j(x) > r L_yj for all j != y, all images within r (l2) of x have class y.
#   7. With `mirror` or `roll` the logits are an average over views. View k is a permutation P_k,
#      and |T P_k dx| <= |dx|, so 1 to 5 hold for each. The average of functions has at most the
#      largest of their constants, so 4 and 5 hold for the averaged logits, and 6 follows.
#   8. Each neuron has a multiplier in 3. Any positive one gives a valid bound. They start equal,
#      and `tune` improves them by gradient descent on the bound.
# The smaller of ellipsoid and product counts. Bounds are logarithms, as deep products overflow. On
# a first reading take step 3 as given.
def follow_ellipsoid(model, multipliers):
    """(S, log) with dz_d in E(exp(log) S), by steps 1 to 3.

    multipliers: {name: logarithms}. Missing ones are added as 0, so the first call fills an empty
    dict, which `tune` then trains.
    """
    first, *later = [W.detach().cpu().double() for W in model.weights]
    spread = None if model.activation is maxmin else 0.5
    S, log = ellipsoid(first @ first.T)
    for i, W in enumerate(later):
        # What stands before W is an activation alone: an MLP without a residual stream (0.0) and
        # with the identity as its first matrix.
        eye = torch.eye(W.shape[1]).double()
        J_NM, A, B, _ = mlp_slopes(0.0, eye, W, spread)
        neurons_N = multipliers.setdefault(f"neurons {i}", torch.zeros(len(J_NM)).double())
        share = multipliers.setdefault(f"share {i}", torch.zeros(()))
        S, log = ellipsoid_layer(S, log, J_NM, A, B, neurons_N, share)
    return S, log


def certificate(model, steps=0):
    """Certified constants of a model, in float64 and rounded up, as logarithms to base 10.

    norms             {layer: RMS->RMS norm of its matrix}
    product_log10     prod_i sigma(W_i), l2->l2. Times model.rms_per_l2: RMS->RMS, of all pixels
    tight_log10       the certificate used, l2->l2; pairs_log10_KK: L_yj of step 5
    Argument steps: of the descent of step 8, for the bound and again for the pairs; 0: untuned.
    """
    for name, values in model.state_dict().items():
        if not values.isfinite().all():
            raise UserError(f"{name} of the model is not finite: there is nothing to certify")
    norms = {name: exact_norm(W).item() for name, W in model.matrices()}
    sigmas_log10 = [log10(norms[name] * sigma_per_norm(W)) for name, W in model.matrices()]
    product = sum(sigmas_log10)
    if len(model.weights[0]) > 1024:
        steps = 0  # the descent of wide networks takes hours
    eye_KK = torch.eye(len(model.weights[-1])).double()
    multipliers = {}

    def bound(multipliers):
        return ellipsoid_norm(*follow_ellipsoid(model, multipliers), eye_KK)

    def pairs(multipliers):
        return ellipsoid_pairs(*follow_ellipsoid(model, multipliers), eye_KK)

    def mean_pair(multipliers):
        return pairs(multipliers).clamp(min=-700).mean()  # a class and itself: log 0

    tune(bound, multipliers, steps)
    tight = bound(multipliers).item() / LN10
    tune(mean_pair, multipliers, steps)  # goes on from the multipliers of the bound
    pairs_KK = pairs(multipliers) / LN10
    last = model.weights[-1].detach().cpu().double()
    apart_KK = ellipsoid_pairs(torch.eye(last.shape[1]).double(), 0.0, last) / LN10  # |w_y - w_j|
    return dict(norms=norms, product_log10=product, tight_log10=min(product, tight),
                pairs_log10_KK=torch.minimum(pairs_KK, apart_KK + sum(sigmas_log10[:-1])))


@torch.no_grad()
def certified_radii(model, pairs_log10_KK, images_NP, labels_N):
    """l2 radius in which an image keeps its class, by step 6; < 0 if it is wrong or tied."""
    model = copy.deepcopy(model).cpu()  # float64 is not on every device
    logits_NK = torch.cat([model(x.double() / 255) for x in images_NP.split(2000)])
    label_N1 = labels_N[:, None]
    margin_NK = logits_NK.gather(1, label_N1) - logits_NK
    largest = max(p.detach().abs().max().item() for p in (logits_NK, *model.biases))
    margin_NK -= 1e-9 * largest  # for rounding: generous, as float64 has 1e-16, and not proved
    # The nearest decision boundary: the smallest margin / constant over the other classes.
    radius_NK = margin_NK / 10 ** pairs_log10_KK[labels_N]
    return radius_NK.scatter(1, label_N1, math.inf).amin(1)


# ==== Data: pictures from a folder or the Hub, or drawn here ======================================
def load_data(config):
    """((images_NP, labels_N) to train, the same to test, name): uint8 images, int64 labels."""
    name = config.data
    if name == "auto":
        local = Path(os.environ.get("DATA_DIR", "nowhere"), "cifar10")
        name = str(local) if local.is_dir() else "uoft-cs/cifar10"
    try:
        train, test = stand_in() if name == "stand-in" else load_images(name, config.label)
    except UserError as problem:
        if config.data != "auto":
            raise
        reason = str(problem.__cause__).split("\n")[0][:160]
        print(f"CIFAR-10 cannot be had from {name}: {reason}\nIt is looked for in "
              "$DATA_DIR/cifar10, then on the Hub.\nTRAINING ON A STAND-IN, drawings made by this "
              "script. The default settings are right on about 73 % of them.", flush=True)
        train, test = stand_in()
        name = "stand-in"
    if config.holdout:  # the same images for every seed
        images_NP, labels_N = train
        generator = torch.Generator().manual_seed(2025)
        order_N = torch.randperm(len(labels_N), generator=generator)
        held_N, rest_N = order_N[:config.holdout], order_N[config.holdout:]
        train = images_NP[rest_N], labels_N[rest_N]
        test = images_NP[held_N], labels_N[held_N]
        name += f", evaluated on {config.holdout} training images held out"
    classes = 1 + max(torch.cat([train[1], test[1]]).tolist())
    missing = set(range(max(2, classes))) - set(train[1].tolist())
    if missing:
        raise UserError(f"--data {name}: no training image has label {min(missing)}; give 2 "
                        "classes or more, with labels from 0 on")
    return train, test, name


def load_images(source, label):
    """[(images_NP, labels_N)] of the splits train and test of a folder or a data set on the Hub."""
    print(f"Reading {source}: some seconds ...", flush=True)
    import datasets  # takes a second, so only where it is needed
    import huggingface_hub
    folder = Path(source).expanduser()
    sets = []
    place = "" if folder.exists() else "is no folder here, and as a name on the Hub "
    with explain(f"--data {source}: {place}cannot be used",
                 "see Your own data in the README for what is needed; or take --data stand-in"):
        if not folder.exists():
            try:
                huggingface_hub.HfApi().dataset_info(source, timeout=3)
            except Exception:  # no network: look in the cache, as load_dataset would wait a minute
                datasets.config.HF_HUB_OFFLINE = True
        for split in ("train", "test"):
            table = datasets.load_dataset(str(folder), split=split, streaming=folder.exists())
            columns = list(next(iter(table), {}))
            picture = "img" if "img" in columns else "image"
            names = [label] if label else ["label", "labels", "fine_label"]
            number = next((name for name in names if name in columns), names[0])
            table = table.cast_column(picture, datasets.Image())  # else they may come as bytes
            images = []
            labels = []
            for row in table:
                image = row[picture].convert("RGB").resize((32, 32))
                images.append(np.asarray(image).reshape(3072))
                labels.append(row[number])
            if min(labels) < 0:
                raise ValueError(f"a label of {split} is below 0")
            sets.append((torch.from_numpy(np.stack(images)), torch.tensor(labels)))
    return sets


def stand_in(train=20_000, test=4_000):
    """Ten classes of drawings: five outlines, filled or hollow, of any place, size and colour."""
    N = train + test
    print(f"Drawing {N:,} pictures: some seconds ...", flush=True)
    generator = torch.Generator().manual_seed(20_250_713)
    label_N = torch.arange(N) % 10
    place_2N11 = torch.rand(2, N, 1, 1, generator=generator) - 0.5
    size_N11 = 0.35 + 0.45 * torch.rand(N, 1, 1, generator=generator)
    ink_2N113 = torch.rand(2, N, 1, 1, 3, generator=generator)
    axis_X = torch.linspace(-1, 1, 32)
    x_NX1 = (axis_X[:, None] - 0.8 * place_2N11[0]).abs() / size_N11
    y_N1X = (axis_X - 0.8 * place_2N11[1]).abs() / size_N11
    outlines_5NXX = torch.stack([
        (x_NX1**2 + y_N1X**2).sqrt(), x_NX1.maximum(y_N1X), x_NX1 + y_N1X,
        x_NX1.maximum(2 * y_N1X), y_N1X.maximum(2 * x_NX1)])
    radius_NXX = outlines_5NXX[label_N // 2, torch.arange(N)]
    hollow_N11 = (label_N % 2 == 1)[:, None, None]
    drawn_NXX = (radius_NXX < 1) & ~(hollow_N11 & (radius_NXX < 0.6))
    images_NXX3 = ink_2N113[0].lerp(ink_2N113[1], drawn_NXX[..., None].float())
    images_NXX3 += 0.25 * torch.randn(N, 32, 32, 3, generator=generator)
    images_NP = (images_NXX3.clamp(0, 1) * 255).round().to(torch.uint8).reshape(N, 3072)
    return (images_NP[:train], label_N[:train]), (images_NP[train:], label_N[train:])


@functools.lru_cache(maxsize=1)
def shuffle(N, seed, epoch):
    """A random order of N images. As it depends on nothing else, a run that goes on has it, too."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def choose_batch(step, N, config):
    """(B,) numbers of the images of a step. Each epoch has an order of its own."""
    batch = min(config.batch, N)
    epoch, place = divmod(step, N // batch)
    return shuffle(N, config.seed, epoch)[place * batch:(place + 1) * batch]


def augment(images_BP, step, config):
    """Each image flipped with probability 1/2, shifted by up to 2 pixels, its edge repeated."""
    B = len(images_BP)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 500_009 + step)
    line_X = torch.arange(32)
    flip_B1 = torch.rand(B, generator=generator)[:, None] < 0.5
    shift_2B1 = torch.randint(-2, 3, (2, B, 1), generator=generator)
    columns_BX = torch.where(flip_B1, 31 - line_X, line_X) + shift_2B1[0]
    rows_BX = line_X + shift_2B1[1]
    pixel_BXX = 32 * rows_BX.clamp(0, 31)[:, :, None] + columns_BX.clamp(0, 31)[:, None, :]
    source_N = (1024 * torch.arange(B)[:, None, None] + pixel_BXX).flatten()
    pixels_N3 = images_BP.view(-1, 3)  # of all images: whole pixels move faster than values
    return pixels_N3.index_select(0, source_N.to(images_BP.device)).view(B, 3072)


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
    """Train, or go on; certify; report. Returns the summary."""
    # ---- load
    limits = config.limits()
    with explain(f"--constraint {config.constraint}", "see --help"):
        constraint = find_constraint(config.constraint)
    state, summary = find_run(config)
    if summary:
        return summary
    device, dtype = choose_device(config)
    (images_NP, labels_N), test_set, data_name = load_data(config)
    N = len(labels_N)
    classes = 1 + max(labels_N.max(), test_set[1].max()).item()
    if state and state["images"] != N:
        raise UserError(f"--data {data_name}: has {N} images; the run began with {state['images']}")

    # ---- build
    model = MLP(config, images_NP.sum(0) / (255 * N), classes).to(device)
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
          f"data: {data_name}, {N} images to train, {len(test_set[1])} to test, {classes} classes")

    # ---- train
    images_NP = images_NP.to(device)
    labels_N = labels_N.to(device)
    eval_steps = {math.ceil(config.steps * (i + 1) / config.evals) for i in range(config.evals)}
    losses = []
    began = time.perf_counter()
    with catch_ctrl_c() as stops:
        for step in count_steps(start, config.steps):
            # A batch is the next slice of a random permutation of the training images.
            index_B = choose_batch(step, N, config).to(device)
            images_BP = images_NP[index_B]
            labels_B = labels_N[index_B]
            if config.augment:
                images_BP = augment(images_BP, step, config)

            # The loss multiplies the logits by a temperature. A network with a small Lipschitz
            # constant has small logits; the factor lets it be confident all the same. The Lipschitz
            # bound is for the unscaled logits. Subtracting a margin from the scaled logit of the
            # right class asks that it lead by that margin, so that the answer survives a small
            # change of the image.
            logits_BK = config.loss_temperature * model(images_BP.to(dtype) / 255).float()
            margins_BK = config.margin * F.one_hot(labels_B, classes)
            loss = F.cross_entropy(logits_BK - margins_BK, labels_B)
            loss.backward()

            # The learning rate decays linearly to 0. A step of Muon does not become smaller by
            # itself near an optimum, so only this averages the noise of the batches out.
            fraction = 1 - step / config.steps
            set_learning_rates(optimizers, fraction)

            # Muon changes every W by an update whose RMS->RMS norm is at most lr, in bfloat16
            # 1.07 lr, whatever the gradient. So the norm of W grows by no more than that. Where it
            # could now exceed w_max, the constraint lowers it, still inside optimizer.step(), and
            # somewhat further than needed, so that it may rest for some steps (constrain_every).
            # Constraints that cannot wait act after every step. With a constraint that guarantees
            # its limit, every layer is then within it. What stands between the layers increases no
            # difference. So the RMS->RMS Lipschitz constant of the network, from the numbers that
            # layer 1 sees to the logits, is at most the product of the limits.
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if config.optimizer == "adamw" and config.constraint != "none":
                # The norm of an AdamW step is not known in advance. So the norm of W is measured
                # after it, and the constraint starts from there. The decays need lr as well.
                for name, W in model.matrices():
                    lr = optimizers[0].param_groups[0]["lr"]
                    W.data.copy_(after_unknown_step(constraint, W, limits[name], lr))

            losses.append(loss.detach())
            done = step + 1
            if done % 10 and done not in eval_steps and not stops:
                continue  # what follows forces a GPU to synchronise
            check_finite(model, torch.stack(losses[-10:]), done, out)
            if done in eval_steps:
                ms_per_step = 1000 * (time.perf_counter() - began) / len(losses)
                log.append(measure(model, test_set, done, losses, ms_per_step))
                print(progress(log[-1], config.steps), flush=True)
                losses = []
            if done in eval_steps or stops:
                save(out, config, done, log, classes=classes, images=N, data=data_name,
                     model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers])
                began = time.perf_counter()
            if stops:
                raise KeyboardInterrupt(f"saved at step {done}; to resume, repeat the command with "
                                        f"--out {out}")
    return report(config, model, out, log, data_name, test_set, dtype)


def build_optimizers(model, config, limits, constraint, dtype):
    """The one of the matrices, and Adam for the biases if there are any."""
    if config.optimizer == "muon":
        # Each of the layers moves by lr / depth. So once norms are at their limit, a step changes
        # their product by about lr / w_max of it at most, whatever the depth.
        peak_lr = (config.lr or 0.2) / config.depth
        groups = [dict(params=[W], w_max=limits[name], peak_lr=peak_lr)
                  for name, W in model.matrices()]
        matrices = Muon(groups, momentum=config.momentum, constraint=constraint, dtype=dtype,
                        every=config.constrain_every)
    else:
        groups = [dict(params=list(model.weights), peak_lr=config.lr or 0.0013)]
        matrices = torch.optim.AdamW(groups, betas=(config.momentum, 0.95),
                                     weight_decay=config.adamw_wd)
    if not config.bias:
        return [matrices]
    groups = [dict(params=list(model.biases), peak_lr=0.01)]
    return [matrices, torch.optim.Adam(groups, betas=(0.9, 0.99))]


@torch.no_grad()
def evaluate(model, images_NP, labels_N):
    """(mean cross-entropy of the logits, accuracy) over a whole set, in float32."""
    device = model.mean_P.device
    logits_NK = torch.cat([model(x.to(device) / 255).cpu() for x in images_NP.split(2000)])
    right_N = logits_NK.argmax(1) == labels_N
    return F.cross_entropy(logits_NK, labels_N).item(), right_N.double().mean().item()


def measure(model, test_set, step, losses, ms_per_step):
    """A record of the log. Its bound is untuned, which is quicker."""
    val_loss, val_accuracy = evaluate(model, *test_set)
    bound = certificate(model)
    return dict(
        step=step, train_loss=torch.stack(losses).mean().item(), val_loss=val_loss,
        val_accuracy=val_accuracy, norms=bound["norms"],
        max_weight_norm=max(bound["norms"].values()),
        lipschitz_log10=finite(bound["tight_log10"] + math.log10(model.rms_per_l2)),
        ms_per_step=ms_per_step)


def report(config, model, out, log, data_name, test_set, dtype):
    """The end of a run: tuned certificate, summary.json, table, picture. Returns the summary."""
    print("Tuning the certificate: some seconds ...", flush=True)
    bound = certificate(model, steps=30)
    radius_N = certified_radii(model, bound["pairs_log10_KK"], *test_set)
    certified = {name: (radius_N > r).double().mean().item() for name, r in RADII.items()}
    product = bound["product_log10"]
    tight = bound["tight_log10"]
    slope = steepest_slope(model, test_set[0])
    to_rms = math.log10(model.rms_per_l2)
    summary = summarize(
        config, model, log[-1], dtype, data=data_name, loss_temperature=config.loss_temperature,
        lipschitz_log10=finite(tight + to_rms), lipschitz_product_log10=finite(product + to_rms),
        lipschitz_norm="RMS->RMS, pixels in [0, 1] to logits", certified_accuracy=certified,
        largest_jacobian_l2=slope)
    write(out / "summary.json", json.dumps(summary, indent=1))

    print(f"\n{config.preset}: {config.optimizer} + {config.constraint}, {config.steps} steps, "
          f"seed {config.seed}, data: {data_name}\n"
          f"  test accuracy {summary['val_accuracy']:.2%}, cross-entropy {summary['val_loss']:.3f}")
    if config.loss_temperature != 1:
        print(f"  trained at a loss temperature of {config.loss_temperature:g}")
    limits = summary["w_max"] or {}
    print_norms(bound["norms"], limits)
    print(f"  Lipschitz constant               l2->l2     RMS->RMS (times {10**to_rms:.2f})")
    # Bounds are rounded up. What was found is a bound from below, and rounded down.
    constants = [("product of sigmas", product, False), ("tight certificate", tight, False),
                 ("found: steepest slope", log10(slope), True)]
    for name, L, down in constants:
        print(f"    {name:25} {power(L, down):>12} {power(L + to_rms, down):>12}")
    shares = [f"{name}: {share:.2%}" for name, share in certified.items()]
    print("  certified accuracy at l2 radius ", "  ".join(shares))
    norms = [record["norms"] for record in log]
    title = f"{config.preset}, {data_name}"
    levels_log10 = {
        "valid bound, tuned, at the end": tight + to_rms,
        "found: steepest slope, at the end": log10(slope) + to_rms}
    draw(out / "curves.png", title, log, norms, limits.values(), levels_log10)
    print(f"\nPicture, log, checkpoint: {out}. Attack its claims: python verify_lipschitz.py {out}")
    return summary


def steepest_slope(model, images_NP):
    """The largest norm (l2) of a Jacobian at 5000 / K images, which no valid bound is below."""
    model = copy.deepcopy(model).cpu()
    count = max(1, 5000 // len(model.weights[-1]))
    x_NP = images_NP[:count].double() / 255

    def logits_of(x_P):
        return model(x_P[None])[0]

    jacobians_NKP = torch.func.vmap(torch.func.jacrev(logits_of))(x_NP)
    return torch.linalg.matrix_norm(jacobians_NKP, ord=2).max().item()


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
