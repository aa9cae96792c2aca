"""Demo: ten device processes train one model on handwritten digits that never leave them.

Starts a coordinator on SQLite in an empty folder, enrolls the devices and runs the rounds. Compares every version with
the same model trained centrally on all data, and verifies the lineage of the result. Keeps the database, the model and
a picture of the learning curves.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from data import load
from matplotlib import pyplot as plt
from model import Weights, fit, initial_weights, measure
from plots import BLUE, ORANGE, name_ends, percent, save

from qflare.command_line import INTERRUPTED
from qflare.tensors import Manifest, assemble, chunks
from qflare.tensors.safetensors_files import export_safetensors
from qflare.v1 import admin_service_pb2, admin_service_pb2_grpc

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
TOOLS = HERE.parents[1] / ".tools"
LATER, PAGES = "127.0.0.1:50051", "127.0.0.1:8080"
TIMEOUT_S = 300
ALLOWED_GAP = 0.02
LOG = "coordinator.log"
SETTINGS = {"rounds": {"deadline": "60s"}, "transfer": {"sealed": True}}
"""Settings of the training session. Updates and versions are encrypted end to end and at rest."""


class Demo:
    """One run of the demo in a separate folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.output
        self.data_dir = self.folder / "coordinator"
        self.environ = dict(os.environ)
        self.training, self.test = load()

    def server(self, *words: str) -> str:
        """Run a `qflare-server` command and return its output."""
        command = [str(BIN / "qflare-server"), "--data-dir", str(self.data_dir), *words]
        return program_output(command, self.environ)

    @contextmanager
    def coordinator(self) -> Iterator[str]:
        """Run the coordinator; yield its address."""
        log = (self.folder / LOG).open("w")
        command = [str(BIN / "qflare-server"), "--data-dir", str(self.data_dir)]
        process = subprocess.Popen(
            [*command, "serve", "--listen", self.arguments.listen],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=self.environ,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(f"  {line.rstrip()}")
                if line.startswith("serving on "):
                    break
            else:
                raise RuntimeError(f"the coordinator did not start; see {log.name}")
            yield line.removeprefix("serving on ").strip()
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()
            log.close()

    def settings(self) -> dict[str, Any]:
        """Return the settings of the training session but for the training on devices."""
        return SETTINGS

    def quorum(self) -> int:
        """Return how many updates close a round."""
        return int(self.arguments.devices)

    def initial_model(self) -> Path:
        """Write the initial weights to a .safetensors file."""
        weights = initial_weights()
        manifest = Manifest.from_arrays(weights)
        path = self.folder / "initial.safetensors"
        export_safetensors(path, manifest, chunks(weights, manifest), {})
        return path

    def create_session(self) -> str:
        """Create and start the training session; return its id."""
        config = self.folder / "config.json"
        settings = {"localEpochs": self.arguments.epochs, "batchSize": 16, "learningRate": 0.2}
        config.write_text(json.dumps(self.settings() | {"deviceTraining": settings}))
        return self.server(
            *("session", "create", "--name", "digits", "--model-type", "mlp"),
            *("--rounds", str(self.arguments.rounds), "--quorum", str(self.quorum())),
            *("--config", str(config), "--model", str(self.initial_model()), "--start"),
        )

    def issue_bundles(self, address: str) -> list[Path]:
        """Issue a bootstrap bundle for each device."""
        folder = self.folder / "bundles"
        self.server(
            *("token", "issue", "--count", str(self.arguments.devices), "--label", "demo"),
            *("--bundles", str(folder), "--address", address),
        )
        return sorted(folder.glob("*.json"))

    def start_device(
        self, session_id: str, index: int, bundle: Path, *words: str
    ) -> subprocess.Popen[bytes]:
        """Start a device process."""
        # One arithmetic thread per device, since ten devices share this machine.
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "device.py"), "--bundle", str(bundle)]
        command += ["--home", str(self.folder / f"device-{index}"), "--session", session_id]
        command += ["--index", str(index), "--devices", str(self.arguments.devices)]
        command += ["--alpha", str(self.arguments.alpha), *words]
        with (self.folder / f"device-{index}.log").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environ)

    @contextmanager
    def devices(self, session_id: str, address: str) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Issue a bundle for each device and start the device processes."""
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for index, bundle in enumerate(self.issue_bundles(address)):
                processes.append(self.start_device(session_id, index, bundle))
            yield processes
        finally:
            end_processes(processes)

    def watch(self, address: str, session_id: str) -> list[dict[str, float]]:
        """Follow the rounds; return accuracy and loss of every version on the test digits."""
        token = (self.data_dir / "admin.token").read_text().strip()
        history: list[dict[str, float]] = []
        started = time.monotonic()
        with grpc.insecure_channel(address) as channel:
            stub = admin_service_pb2_grpc.AdminServiceStub(channel)
            metadata = (("authorization", f"Bearer {token}"),)
            while len(history) <= self.arguments.rounds:
                if time.monotonic() - started > TIMEOUT_S:
                    raise TimeoutError("the rounds took too long; see the logs in the folder")
                request = admin_service_pb2.DownloadGlobalModelRequest(
                    training_session_id=session_id, version=len(history)
                )
                try:
                    weights = _download(stub, request, metadata)
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
                    time.sleep(0.05)
                    continue
                history.append(measure(weights, self.test))
                _show(history, self.arguments.rounds, time.monotonic() - started)
        return history

    def central(self) -> list[dict[str, float]]:
        """Train the same model centrally on all data, for the same number of epochs."""
        weights: Weights = initial_weights()
        history = [measure(weights, self.test)]
        for number in range(self.arguments.rounds):
            weights = fit(
                weights,
                self.training,
                epochs=self.arguments.epochs,
                batch_size=16,
                learning_rate=0.2,
                seed=number,
            )
            history.append(measure(weights, self.test))
        return history

    def run(self) -> int:
        """Run the demo; return 0 if the federated accuracy is within two points of the central one."""
        make_folder(self.folder)
        print(f"QFLARE demo in {self.folder}: {self.arguments.devices} devices,", end=" ")
        print(f"{self.arguments.rounds} rounds, Dirichlet({self.arguments.alpha:g}) split")
        with self.coordinator() as address:
            session_id = self.create_session()
            with self.devices(session_id, address):
                federated = self.watch(address, session_id)
            model = self.folder / "digits.safetensors"
            print(self.server("model", "export", session_id, str(model)))
            print(self.server("model", "verify", session_id))
            print(self.server("audit", "verify"))
        central = self.central()
        _table(federated, central)
        _plot(self.folder / "accuracy.png", federated, central)
        print(f"curves: {self.folder / 'accuracy.png'}   model: {model}")
        self._explain(session_id)
        gap = central[-1]["accuracy"] - federated[-1]["accuracy"]
        print(f"federated {federated[-1]['accuracy']:.1%}, central {central[-1]['accuracy']:.1%}")
        return 0 if gap <= ALLOWED_GAP else 1

    def _explain(self, session_id: str) -> None:
        """Print commands for inspecting the resulting database with the installed programs."""
        token = self.data_dir / "admin.token"
        admin = f"qflare-admin --address {LATER} --token-file {token}"
        print("\nRestart the coordinator on this database:\n")
        print(f"  . {BIN / 'activate'}")
        print(
            f"  qflare-server --data-dir {self.data_dir} serve --listen {LATER} --dashboard {PAGES} &\n"
        )
        print(f"Dashboard: open http://{PAGES}/ and log in with the token in {token}\n")
        print("Command line:\n")
        for command in ("session show", "model list", "metrics show"):
            print(f"  {admin} {command} {session_id}")
        print(f"  {admin} device list\n  {admin} audit list\n")
        grpcurl = shutil.which("grpcurl") or shutil.which("grpcurl", path=TOOLS)
        if grpcurl is not None:
            print(f"grpcurl:\n\n  export QFLARE_TOKEN=$(cat {token})")
            program = "grpcurl" if shutil.which("grpcurl") else os.path.relpath(grpcurl)
            call = (
                f"{program} -plaintext -expand-headers -H 'authorization: Bearer ${{QFLARE_TOKEN}}'"
            )
            print(f"  {call} {LATER} qflare.v1.AdminService/ListTrainingSessions\n")


def program_output(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Run a program to its end and return its output."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    return done.stdout.strip()


def end_processes(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes; those that have ended are left alone."""
    for process in processes:
        process.terminate()
        process.wait(30)


def _download(
    stub: admin_service_pb2_grpc.AdminServiceStub,
    request: admin_service_pb2.DownloadGlobalModelRequest,
    metadata: tuple[tuple[str, str], ...],
) -> Weights:
    messages = list(stub.DownloadGlobalModel(request, metadata=metadata, timeout=30))
    manifest = Manifest.from_proto(messages[0].header.global_model.manifest)
    return assemble(manifest, [message.chunk.data for message in messages])


def make_folder(folder: Path) -> None:
    """Make an empty folder, in place of an earlier demo's if there is one; exit if anything else is there."""
    if (folder / LOG).exists():
        shutil.rmtree(folder)
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        sys.exit(f"{folder}: holds something else than an earlier demo; choose a new --output")
    folder.mkdir(parents=True, exist_ok=True)


def _show(history: list[dict[str, float]], rounds: int, seconds: float) -> None:
    latest, done = history[-1], len(history) - 1
    bar = "#" * (30 * done // rounds)
    print(
        f"  [{bar:.<30}] version {done:>3}/{rounds}  accuracy {latest['accuracy']:6.1%}"
        f"  loss {latest['loss']:.3f}  {seconds:5.1f} s",
        flush=True,
    )


def _table(federated: list[dict[str, float]], central: list[dict[str, float]]) -> None:
    print("\nversion  federated  central")
    for number, (ours, theirs) in enumerate(zip(federated, central, strict=True)):
        print(f"{number:>7}  {ours['accuracy']:>9.1%}  {theirs['accuracy']:>7.1%}")
    print()


def _plot(path: Path, federated: list[dict[str, float]], central: list[dict[str, float]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    versions = range(len(federated))
    for axis, metric, distance in zip(axes, ("accuracy", "loss"), (0.07, 0.16), strict=True):
        ends = []
        for name, history, color in (("federated", federated, BLUE), ("central", central, ORANGE)):
            values = [entry[metric] for entry in history]
            axis.plot(versions, values, color=color)
            ends.append((versions[-1], values[-1], name, color))
        name_ends(axis, ends, distance)
        axis.set(title=metric, xlabel="version", ylim=(0, None), xlim=(0, versions[-1]))
        axis.set_xticks(range(0, len(federated), 5))
    axes[0].set_ylim(0, 1)
    axes[0].yaxis.set_major_formatter(lambda value, _: percent(value))
    found = [f"{history[-1]['accuracy']:.1%}" for history in (federated, central)]
    figure.suptitle(
        f"On held-out scans, federated training ends at {found[0]}, central training at {found[1]}",
        x=0.01,
        ha="left",
    )
    save(figure, path)


def main() -> int:
    """Read the arguments and run the demo; Ctrl-C ends it, its coordinator and its devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--listen", default="127.0.0.1:0")
    demo = Demo(parser.parse_args())
    try:
        return demo.run()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
