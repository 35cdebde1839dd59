"""The largest sigma / limit after any step of a whole run, by SVD in float64: python tests/enforcement.py [flags]

Run by hand (minutes), not by pytest, which does the same for 40 steps. Flags are those of mlp_cifar.py; without
--constraint the four that promise a limit take turns.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mlp_cifar  # noqa: E402
from constraints import singular_values  # noqa: E402

flags = sys.argv[1:]
for constraint in ("soft_cap", "hard_cap", "specnorm", "stiefel"):
    config = mlp_cifar.parse_arguments([*flags, "--constraint", constraint] if "--constraint" not in flags else flags)
    mlp_cifar.check(config)
    mlp_cifar.keep_memory()
    (images_NP, labels_N), _, data_name = mlp_cifar.load_data(config)
    model = mlp_cifar.MLP(config, images_NP.sum(0) / (255 * len(images_NP)))
    optimizers = mlp_cifar.make_optimizers(config, model)
    dtype, w_max = mlp_cifar.compute_dtype(config, torch.device("cpu")), mlp_cifar.limits(config)
    largest, reached = 0.0, 0
    for step in range(config.steps):
        index = mlp_cifar.batch_indices(step, config, len(labels_N))
        mlp_cifar.train_step(config, model, optimizers, images_NP[index], labels_N[index], step, dtype)
        shares = [singular_values(W)[0].item() / w for W, w in zip(model.weights, w_max)]
        largest, reached = max(largest, *shares), reached + any(share > 0.95 for share in shares)
    print(f"{config.constraint}: largest sigma / limit {largest:.7f} over {config.steps} steps ({reached} of them above 0.95), "
          f"{config.preset}, {dtype}, seed {config.seed}, data: {data_name}", flush=True)
    if "--constraint" in flags:
        break
