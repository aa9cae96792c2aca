"""Flower's own run of an app, in the environment of flwr: its FedAvg, its messages, its ClientApp, without Ray.

python own_run.py APP COUNT ROUNDS MODEL.npz FINAL.npz
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flower_test_seeds import seed  # type: ignore[import-not-found] # beside the data
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from qflare_client.flower.project import read_project


class InProcess(Grid):  # type: ignore[misc] # flwr is not installed here
    """Calls a ClientApp for each message, with a context of each node that lasts."""

    def __init__(self, app: Any, run_config: dict[str, Any], count: int) -> None:
        self._app = app
        self._contexts = [
            Context(
                run_id=1,
                node_id=node + 1,
                node_config={"partition-id": node, "num-partitions": count},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for node in range(count)
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        del timeout
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id - 1
        seed(node, int(message.content["config"]["server-round"]))
        reply = self._app(message, self._contexts[node])
        reply.metadata.__dict__["_message_id"] = f"{node}"
        return reply

    def get_node_ids(self) -> list[int]:
        return [context.node_id for context in self._contexts]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        del ttl
        metadata = Metadata(1, "", 0, dst_node_id, "", group_id, time.time(), 3600.0, message_type)
        return Message(content=content, metadata=metadata)

    def set_run(self, run_id: int) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise NotImplementedError


def main() -> None:
    folder, count, rounds, model, final = sys.argv[1:]
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    project = read_project(Path(folder))
    with np.load(model) as stored:
        is_numbered = all(name.isdecimal() for name in stored)
        names = sorted(stored, key=int) if is_numbered else list(stored)
        first = ArrayRecord({name: Array(stored[name]) for name in names})
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    grid = InProcess(project.load(), dict(project.run_config), int(count))
    sent = {
        key: value for key, value in project.run_config.items() if key == "lr"
    }  # as the ServerApps do
    result = strategy.start(
        grid=grid, initial_arrays=first, num_rounds=int(rounds), train_config=ConfigRecord(sent)
    )
    np.savez(final, **{name: array.numpy() for name, array in result.arrays.items()})


main()
