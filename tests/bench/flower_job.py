"""The job of `simulated_job` in Flower's simulation on Ray; runs under an interpreter that has `flwr[simulation]`.

python flower_job.py DEVICES ROUNDS
"""

import sys

import numpy as np
from flwr.client import Client, ClientApp, NumPyClient
from flwr.common import Context, NDArrays, Scalar, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

ELEMENTS = 2_500


class Adder(NumPyClient):  # type: ignore[misc]  # flwr has no types here
    """Adds 1 to every element."""

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Return the trained weights."""
        del config
        return [array + np.float32(1) for array in parameters], 1, {}


def main() -> None:
    """Simulate all devices in every round."""
    devices, rounds = (int(word) for word in sys.argv[1:])

    def server(context: Context) -> ServerAppComponents:
        del context
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_fit_clients=devices,
            min_available_clients=devices,
            initial_parameters=ndarrays_to_parameters([np.zeros(ELEMENTS, np.float32)]),
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))

    def client(context: Context) -> Client:
        del context
        return Adder().to_client()

    run_simulation(ServerApp(server_fn=server), ClientApp(client_fn=client), devices)


if __name__ == "__main__":
    main()
