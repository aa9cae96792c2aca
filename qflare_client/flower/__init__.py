"""Flower apps on QFLARE devices: runs a ClientApp unchanged; flwr is imported by this package alone, lazily.

    device = flower_device("my-app", home="device1", node_config={"partition-id": 0})
    with Client(home="device1") as client:
        run(client, device.train, evaluate=device.evaluate)

Needs the extra `qflare[flower]`. docs/migrating.md states what a Flower project keeps and what it replaces.
"""

from qflare_client.flower.device import FlowerDevice, flower_device
from qflare_client.flower.library import MissingFlowerError

__all__ = ["FlowerDevice", "MissingFlowerError", "flower_device"]
