"""A round of Flower's `SecAggPlusWorkflow`; runs under an interpreter that has `flwr`.

python flower_secure_job.py DEVICES ELEMENTS DROPPED SHARES THRESHOLD

Prints the seconds of the round, its CPU seconds, and the bytes of its messages to nodes and from them, as they are
serialized. A round of few nodes in the same process goes before it and is not measured. There is no network and no Ray:
nodes are threads of this process, which favors Flower. Nodes that drop out do so after they have shared keys, and their
error comes at once.
"""

import itertools
import logging
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import NDArrays, Scalar, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common import recorddict_compat
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.server import LegacyContext, ServerConfig
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp.grid import Grid
from flwr.supercore.task_identity import TaskIdentity

RUN = 1
FIRST = 4
"""Nodes of the round that is not measured; it has no drop-outs."""
STAGES_BEFORE_DROPOUT = 2


class Adder(NumPyClient):  # type: ignore[misc]  # flwr has no types here
    """Adds a thousandth to every element."""

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Return the trained weights."""
        del config
        return [array + np.float32(0.001) for array in parameters], 100, {}


class Nodes(Grid):  # type: ignore[misc]
    """Nodes in this process that answer each message when it is sent.

    Attributes:
        sent_bytes: Bytes of all messages to nodes.
        received_bytes: Bytes of all answers.
    """

    def __init__(self, count: int, dropped: int) -> None:
        def client(context: Context) -> Client:
            del context
            return Adder().to_client()

        self._app = ClientApp(client_fn=client, mods=[secaggplus_mod])
        self._contexts = {
            node: Context(RUN, node, {}, RecordDict(), {}) for node in range(1, count + 1)
        }
        self._dropped = set(range(1, dropped + 1))
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._stage = itertools.count()
        self.sent_bytes = self.received_bytes = 0

    def set_run(self, run: object) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> object:
        """Not asked for."""
        raise NotImplementedError

    def create_message(self, *arguments: object, **named: object) -> Message:
        """Not asked for."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return self._contexts

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not asked for."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not asked for."""
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the nodes answer the messages of a stage."""
        del timeout
        stage = next(self._stage)
        requests = list(messages)
        answers = list(self._pool.map(lambda message: self._answer(message, stage), requests))
        for sent, answered, _ in answers:
            self.sent_bytes += sent
            self.received_bytes += answered
        return [answer for _, _, answer in answers]

    def _answer(self, message: Message, stage: int) -> tuple[int, int, Message]:
        node = message.metadata.dst_node_id
        message.metadata.__dict__["_run_id"] = RUN
        message.metadata.__dict__["_message_id"] = f"{stage}-{node}"
        sent = message_to_proto(message).SerializeToString()
        request = message_from_proto(MessageProto.FromString(sent))
        if stage >= STAGES_BEFORE_DROPOUT and node in self._dropped:
            return len(sent), 0, Message(Error(code=0, reason="dropped out"), reply_to=request)
        answered = message_to_proto(self._app(request, self._contexts[node])).SerializeToString()
        return (
            len(sent),
            len(answered),
            message_from_proto(MessageProto.FromString(answered)),
        )


def run_round(nodes: Nodes, elements: int, shares: int, threshold: int) -> tuple[float, float]:
    """Run one round of all nodes; return its seconds and its CPU seconds.

    Raises:
        RuntimeError: The mean is wrong.
    """
    devices = len(list(nodes.get_node_ids()))
    strategy = FedAvg(fraction_evaluate=0.0, min_fit_clients=devices, min_available_clients=devices)
    context = LegacyContext(
        Context(RUN, 0, {}, RecordDict(), {}), ServerConfig(num_rounds=1), strategy
    )
    for node in nodes.get_node_ids():
        context.client_manager.register(GridClientProxy(node, nodes, RUN))
    weights = np.zeros(elements, np.float32)
    record = recorddict_compat.parameters_to_arrayrecord(ndarrays_to_parameters([weights]), True)
    context.state.array_records[MAIN_PARAMS_RECORD] = record
    configs = ConfigRecord({Key.CURRENT_ROUND: 1, Key.START_TIME: 0.0})
    context.state.config_records[MAIN_CONFIGS_RECORD] = configs
    workflow = SecAggPlusWorkflow(shares, threshold, max_weight=1000.0)
    before, begun = time.process_time(), time.perf_counter()
    workflow(nodes, context)
    wall_s, cpu_s = time.perf_counter() - begun, time.process_time() - before
    made = recorddict_compat.arrayrecord_to_parameters(
        context.state.array_records[MAIN_PARAMS_RECORD], True
    )
    mean = float(parameters_to_ndarrays(made)[0].mean())
    if not 0.0005 < mean < 0.0015:
        raise RuntimeError(f"the mean is wrong: {mean}")
    return wall_s, cpu_s


def main() -> None:
    """Run one round that fills caches, and one that is measured."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    devices, elements, dropped, shares, threshold = (int(word) for word in sys.argv[1:])
    TaskIdentity.task_id = TaskIdentity.run_id = RUN
    TaskIdentity.node_id = 0
    run_round(Nodes(FIRST, 0), elements, FIRST, FIRST - 1)
    nodes = Nodes(devices, dropped)
    wall_s, cpu_s = run_round(nodes, elements, shares, threshold)
    sys.stdout.write(f"{wall_s} {cpu_s} {nodes.sent_bytes} {nodes.received_bytes}\n")


if __name__ == "__main__":
    main()
