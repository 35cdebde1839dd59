"""nanogpt_lipschitz.py as one of several processes, with a fault: for tests/test_nanogpt_lipschitz.py.

    python tests/nanogpt_worker.py FAULT FOLDER [flags of the script]      by torchrun, or run() in a process
"""

import hashlib
import os
import pathlib
import runpy
import signal
import sys
import traceback

import torch._dynamo  # noqa: F401  Adam imports it when it is first made; what a server has, its forks have

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import muon  # noqa: E402
import nanogpt_lipschitz as nano  # noqa: E402

STEP = muon.Muon.step
WRITE_BYTES = pathlib.Path.write_bytes
EVALUATE = nano.evaluate
steps = 0


def faulty_step(self):
    """In the fifth step of rank 1, unless torchrun has started it again."""
    global steps
    steps += 1
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and steps == 5:
        if FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if FAULT == "exception":
            raise ValueError("a fault of one rank")
    return STEP(self)


def full_disk(path, data):
    if "checkpoint" in path.name:
        raise OSError(28, "No space left on device", str(path))
    return WRITE_BYTES(path, data)


def noted_evaluate(model, *arguments):
    """The bits of all weights, a line an evaluation, in a file of this rank."""
    bits = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    with open(pathlib.Path(FOLDER) / f"rank{os.environ['RANK']}", "a") as file:
        file.write(hashlib.sha256(bits).hexdigest() + "\n")
    return EVALUATE(model, *arguments)


def start(fault, folder, flags):
    global FAULT, FOLDER
    FAULT, FOLDER = fault, folder
    muon.Muon.step = faulty_step
    if fault == "disk":
        pathlib.Path.write_bytes = full_disk
    if fault == "note":
        nano.evaluate = noted_evaluate
        nano.main(nano.parse_arguments(flags))
        os._exit(0)  # as the script does
    sys.argv = ["nanogpt_lipschitz.py", *flags]
    runpy.run_path(str(ROOT / "nanogpt_lipschitz.py"), run_name="__main__")


def run(rank, processes, port, fault, folder, flags):
    """In a process of its own, as torchrun would start it."""
    sys.stdout = sys.stderr = open(pathlib.Path(folder) / f"output{rank}", "w")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port),
                      TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_RUN_ID="test")
    try:
        start(fault, folder, flags)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(99)


if __name__ == "__main__":
    start(sys.argv[1], sys.argv[2], sys.argv[3:])
