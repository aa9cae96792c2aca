"""One device process of the demo: enrolls, trains on its part of the digits, and sends signed updates."""

import argparse
import os
import signal
import time
from pathlib import Path

from data import dirichlet_partition, load
from model import Weights, fit, measure

from qflare_client import Client, SecureAggregation, TrainingTask, enroll, run


def main() -> None:
    """Take part until the training session ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--session", required=True)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--policy", type=Path, help="policy for secure aggregation")
    parser.add_argument("--dies", choices=["before-sealing", "after-sealing"])
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
        if arguments.dies == "before-sealing":
            die()
        metrics = measure(trained, examples)
        metrics |= {"epochs": config.local_epochs, "training_time_s": time.monotonic() - started}
        return trained, len(examples), metrics

    enroll(arguments.bundle, home=arguments.home, device_type="demo")
    policy = None if arguments.policy is None else SecureAggregation.from_file(arguments.policy)
    with Client(home=arguments.home, secure_aggregation=policy) as client:
        if arguments.dies == "after-sealing":
            task = client.get_task(arguments.session)
            base = client.download_base(task)
            client.sign_update(task, base, *train(base.arrays, task.config))
            die()
        run(client, train, training_session_id=arguments.session)


def die() -> None:
    """End at once, as a device without power does."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
