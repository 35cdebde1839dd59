"""How fast, against what the machine can do and against peers: run by hand, on an idle machine.

    python tests/benchmark.py                    # all parts, about ten minutes on two cores
    python tests/benchmark.py mlp constraint     # some of: mlp, shakespeare, constraint, scaling, startup

Everything in one table is measured in one process, one after the other in turns, and given as the median over the turns:
a machine that slows down for a while slows all of them down.
"""

import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import constraints  # noqa: E402
import mlp_cifar  # noqa: E402
import shakespeare  # noqa: E402
from muon import Muon, msign  # noqa: E402


def in_turns(functions, turns=9, seconds=0.25, least=1):
    """{name: median milliseconds of a call}: in each turn every function is called for about this long, at least so often.

    (A constraint that waits costs something at each fourth step: take at least 4, where the median is to see it.)
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


def products():
    """Functions that multiply 1024 x 1024 matrices, and one that copies 64 MB: the machine's ceilings."""
    def product(dtype):
        A = torch.randn(1024, 1024).to(dtype)
        return lambda: A @ A

    here, there = torch.zeros(2**24), torch.zeros(2**24)
    return {"ceiling float32": product(torch.float32), "ceiling bfloat16": product(torch.bfloat16),
            "ceiling memory": lambda: there.copy_(here)}


def gflops(ms):
    return 2 * 1024**3 / ms / 1e6


def counted(f):
    """FLOPs of the products of a call."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def megabytes_moved(parameters, inputs):
    """What any step has to read and write at least: each weight, gradient and momentum once in and once out, and the input."""
    return sum(24 * p.numel() for p in parameters) / 1e6 + inputs / 1e6


def show(title, ms, flops, base, megabytes=None):
    """A table of ms a call, the ratio to `base`, and the share of what the machine can do: the larger of the time that the
    FLOPs take at the ceiling of bfloat16 and, where counted, that of the bytes at the speed of a copy."""
    f32, bf16, gigabytes = gflops(ms["ceiling float32"]), gflops(ms["ceiling bfloat16"]), 2 * 4 * 2**24 / ms["ceiling memory"] / 1e6
    print(f"\n{title}; ceilings {f32:.0f} GFLOP/s in float32, {bf16:.0f} in bfloat16, {gigabytes:.1f} GB/s")
    print(f"  {'':52} {'ms':>9} {'ratio':>7} {'GFLOP':>8} {'MB':>7} {'of the ceiling':>15}")
    for name in ms:
        if not name.startswith("ceiling"):
            count, moved = flops.get(name), (megabytes or {}).get(name, 0)
            least = max(count / 1e6 / max(f32, bf16), moved / gigabytes) if count else 0
            work = f"{count / 1e9:8.2f} {moved or '':7.4} {100 * least / ms[name]:13.0f} %" if count else ""
            print(f"  {name:52} {ms[name]:9.2f} {ms[name] / ms[base]:7.2f} {work}")
    print(flush=True)


def svd_clip(W, w_max, step_norm=0.0):
    """The constraint as one would write it without this project."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return U * s.clamp(max=w_max * constraints.sigma_per_norm(W))[..., None, :] @ Vh


constraints.CONSTRAINTS["svd_clip"] = svd_clip


# ---- a training, with peers and in parts -----------------------------------------------------------------------------
def steps_of(script, make, configs, batch):
    """{name: a function that does one training step}; `make(config)` gives a model, `batch(config, step)` its input."""
    functions = {}
    for name, config in configs.items():
        script.check(config)
        model = make(config)
        optimizers, counter = script.make_optimizers(config, model), iter(range(10**9))
        for group in optimizers[0][0].param_groups if config.constraint != "none" else ():
            for W in group["params"]:  # begin at the limit, where training spends most of its time
                W.data = constraints.stiefel(W.data + torch.randn_like(W), group["w_max"] * (1 - 1e-4))
        dtype = script.compute_dtype(config, torch.device("cpu"))

        def step(config=config, model=model, optimizers=optimizers, counter=counter, dtype=dtype):
            i = next(counter) % config.steps
            script.train_step(config, model, optimizers, *batch(config, i), i, dtype)

        functions[name] = step
    return functions


def parts_of(config, model, matrices, loss, limit):
    """{name: a function} for the parts of a step: forward, forward and backward, Muon without and with its constraint."""
    def backward():
        loss().backward()
        model.zero_grad(set_to_none=True)

    copies = [torch.nn.Parameter(W.detach().clone()) for W in matrices]
    for W in copies:
        W.grad = torch.randn_like(W)
    low = constraints.fast_dtype("cpu")
    settings = dict(lr=config.lr, momentum=config.momentum, dtype=low)
    free = Muon(copies, **settings)
    held = [Muon([torch.nn.Parameter(constraints.stiefel(W.detach(), limit)) for W in matrices], constraint=constraints.soft_cap,
                 w_max=limit * (1 + 1e-4), every=every, **settings) for every in (1, config.constrain_every)]
    for optimizer in held:
        for W, V in zip(optimizer.param_groups[0]["params"], copies):
            W.grad = V.grad
    return {"  part: forward": loss, "  part: forward and backward": backward, "  part: Muon without constraint": free.step,
            "  part: Muon with soft cap at each step": held[0].step, "  part: Muon with soft cap, waiting": held[1].step}


def benchmark_mlp():
    images_NP = torch.randint(256, (20_000, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels_N = torch.arange(20_000) % 10

    def config(preset, **changes):
        return mlp_cifar.Config(**{**mlp_cifar.PRESETS[preset], "preset": preset, "steps": 10**6, **changes})

    def batch(config, step):
        index = mlp_cifar.batch_indices(step, config, len(images_NP))
        return images_NP[index], labels_N[index]

    constrained, adamw = "constrained Muon (preset paper)", "AdamW, unconstrained, the same network"
    configs = {constrained: config("paper"), "  with hard cap": config("paper", constraint="hard_cap"),
               "  with specnorm": config("paper", constraint="specnorm"), "  with exact SVD clipping": config("paper", constraint="svd_clip"),
               "  without constraint": config("paper", constraint="none"), adamw: config("paper_adamw"),
               "default preset": config("default")}
    functions = {**products(), **steps_of(mlp_cifar, mlp_cifar.MLP, configs, batch)}
    x_BP, y_B = images_NP[:512].float() / 255, labels_N[:512]
    for name, wrap in (("spectral_norm", parametrizations.spectral_norm), ("orthogonal", parametrizations.orthogonal)):
        functions[f"AdamW, torch's parametrizations.{name}"] = parametrized(wrap, x_BP, y_B)
    functions["torch.optim.Muon, unconstrained"] = with_torch_muon(x_BP, y_B)
    c = configs[constrained]
    model = mlp_cifar.MLP(c)
    functions.update(parts_of(c, model, list(model.weights), lambda: F.cross_entropy(model(x_BP.bfloat16()).float(), y_B), 6.0))
    functions["  part: data, 512 images"] = lambda: batch(c, 7)[0].to(torch.bfloat16).div_(255)
    flops = {name: counted(f) for name, f in functions.items() if "parametrizations" not in name and "data" not in name}
    megabytes = dict.fromkeys(configs.keys() - {"default preset"}, megabytes_moved(model.parameters(), 512 * 3072))
    show("MLP 3072-256-256-10, batch 512", in_turns(functions), flops, adamw, megabytes)


def plain_mlp():
    return torch.nn.Sequential(torch.nn.Linear(3072, 256, bias=False), torch.nn.ReLU(), torch.nn.Linear(256, 256, bias=False),
                               torch.nn.ReLU(), torch.nn.Linear(256, 10, bias=False))


def plain_step(model, optimizer, x_BP, y_B):
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=constraints.fast_dtype("cpu") == torch.bfloat16):
            loss = F.cross_entropy(model(x_BP).float(), y_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def parametrized(wrap, x_BP, y_B):
    model = plain_mlp()
    for layer in model[::2]:
        wrap(layer)
    return plain_step(model, torch.optim.AdamW(model.parameters(), 1e-3), x_BP, y_B)


def with_torch_muon(x_BP, y_B):
    model = plain_mlp()
    return plain_step(model, torch.optim.Muon(model.parameters(), lr=0.02), x_BP, y_B)


def benchmark_shakespeare():
    text_N = torch.randint(65, (200_000,), generator=torch.Generator().manual_seed(0))

    def config(preset, **changes):
        return shakespeare.Config(**{**shakespeare.PRESETS[preset], "preset": preset, "steps": 10**6, "batch": 32, **changes})

    def batch(config, step):
        start_B = torch.randint(len(text_N) - config.seq_len, (config.batch,))
        window_BT = text_N[start_B[:, None] + torch.arange(config.seq_len + 1)]
        return window_BT[:, :-1], window_BT[:, 1:]

    def make(config):
        return shakespeare.Transformer(config, shakespeare.VOCABULARY)

    constrained, adamw = "constrained Muon (preset paper --batch 32)", "AdamW, unconstrained, the same network"
    configs = {constrained: config("paper"), "  without constraint": config("paper", constraint="none"),
               "  with exact SVD clipping": config("paper", constraint="svd_clip"), adamw: config("paper_adamw"),
               "preset laptop": config("laptop"), "preset plain100": config("plain100")}
    functions = {**products(), **steps_of(shakespeare, make, configs, batch)}
    c = configs[constrained]
    model, (x_BT, y_BT) = make(c), batch(c, 0)
    peer = make(configs["  without constraint"])
    optimizers = [(torch.optim.Muon([W for _, W in peer.matrices()], momentum=0.95), 0.02), (torch.optim.Adam([peer.embedding_VD]), 0.01)]
    functions["torch.optim.Muon, unconstrained, the same network"] = lambda: shakespeare.train_step(
        configs["  without constraint"], peer, optimizers, x_BT, y_BT, 0, dtype)
    dtype = shakespeare.compute_dtype(c, torch.device("cpu"))
    functions.update(parts_of(c, model, [W for _, W in model.matrices()],
                              lambda: F.cross_entropy(model(x_BT, dtype).flatten(0, 1), y_BT.flatten()), 6.0))
    functions["  part: data, 32 windows"] = lambda: batch(c, 0)
    flops = {name: counted(f) for name, f in functions.items() if "data" not in name}
    ms = in_turns(functions, turns=5, least=4)
    megabytes = dict.fromkeys(configs.keys() - {"preset laptop", "preset plain100"}, megabytes_moved(model.parameters(), 32 * 257 * 8))
    show("Transformer 3 x 256, 8,192 characters a step", ms, flops, adamw, megabytes)
    print(f"  {8192 / ms[constrained] * 1000:,.0f} characters/s constrained, {8192 / ms[adamw] * 1000:,.0f} with AdamW")


# ---- the constraint alone --------------------------------------------------------------------------------------------
def benchmark_constraint():
    """One projection of a 768 x 3072 matrix whose norm is one Muon step above the limit."""
    W = msign(torch.randn(768, 3072, generator=torch.Generator().manual_seed(0))) * constraints.sigma_per_norm(torch.empty(768, 3072)) * 1.05
    low = constraints.fast_dtype("cpu")
    layer = torch.nn.Linear(3072, 768, bias=False)
    parametrizations.orthogonal(layer)

    def orthogonal():  # what it does at each step: rebuild the matrix, and its gradient
        layer.weight.sum().backward()

    functions = {**products(), "soft cap": lambda: constraints.soft_cap(W, 1.0, 0.05), "hard cap": lambda: constraints.hard_cap(W, 1.0),
                 "specnorm": lambda: constraints.specnorm(W, 1.0), "msign (Muon itself)": lambda: msign(W.to(low)),
                 "exact SVD clipping": lambda: svd_clip(W, 1.0), "torch's parametrizations.orthogonal": orthogonal}
    flops = {name: counted(functions[name]) for name in ("soft cap", "specnorm", "msign (Muon itself)")}
    show("A 768 x 3072 matrix", in_turns(functions, turns=5), flops, "soft cap")
    for name in ("soft cap", "hard cap", "specnorm"):
        print(f"  {name}: RMS->RMS norm afterwards {constraints.exact_norm(functions[name]()).item():.6f}, limit 1")


def benchmark_scaling():
    """Cost of msign and soft cap against width and aspect ratio, with the exponent of the best fit ms ~ size^exponent."""
    low = constraints.fast_dtype("cpu")
    for title, shapes, size in (("square, width", [(n, n) for n in (128, 256, 512, 1024)], lambda s: s[0]),
                                ("256 x n, n", [(256, n) for n in (256, 512, 1024, 2048, 4096)], lambda s: s[1]),
                                ("stack of k of 256 x 256, k", [(k, 256, 256) for k in (1, 2, 4, 8, 16)], lambda s: s[0])):
        functions = {}
        for shape in shapes:
            W = torch.randn(shape) / 40
            functions[f"msign {shape}"] = lambda W=W: msign(W.to(low))
            functions[f"soft cap {shape}"] = lambda W=W: constraints.soft_cap(W, 1.0, 0.05)
        ms = in_turns(functions, turns=5, seconds=0.1)
        for what in ("msign", "soft cap"):
            x = [math.log(size(shape)) for shape in shapes]
            y = [math.log(ms[f"{what} {shape}"]) for shape in shapes]
            exponent = statistics.linear_regression(x, y).slope
            print(f"  {title}: {what:9}" + "".join(f"  {size(shape)}: {ms[f'{what} {shape}']:.2f} ms" for shape in shapes) + f"  exponent {exponent:.2f}")


def benchmark_startup():
    """Seconds until --help is printed, and until a training begins (its first line, which comes right before the first step)."""
    for script in ("mlp_cifar", "shakespeare", "nanogpt_lipschitz", "verify_lipschitz"):
        began = time.perf_counter()
        subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], stdout=subprocess.DEVNULL, check=True)
        text = f"  {script}: --help {time.perf_counter() - began:.2f} s"
        if script != "verify_lipschitz":
            began = time.perf_counter()
            with subprocess.Popen([sys.executable, ROOT / f"{script}.py", "--out", f"/tmp/startup_{time.time_ns()}"], stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, text=True) as process:
                line = process.stdout.readline()
                text += f", training begins after {time.perf_counter() - began:.2f} s ({line.strip()[:60]} ...)"
                process.kill()
        print(text, flush=True)


def main():
    parts = dict(mlp=benchmark_mlp, shakespeare=benchmark_shakespeare, constraint=benchmark_constraint, scaling=benchmark_scaling,
                 startup=benchmark_startup)
    wrong = [name for name in sys.argv[1:] if name not in parts]
    if wrong:
        sys.exit(f"benchmark.py: {wrong[0]}: must be some of {', '.join(parts)}")
    mlp_cifar.keep_memory()
    for name in sys.argv[1:] or parts:
        parts[name]()
    import resource
    print(f"\npeak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB; torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
