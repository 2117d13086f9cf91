"""Record tests/golden/class_weights.npz from PyTorch, in the reference environment (see README.md):
CrossEntropyLoss with weights of the classes, alone and with smoothed labels.

    python tests/reference/record_weights.py

Arrays: logits [6, 13, 3], labels [6, 13] with -100 among them, weights [3]; by the share that is
smoothed <share>/loss and <share>/gradient, that of the logits.
"""

import numpy as np
import torch
from recorder import GOLDEN

SHARES = (0.0, 0.1)
WEIGHTS = (0.05, 3.0, 0.7)


def main():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(6, 13, len(WEIGHTS))).astype(np.float32)
    labels = generator.integers(0, len(WEIGHTS), (6, 13))
    labels[generator.random(labels.shape) < np.linspace(0, 0.9, 6)[:, None]] = -100
    arrays = {"logits": logits, "labels": labels, "weights": np.float32(WEIGHTS)}
    for share in SHARES:
        given = torch.tensor(logits, requires_grad=True)
        criterion = torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=share)
        loss = criterion(given.reshape(-1, len(WEIGHTS)), torch.tensor(labels).reshape(-1))
        loss.backward()
        arrays |= {f"{share}/loss": loss.detach().numpy(), f"{share}/gradient": given.grad.numpy()}
    np.savez_compressed(GOLDEN / "class_weights.npz", **arrays)


if __name__ == "__main__":
    main()
