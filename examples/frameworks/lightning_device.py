"""A device that trains a Lightning module: classes of points that a line separates.

python lightning_device.py initial model.safetensors
python lightning_device.py train HOME SESSION
"""

import sys
from pathlib import Path

import lightning
import torch
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, TensorDataset

from qflare_client import Client, run
from qflare_client.adapters.lightning import to_arrays, training_function


class Classifier(lightning.LightningModule):  # type: ignore[misc,unused-ignore]
    """Two dense layers with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.learning_rate = 0.1  # each task sets its own
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        )

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch; what is logged is sent with the update."""
        points, classes = batch
        logits = self.layers(points)
        loss = torch.nn.functional.cross_entropy(logits, classes)
        accuracy = (logits.argmax(dim=1) == classes).float().mean()
        self.log_dict({"loss": loss, "accuracy": accuracy}, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of a task."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


torch.manual_seed(0)
points = torch.randn(200, 2)
loader = DataLoader(TensorDataset(points, (points.sum(dim=1) > 0).long()), batch_size=50)
module = Classifier()
train = training_function(module, loader, accelerator="cpu")


if __name__ == "__main__":
    if sys.argv[1] == "initial":
        save_file(to_arrays(module), sys.argv[2])
    else:
        with Client(home=Path(sys.argv[2])) as client:
            print(run(client, train, training_session_id=sys.argv[3]))
