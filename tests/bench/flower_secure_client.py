"""The ClientApp of `flower_deployed`; runs under an interpreter that has `flwr`."""

import numpy as np
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Context, NDArrays, Scalar


class Adder(NumPyClient):  # type: ignore[misc]  # flwr has no types here
    """Adds a thousandth to every element, or fails, which the ServerApp learns at once."""

    def __init__(self, *, is_dropped: bool) -> None:
        self._is_dropped = is_dropped

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Return the trained weights; keys were shared before."""
        del config
        if self._is_dropped:
            raise RuntimeError("dropped out")
        return [array + np.float32(0.001) for array in parameters], 100, {}


def make_client(context: Context) -> Client:
    """Return the client of a node."""
    is_dropped = int(context.node_config["number"]) < int(context.run_config["dropped"])
    return Adder(is_dropped=is_dropped).to_client()


app = ClientApp(client_fn=make_client, mods=[secaggplus_mod])
