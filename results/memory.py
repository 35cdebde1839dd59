"""Peak memory of a training step of nanogpt_lipschitz.py on one of 8 GPUs, without a GPU.

    python results/memory.py      # a minute on two CPU cores; needs Linux, g++ and a CPU build of torch

`main` runs on fake CUDA tensors: they have shapes and sizes, but no memory. A stub of CUDA's guard, compiled
here, lets a CPU build of torch take them for real. torch.compile makes its graphs, forward and backward, and
chooses what is kept for the backward pass, as on a GPU; only kernels are not made. What is counted is the sum
of all living tensors. It leaves out what CUDA, NCCL and fragmentation take, and counts temporaries that fused
kernels would never write, so it bounds the tensors of a real step from above. tests/test_nanogpt_lipschitz.py
uses the same machinery to find synchronisations, and checks the table.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import constraints  # noqa: E402
import nanogpt_lipschitz as nano  # noqa: E402

TABLE = ROOT / "results" / "memory.csv"
PRESETS = ("cap1", "specnorm8", "tight", "baseline")
GIB = 2**30
STUB = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
namespace {
const Device device(DeviceType::CUDA, 0);
struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
struct Hooks final : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
}
namespace at { using CUDAHooks = Hooks; REGISTER_CUDA_HOOKS(CUDAHooks) }
namespace c10::impl { using ::Guard; C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
"""


def possible():
    """Whether this machine can compile the stub and has no CUDA of its own."""
    return bool(shutil.which("g++")) and sys.platform.startswith("linux") and not torch.version.cuda


def with_stub(command):
    """What a command did (subprocess.CompletedProcess), in a process with the stub in it."""
    torch_root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stub.cpp").write_text(STUB)
        subprocess.run([
            "g++", "-shared", "-fPIC", "-O0", "-std=c++20", "stub.cpp", "-o", "stub.so", f"-I{torch_root}/include",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", f"-L{torch_root}/lib", "-lc10",
            "-ltorch_cpu", f"-Wl,-rpath,{torch_root}/lib"], cwd=folder, check=True)
        return subprocess.run(
            command, capture_output=True, text=True, cwd=folder,
            env={**os.environ, "LD_PRELOAD": f"{folder}/stub.so", "OMP_NUM_THREADS": "1"})


def on_fake_cuda(cases):
    """What happened in each case (flags, rank, world size, steps), from a process with the stub in it."""
    result = with_stub([sys.executable, __file__, json.dumps(cases)])
    found = [json.loads(line[4:]) for line in result.stdout.splitlines() if line.startswith("JSON")]
    if len(found) != len(cases):
        raise RuntimeError(result.stderr[-3000:])
    return found


# ==== In that process =============================================================================
class Logged(Exception):
    """The first look at a result that the script takes on purpose: its check for divergence."""


class Watch(TorchDispatchMode):
    """Of each step: copies between host and device, waits for the device, collectives, memory."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls):  # (else torch.compile would not compile under it)
        return True

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak, self.steps = {}, 0, 0, []
        self.next_step()

    def next_step(self):
        self.steps.append(dict(copies=[], waits=[], calls=[]))
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, inputs = str(func), tensors((args, kwargs))
        if "_local_scalar_dense" in name or "_linalg_eigh" in name or "_linalg_svd" in name:
            # A number that Python asks for; a decomposition, whose error code the host reads.
            frame = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT][-1]
            if "isfinite" in frame.line:
                raise Logged
            self.steps[-1]["waits"].append(f"{frame.name}: {frame.line}")
            if "_local_scalar_dense" in name:
                return False
        result = func(*args, **(kwargs or {}))
        for x in tensors(result):
            if x.device.type == "cuda":
                self.count(x.untyped_storage())
        if len({x.device.type for x in [*inputs, *tensors(result)]}) == 2:
            numbers = [x for x in inputs if x.device.type == "cpu" and x.dim() == 0]
            if not numbers or "copy" in name:  # (a number on the host is an argument of the kernel)
                self.steps[-1]["copies"].append(name)
        return result

    def count(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Text:
    """Tokens without end."""

    def __len__(self):
        return 10**9

    def sequences(self, step, rows, config):
        return torch.zeros(len(rows), config.seq_len + 1, dtype=torch.int64)


class Work:
    """A message that has arrived; a store."""
    wait = set = lambda self, *rest: None


def move(module, device):
    for m in module.modules():
        for held in (m._parameters, m._buffers):
            for name, x in held.items():
                moved = x.detach().to(device)
                held[name] = torch.nn.Parameter(moved) if isinstance(x, torch.nn.Parameter) else moved
    return module


def run(flags, rank, world_size, steps, compiled=True):
    """`steps` steps of main, or up to the first that is logged."""
    watch, measured = Watch(), {}
    share, update = nano.Exchange.share_weights, nano.Muon.step

    def collective(name):
        def recorded(x, *rest, **kwargs):
            watch.steps[-1]["calls"].append([name, list(x.shape), *[y for y in rest if isinstance(y, int)]])
            return Work()
        return recorded

    def before_the_update(muon):
        measured["backward"] = watch.peak
        watch.peak = watch.now
        return update(muon)

    def after_a_step(exchange):
        share(exchange)
        own = [(p, name) for p, name in exchange.names.items() if exchange.owner[p] == rank]
        measured.update(
            update=watch.peak, weights=sum(4 * p.numel() for p in exchange.names),
            states=sum((8 if "embedding" in name or "query" in name else 4) * p.numel() for p, name in own))
        watch.next_step()
        if len(watch.steps) > steps:
            raise StopIteration

    compiler = dict(backend="aot_eager_decomp_partition", dynamic=False)
    compile_function, compile_module = torch.compile, torch.nn.Module.compile
    torch.compile = lambda f, **kwargs: compile_function(f, **compiler) if compiled else f
    torch.nn.Module.compile = lambda m, **kwargs: compile_module(m, **compiler) if compiled else None
    nano.Exchange.share_weights, nano.Muon.step = after_a_step, before_the_update
    nano.load_data = lambda config: (Text(), Text(), "fake")
    nano.fast_dtype = constraints.fast_dtype = lambda device: torch.bfloat16
    nano.can_compile = lambda device: True
    torch.cuda.set_device, torch.Tensor.pin_memory, torch.nn.Module.to = lambda device: None, lambda x: x, move
    dist.rendezvous = lambda *rest, **kwargs: iter([(Work(), 0, 0)])
    for name in ("reduce", "broadcast", "all_reduce"):
        setattr(dist, name, collective(name))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    with tempfile.TemporaryDirectory() as out:
        config = nano.parse_arguments([*flags, "--steps", "3", "--evals", "1", "--device", "cuda", "--out", out])
        dist.init_process_group = lambda *rest, **kwargs: None
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), watch:
                nano.main(config)
        except (StopIteration, Logged) as end:
            measured["end"] = type(end).__name__
    nano.Exchange.share_weights, nano.Muon.step = share, update
    torch.compile, torch.nn.Module.compile = compile_function, compile_module
    return dict(measured, steps=watch.steps)


# ==== The table ===================================================================================
CASES = [[["--preset", preset], 0, 8, 99] for preset in PRESETS]


def rows(presets, found):
    """The table, in GiB, of what happened in the cases of these presets."""
    result = []
    for preset, x in zip(presets, found):
        sizes = dict(weights=x["weights"], gradients=x["weights"], states=x["states"], peak_backward=x["backward"],
                     peak_update=x["update"], peak=max(x["backward"], x["update"]))
        result.append(dict(preset=preset, **{name: round(size / GIB, 2) for name, size in sizes.items()}))
    return result


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    table = rows(PRESETS, on_fake_cuda(CASES))
    with open(TABLE, "w", newline="") as f:
        writer = csv.DictWriter(f, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print("GiB on rank 0 of 8, in the third step, at the paper's shapes")
    for row in [dict(zip(table[0], table[0])), *table]:
        print("".join(f"{value:>15}" for value in row.values()))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        for case in json.loads(sys.argv[1]):
            print("JSON" + json.dumps(run(*case)), flush=True)
    else:
        main()
