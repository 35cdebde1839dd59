"""Small models run on one thread: two programs that each use all cores slow each other by 3 to 8 times."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import torch  # noqa: E402

torch.set_num_threads(1)
