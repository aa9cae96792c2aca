"""Demo of secure aggregation: ten device processes train one model, and the coordinator reads no update of a device.

Runs the coordinator, a helper, and the devices. One device dies before it masks its update, another one after it has
sealed the seed of its mask; the rounds go on without them. Prints what each party has seen, and verifies the lineage of
the result offline, with nothing but the ids of the root keys.
"""

import argparse
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from data import Examples, dirichlet_partition
from demo import BIN, Demo, end_processes, make_folder, program_output
from model import Weights, fit, initial_weights, measure
from numpy.typing import NDArray

from qflare.command_line import INTERRUPTED
from qflare.v1 import security_pb2, verification_pb2

DEATHS = ("before-sealing", "after-sealing")
"""How the last two devices die, in the first round."""

SHOWN = 6
"""Elements of a vector that are printed."""


class SecureDemo(Demo):
    """One run of the demo in a separate folder."""

    helper_id = ""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.bundles = self.folder / "helper-bundles"
        self.policy = self.folder / "policy.toml"
        self.environ |= {"QFLARE_HELPER_DIR": str(self.bundles)}

    def quorum(self) -> int:
        """Return how many updates close a round: those of the devices that live."""
        return int(self.arguments.devices) - len(DEATHS)

    def settings(self) -> dict[str, Any]:
        """Return settings with secure aggregation: sums of no fewer updates than there are living devices."""
        return {
            "rounds": {"deadline": "60s"},
            "safeguards": {"maxExampleCount": str(len(self.training))},
            "transfer": {"payloadRetention": "PAYLOAD_RETENTION_ALL"},
            "secureAggregation": {
                "mode": "SECURE_AGGREGATION_MODE_HELPER",
                "clip": 20.0,
                "minCohort": self.quorum(),
                "helpers": [self.helper_id],
                "metrics": [{"name": "loss", "bound": 20.0}, {"name": "accuracy", "bound": 1.0}],
            },
        }

    def helper(self, *words: str) -> str:
        """Run a `qflare-helper` command and return its output."""
        return program_output([*self.helper_command(), *words], self.environ)

    def helper_command(self) -> list[str]:
        """Return the beginning of a `qflare-helper` command."""
        return [sys.executable, "-m", "qflare_helper", "--home", str(self.folder / "helper")]

    @contextmanager
    def helper_process(self) -> Iterator[None]:
        """Set up and run the helper; give its bundle to the coordinator, and its id to the devices' policy."""
        roots = self.folder / "roots.json"
        self.server("bundle", "--address", "localhost:1", "--output", str(roots))
        port = _free_port()
        self.bundles.mkdir()
        made = self.helper(
            *("init", "--bootstrap", str(roots), "--address", f"127.0.0.1:{port}"),
            *("--min-cohort", str(self.quorum()), "--output", str(self.bundles / "helper.json")),
        )
        self.helper_id = made.split()[1]
        self.policy.write_text(
            f'min_cohort = {self.quorum()}\nhelper_key_ids = ["{self.helper_id}"]\n'
            'metrics = ["loss", "accuracy"]\n'
        )
        with (
            (self.folder / "helper.log").open("w") as log,
            subprocess.Popen(
                [*self.helper_command(), "serve", "--listen", f"127.0.0.1:{port}"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                print(f"  {process.stdout.readline().rstrip()}")
                if not process.stdout.readline().startswith("serving on "):
                    raise RuntimeError(f"the helper did not start; see {log.name}")
                yield
            finally:
                process.terminate()

    @contextmanager
    def devices(self, session_id: str, address: str) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Start the devices that die and wait until they have, then start the others."""
        bundles = self.issue_bundles(address)
        start = partial(self.start_device, session_id)
        processes = []
        try:
            for place, death in enumerate(DEATHS):
                index = self.quorum() + place
                doomed = start(index, bundles[index], "--policy", str(self.policy), "--dies", death)
                processes.append(doomed)
            for process, death in zip(processes, DEATHS, strict=True):
                if process.wait(60) != -signal.SIGKILL:
                    raise RuntimeError(f"a device did not die {death}; see its log")
            processes.extend(
                start(index, bundles[index], "--policy", str(self.policy))
                for index in range(self.quorum())
            )
            yield processes
        finally:
            end_processes(processes)

    def unmasked(self) -> list[dict[str, float]]:
        """Compute the same rounds without masks: the weighted mean of what the same devices train."""
        count, alpha = self.arguments.devices, self.arguments.alpha
        parts = dirichlet_partition(self.training.digits, count, alpha, seed=1)
        data = [self.training.take(part) for part in parts[: self.quorum()]]
        weights = initial_weights()
        history = [measure(weights, self.test)]
        for number in range(1, self.arguments.rounds + 1):
            weights = self._mean_of_round(weights, data, number)
            history.append(measure(weights, self.test))
        return history

    def _mean_of_round(self, weights: Weights, data: Sequence[Examples], number: int) -> Weights:
        trained = [
            fit(
                weights,
                examples,
                epochs=self.arguments.epochs,
                batch_size=16,
                learning_rate=0.2,
                seed=1000 * index + number,
            )
            for index, examples in enumerate(data)
        ]
        sizes = [len(examples) for examples in data]
        return {
            name: np.average([each[name] for each in trained], 0, sizes).astype(np.float32)
            for name in weights
        }

    def run(self) -> int:
        """Run the demo; return 0 if masks cost at most one test digit of accuracy."""
        make_folder(self.folder)
        print(
            f"QFLARE demo of secure aggregation in {self.folder}: {self.arguments.devices} devices,",
            end=" ",
        )
        print(f"{self.arguments.rounds} rounds")
        with self.coordinator() as address, self.helper_process():
            session_id = self.create_session()
            with self.devices(session_id, address):
                federated = self.watch(address, session_id)
            bundle = self.folder / "bundle.bin"
            self._export_bundle(address, session_id, bundle)
        self._show_parties(bundle)
        print(f"\nVerification\n  {self.server('model', 'verify', session_id)}")
        for line in self._verify_offline(bundle).splitlines():
            print(f"  offline: {line}")
        print(f"  helper: {self.helper('audit', 'verify').splitlines()[0]}")
        unmasked = self.unmasked()
        print("\nversion  secure  unmasked")
        for number, (ours, theirs) in enumerate(zip(federated, unmasked, strict=True)):
            print(f"{number:>7}  {ours['accuracy']:>6.1%}  {theirs['accuracy']:>8.1%}")
        gap = abs(unmasked[-1]["accuracy"] - federated[-1]["accuracy"])
        return 0 if round(gap * len(self.test)) <= 1 else 1

    def _export_bundle(self, address: str, session_id: str, path: Path) -> None:
        token = str(self.data_dir / "admin.token")
        command = [str(BIN / "qflare-admin"), "--address", address, "--token-file", token]
        program_output([*command, "model", "evidence", session_id, str(path)], self.environ)

    def _verify_offline(self, bundle: Path) -> str:
        roots = str(self.folder / "roots.json")
        command = [str(BIN / "qflare-client"), "verify", str(bundle), "--bundle", roots]
        return program_output(command, self.environ)

    def _show_parties(self, path: Path) -> None:
        bundle = verification_pb2.VerificationBundle.FromString(path.read_bytes())
        statement = security_pb2.ModelStatement.FromString(bundle.statements[-1].payload)
        print("\nWhat each party saw of the last round")
        print(
            f"  devices         {len(bundle.updates)} of {self.arguments.devices} sent an update;",
            end=" ",
        )
        print(f"device {self.quorum()} died {DEATHS[0]}, device {self.quorum() + 1} {DEATHS[1]}")
        print("  coordinator     of a single device:")
        for update in bundle.updates[:2]:
            sent = security_pb2.UpdateStatement.FromString(update.statement.payload)
            shown = " ".join(f"{value:>10}" for value in self._masked(sent.update_id)[:SHOWN])
            print(f"                    {shown} ...")
        print(f"                  of the sum: {statement.example_count} examples,", end=" ")
        print(", ".join(f"{name} {value:.3f}" for name, value in sorted(statement.metrics.items())))
        answers, members = self._ledger()
        size = sum(file.stat().st_size for file in (self.folder / "helper").rglob("*"))
        print(
            f"  helper          {answers} sets of together {members} seeds and names of devices;",
            end=" ",
        )
        print(f"no update, no sum ({size // 1024} KiB)")

    def _masked(self, update_id: str) -> NDArray[np.uint32]:
        """Return a masked update as the coordinator stores it."""
        found = _query(
            self.data_dir / "qflare.db",
            "SELECT data FROM payloads JOIN model_updates ON payloads.id = model_updates.payload_id"
            " WHERE model_updates.id = ?",
            update_id,
        )
        return np.frombuffer(found[0], "<u4")

    def _ledger(self) -> tuple[int, int]:
        """Return the numbers of answers and of updates in the helper's ledger."""
        found = _query(
            self.folder / "helper" / "ledger.db",
            "SELECT (SELECT count(*) FROM answers), (SELECT count(*) FROM members)",
        )
        return found[0], found[1]


def _free_port() -> int:
    """Return a port of the loopback address that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _query(path: Path, query: str, *values: str) -> tuple[Any, ...]:
    """Return the first row of a query on an SQLite database."""
    with closing(sqlite3.connect(path)) as connection:
        row: tuple[Any, ...] = connection.execute(query, values).fetchone()
        return row


def main() -> int:
    """Read the arguments and run the demo; Ctrl-C ends it, its coordinator and its devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-secure-output"))
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--listen", default="127.0.0.1:0")
    demo = SecureDemo(parser.parse_args())
    try:
        return demo.run()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
