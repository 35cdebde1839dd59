"""One thread a process, as small models are no faster on more; the whole suite in two processes, on two cores."""

import os
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import torch  # noqa: E402

torch.set_num_threads(1)
BESIDE = ("test_constraints.py", "test_muon.py", "test_nanogpt_lipschitz.py", "test_verify_lipschitz.py")  # half of the time
second = None  # the process that runs them while this one runs the others


def pytest_configure(config):
    """The plain command, `python -m pytest -q` in the repository's folder, starts the second process."""
    global second
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if whole and set(config.invocation_params.args) <= {"-q", "-v"} and (os.cpu_count() or 1) > 1:
        files = [str(config.rootpath / "tests" / name) for name in BESIDE]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pytest_ignore_collect(collection_path):
    if second and collection_path.name in BESIDE:
        return True


def pytest_sessionfinish(session):
    """What the second process reported comes before the summary of the first; the whole fails if either does."""
    if second:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line("\n" + " ".join(BESIDE) + ":\n" + second.communicate()[0])
        session.exitstatus = session.exitstatus or second.returncode
