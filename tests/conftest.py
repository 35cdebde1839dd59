"""One thread a process, as small models are no faster on more; little data, drawn once a file; pictures not drawn."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too

import pytest
import torch
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_post_hook

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """They count in every test, though the scripts, when run, let them be 0."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def few_images():
    """The stand-in of mlp_cifar.py, but few of its drawings: ((images, labels) to train, the same to test)."""
    import mlp_cifar
    sets = mlp_cifar.stand_in(600, 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp_cifar, "stand_in", lambda: sets)
        yield sets


@pytest.fixture(scope="module")
def little_text():
    """The stand-in of shakespeare.py, but little of it."""
    import shakespeare
    text = shakespeare.stand_in(20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shakespeare, "stand_in", lambda: text)
        yield text


@pytest.fixture(scope="module")
def blank_pictures():
    """Pictures are files without a picture, as drawing takes half the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"a picture"))
        yield


@pytest.fixture
def after_step():
    """A function that registers what is called with an optimizer after each of its steps, until the test ends."""
    hooks = []

    def register(call):
        hooks.append(register_optimizer_step_post_hook(lambda optimizer, *_: call(optimizer)))

    yield register
    for hook in hooks:
        hook.remove()
