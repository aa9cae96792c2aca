"""A device that runs a Flower app, in the environment of flwr, with the seeds of Flower's own run.

python our_device.py APP COUNT NODE HOME SESSION
"""

import sys
from pathlib import Path

from flower_test_seeds import seed  # type: ignore[import-not-found] # beside the data

from qflare.tensors import Array
from qflare_client import Client, TrainingTask, run
from qflare_client.flower import flower_device


def main() -> None:
    folder, count, node, home, session_id = sys.argv[1:]
    device = flower_device(
        Path(folder),
        home=home,
        node_config={"partition-id": int(node), "num-partitions": int(count)},
    )

    def train(
        arrays: dict[str, Array], task: TrainingTask
    ) -> tuple[dict[str, Array], int, dict[str, float]]:
        seed(int(node), task.round_number)
        return device.train(arrays, task)

    with Client(home=home) as client:
        run(client, train, training_session_id=session_id, patience_s=30.0)


main()
