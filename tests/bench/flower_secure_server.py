"""The ServerApp of `flower_deployed`; runs under an interpreter that has `flwr`.

Writes the seconds of the round and the CPU seconds of the machine into the file that its configuration names.
"""

import os
import time
from pathlib import Path

import numpy as np
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import ServerApp
from flwr.serverapp.grid import Grid

LOOK_S = 0.5
TICKS = os.sysconf("SC_CLK_TCK")


class Timed:
    """A workflow for the rounds of training that writes down what a round takes."""

    def __init__(self, workflow: SecAggPlusWorkflow, result: Path) -> None:
        self._workflow = workflow
        self._result = result

    def __call__(self, grid: Grid, context: Context) -> None:
        """Run one round."""
        before, begun = machine_cpu_s(), time.perf_counter()
        self._workflow(grid, context)
        wall_s, cpu_s = time.perf_counter() - begun, machine_cpu_s() - before
        record = context.state.array_records[MAIN_PARAMS_RECORD]
        made = recorddict_compat.arrayrecord_to_parameters(record, True)
        mean = float(parameters_to_ndarrays(made)[0].mean())
        if not 0.0005 < mean < 0.0015:
            raise RuntimeError(f"the mean is wrong: {mean}")
        self._result.write_text(f"{wall_s} {cpu_s}\n")


def machine_cpu_s() -> float:
    """Return the CPU seconds of all processes since the machine started: user, nice, system and interrupts."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:7])) / TICKS


app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Wait for all nodes and run one round."""
    config = context.run_config
    devices = int(config["devices"])
    while len(list(grid.get_node_ids())) < devices:
        time.sleep(LOOK_S)
    weights = np.zeros(int(config["elements"]), np.float32)
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=devices,
        min_available_clients=devices,
        initial_parameters=ndarrays_to_parameters([weights]),
    )
    workflow = SecAggPlusWorkflow(
        int(config["shares"]), int(config["threshold"]), max_weight=1000.0
    )
    timed = Timed(workflow, Path(str(config["result"])))
    DefaultWorkflow(fit_workflow=timed)(
        grid, LegacyContext(context, ServerConfig(num_rounds=1), strategy)
    )
