"""How long a training step takes, against AdamW, torch's own Muon and other ways to hold a norm.

    python results/benchmark.py                      # all parts, about ten minutes on two idle cores
    python results/benchmark.py mlp constraint       # some of: mlp, shakespeare, constraint, scaling, startup

What one table compares is measured in one process, in turns, and given as the median over the turns: a
machine that slows down for a while slows all of them down. Data are random: no data set is needed.
"""

import argparse
import functools
import itertools
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import constraints  # noqa: E402
import mlp_cifar  # noqa: E402
import shakespeare  # noqa: E402
from muon import Muon, fast_dtype, msign  # noqa: E402
from published import VOCABULARY  # noqa: E402

LOW = fast_dtype("cpu")


# ==== Timing ======================================================================================
def in_turns(functions, turns=9, seconds=0.25, least=1):
    """{name: median milliseconds of a call}. In each turn every function is called for about so long.

    A constraint that waits costs something at each fourth step, so there call at least 4 times.
    """
    for f in functions.values():
        f()
    times = {name: [] for name in functions}
    for _ in range(turns):
        for name, f in functions.items():
            calls, began = 0, time.perf_counter()
            while calls < least or time.perf_counter() - began < seconds:
                f()
                calls += 1
            times[name].append(1000 * (time.perf_counter() - began) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title, functions, base, **how):
    """Measure and print: milliseconds of a call, and the ratio to `base`. Returns the milliseconds."""
    A = torch.randn(1024, 1024)
    products = {"float32": lambda: A @ A, "bfloat16": lambda B=A.bfloat16(): B @ B}
    ms = in_turns({**products, **functions}, **how)
    speed = ", ".join(f"{2 * 1024**3 / ms.pop(name) / 1e6:.0f} GFLOP/s in {name}" for name in products)
    print(f"\n{title}; this machine multiplies with {speed}")
    for name, value in ms.items():
        print(f"  {name:52} {value:10.2f} ms {value / ms[base]:8.2f}")
    return ms


# ==== Training steps ==============================================================================
def training_step(loss, *optimizers):
    """A function that makes one step."""
    def step():
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def orthogonal(layer):
    """torch's parametrization by the fastest of its maps for these shapes: a tenth of the default's time."""
    return parametrizations.orthogonal(layer, orthogonal_map="cayley")


def svd_clip(W, w_max, step_norm=0.0):
    """The constraint as one would write it without this project."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return U * s.clamp(max=w_max * constraints.sigma_per_norm(W))[..., None, :] @ Vh


def at_limit(matrices, w_max=6.0):
    """The same matrices, of norm w_max: there training spends most of its time, and a softmax is slow."""
    for W in matrices:
        W.data = constraints.stiefel(W.data + torch.randn_like(W), w_max * (1 - 1e-4))
    return matrices


def muon(matrices, constraint, lr, momentum, every=4):
    return Muon(at_limit(matrices), lr, momentum=momentum, constraint=constraint, w_max=6.0, every=every, dtype=LOW)


def steps_with_each_optimizer(make, lr, momentum):
    """{name: a training step}; `make()` gives (loss, matrices, other optimizers) of a new model."""
    variants = {"Muon + soft cap": constraints.soft_cap, "Muon + hard cap": constraints.hard_cap,
                "Muon + specnorm": constraints.specnorm, "Muon + exact SVD clipping": svd_clip,
                "Muon, no constraint": None}
    functions = {}
    for name, constraint in variants.items():
        loss, matrices, others = make()
        functions[name] = training_step(loss, muon(matrices, constraint, lr, momentum), *others)
    rivals = {"torch.optim.Muon": torch.optim.Muon, "AdamW": torch.optim.AdamW,
              "AdamW, fused": functools.partial(torch.optim.AdamW, fused=True)}
    for name, optimizer in rivals.items():
        loss, matrices, others = make()
        step = training_step(loss, optimizer(at_limit(matrices), 1e-3), *others)
        functions[f"{name}, no constraint"] = step
    return functions


def parts_of_a_step(make, lr, momentum):
    """{name: a function} for what a step consists of."""
    loss, matrices, _ = make()
    at_limit(matrices)
    functions = {"  forward and backward": lambda: loss().backward()}
    soft_cap = constraints.soft_cap
    for name, constraint, every in (("Muon alone", None, 1), ("Muon, soft cap at each step", soft_cap, 1),
                                    ("Muon, soft cap waiting", soft_cap, 4)):
        copies = [torch.nn.Parameter(W.detach().clone()) for W in matrices]
        for W in copies:
            W.grad = torch.randn_like(W)
        functions[f"  {name}"] = muon(copies, constraint, lr, momentum, every).step
    return functions


def benchmark_mlp():
    config = mlp_cifar.Config.of("paper")
    x_BP, y_B = torch.rand(512, 3072), torch.arange(512) % 10

    def make():
        model = mlp_cifar.MLP(config)
        return lambda: F.cross_entropy(model(x_BP.to(LOW)).float(), y_B), list(model.weights), []

    lr = 0.2 / config.depth
    functions = steps_with_each_optimizer(make, lr, config.momentum)
    for name, wrap in (("spectral_norm", parametrizations.spectral_norm),
                       ("orthogonal", orthogonal)):
        label = f"AdamW + torch's parametrizations.{name}"
        functions[label] = parametrized_step(wrap, x_BP, y_B)
    functions.update(parts_of_a_step(make, lr, config.momentum))
    show("MLP 3072-256-256-10, 512 images a step", functions, "AdamW, fused, no constraint", least=4)


def parametrized_step(wrap, x_BP, y_B):
    """The same network, of torch's layers, with its weights parametrized."""
    sizes, layers = (3072, 256, 256, 10), []
    for n, m in zip(sizes, sizes[1:]):
        layers += [wrap(torch.nn.Linear(n, m, bias=False)), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=LOW == torch.bfloat16):
            return F.cross_entropy(model(x_BP).float(), y_B)

    return training_step(loss, torch.optim.AdamW(model.parameters(), 1e-3))


def benchmark_shakespeare():
    config = shakespeare.Config.of("paper")
    window_BT = torch.randint(len(VOCABULARY), (32, config.seq_len + 1))

    def make():
        model = shakespeare.Transformer(config, VOCABULARY)
        embedding = [p for name, p in model.named_parameters() if "embedding" in name]
        matrices = [p for name, p in model.named_parameters() if "embedding" not in name]

        def loss():
            logits_BTV = model(window_BT[:, :-1], LOW)
            return F.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())

        return loss, matrices, [torch.optim.Adam(embedding, 0.01)]

    functions = steps_with_each_optimizer(make, 0.1, config.momentum)
    functions.update(parts_of_a_step(make, 0.1, config.momentum))
    title = "Transformer 3 x 256, 8,192 characters a step"
    ms = show(title, functions, "AdamW, fused, no constraint", turns=5, least=4)
    for name in ("Muon + soft cap", "AdamW, fused, no constraint"):
        print(f"  {name}: {32 * config.seq_len / ms[name] * 1000:,.0f} characters a second")


# ==== Constraints alone, sizes, start =============================================================
def benchmark_constraint():
    """One projection of a 768 x 3072 matrix whose norm is one Muon step above the limit."""
    W = msign(torch.randn(768, 3072)) * constraints.sigma_per_norm(torch.empty(768, 3072)) * 1.05
    layer = orthogonal(torch.nn.Linear(3072, 768, bias=False))
    functions = {"soft cap": lambda: constraints.soft_cap(W, 1.0, 0.05),
                 "hard cap": lambda: constraints.hard_cap(W, 1.0),
                 "specnorm": lambda: constraints.specnorm(W, 1.0),
                 "msign (Muon itself)": lambda: msign(W.to(LOW)),
                 "exact SVD clipping": lambda: svd_clip(W, 1.0),
                 "torch's parametrizations.orthogonal, with gradient": lambda: layer.weight.sum().backward()}
    show("A 768 x 3072 matrix", functions, "soft cap", turns=5)
    for name in ("soft cap", "hard cap", "specnorm"):
        norm = constraints.exact_norm(functions[name]()).item()
        print(f"  {name}: RMS->RMS norm afterwards {norm:.6f}, limit 1")


def benchmark_scaling():
    """Milliseconds against size, and the exponent of the best fit ms ~ size^exponent."""
    studies = {"width of a square matrix": (0, [(n, n) for n in (128, 256, 512, 1024)]),
               "length of a 256 x n matrix": (1, [(256, n) for n in (256, 512, 1024, 2048, 4096)]),
               "number of 256 x 256 matrices": (0, [(k, 256, 256) for k in (1, 2, 4, 8, 16)])}
    maps = {"msign": lambda W: msign(W.to(LOW)), "soft cap": lambda W: constraints.soft_cap(W, 1.0, 0.05)}
    for title, (dimension, shapes) in studies.items():
        matrices = {shape: torch.randn(shape) / 40 for shape in shapes}
        ms = in_turns({(name, shape): lambda f=f, W=W: f(W) for (name, f), (shape, W)
                       in itertools.product(maps.items(), matrices.items())}, turns=5, seconds=0.1)
        for name in maps:
            x = [math.log(shape[dimension]) for shape in shapes]
            slope = statistics.linear_regression(x, [math.log(ms[name, shape]) for shape in shapes]).slope
            times = "  ".join(f"{shape[dimension]}: {ms[name, shape]:.2f} ms" for shape in shapes)
            print(f"  {title}: {name:9} {times}  exponent {slope:.2f}")


def benchmark_startup():
    """Seconds until --help is printed, and until the first line of a training, just before its first step."""
    for script in ("mlp_cifar", "shakespeare", "nanogpt_lipschitz", "verify_lipschitz"):
        command, began = [sys.executable, ROOT / f"{script}.py"], time.perf_counter()
        subprocess.run([*command, "--help"], stdout=subprocess.DEVNULL, check=True)
        print(f"  {script}: --help {time.perf_counter() - began:.2f} s", flush=True)
        if script != "verify_lipschitz":
            began = time.perf_counter()
            with (tempfile.TemporaryDirectory() as out,
                  subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, text=True) as process):
                line = process.stdout.readline()
                process.kill()
            print(f"    training begins after {time.perf_counter() - began:.2f} s: {line.strip()[:70]} ...")


PARTS = dict(mlp=benchmark_mlp, shakespeare=benchmark_shakespeare, constraint=benchmark_constraint,
             scaling=benchmark_scaling, startup=benchmark_startup)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} [all]")
    parts = parser.parse_args(argv).parts
    for name in parts:
        if name not in PARTS:
            parser.error(f"{name}: must be some of {', '.join(PARTS)}")
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # (as in the scripts)
    for name in parts or PARTS:
        PARTS[name]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # (Linux counts in KiB)
    print(f"\npeak memory {peak:.2f} GiB; torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
