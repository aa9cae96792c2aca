"""One device process of the demo: enrolls, trains on its part of the digits, and sends signed updates."""

import argparse
import time
from pathlib import Path

from data import dirichlet_partition, load
from model import Weights, fit, measure

from qflare_client import Client, TrainingTask, enroll, run


def main() -> None:
    """Take part until the training session ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--session", required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    arguments = parser.parse_args()

    everything, _ = load()
    parts = dirichlet_partition(everything.digits, arguments.devices, arguments.alpha, seed=1)
    examples = everything.take(parts[arguments.index])

    def train(arrays: Weights, config: TrainingTask) -> tuple[Weights, int, dict[str, float]]:
        started = time.monotonic()
        trained = fit(
            arrays,
            examples,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=1000 * arguments.index + config.round_number,
            proximal_mu=config.proximal_mu,
        )
        metrics = measure(trained, examples)
        metrics |= {"epochs": config.local_epochs, "training_time_s": time.monotonic() - started}
        return trained, len(examples), metrics

    enroll(arguments.bundle, home=arguments.home, device_type="demo")
    with Client(home=arguments.home) as client:
        run(client, train, training_session_id=arguments.session)


if __name__ == "__main__":
    main()
