"""Updates of 10 KB that come many in a call, as gateways and simulators send them."""

from collections.abc import Iterator, Sequence

from qflare.v1 import coordinator_service_pb2 as pb
from tests.bench.coordinator import Backend, Coordinator, Laboratory
from tests.bench.devices import Model, ask_task, signed, statement_of
from tests.bench.figures import Figure, milliseconds
from tests.bench.load import COORDINATOR, Call, closed_loop
from tests.bench.population import BenchDevice
from tests.bench.small_operations import SMALL, start_unbounded, warm_up

CALL_UPDATES = 128
IN_FLIGHT = 4
RATE_GOAL = 2000.0


def relayed_updates(lab: Laboratory) -> Iterator[Figure]:
    """Durable signed updates of 10 KB per second, 128 in a call, four calls at once: first and later ones."""
    count = CALL_UPDATES * lab.times(64, 16)
    for backend in Backend:
        with lab.coordinator(backend) as coordinator:
            devices = coordinator.population.devices(count)
            warm_up(coordinator, devices[:CALL_UPDATES])
            yield _measured(f"{backend}, first ones since its start", coordinator, devices)
            yield _measured(f"{backend}, later ones", coordinator, devices)


def _measured(what: str, coordinator: Coordinator, devices: Sequence[BenchDevice]) -> Figure:
    """Measure one update of each device, in a training session of their own."""
    calls = relayed(coordinator, start_unbounded(coordinator, SMALL), devices, SMALL)
    coordinator.process.settle()
    before = coordinator.process.cpu_s()
    done = closed_loop(coordinator.address, calls, IN_FLIGHT)
    cpu_s = (coordinator.process.cpu_s() - before) / len(devices)
    rate = done.rate * CALL_UPDATES
    return Figure(
        f"update of 10 KB, {CALL_UPDATES} in a call, {IN_FLIGHT} calls at once, {what}",
        f"{rate:.0f} updates/s; {milliseconds(cpu_s)} of CPU each",
        goal=f">= {RATE_GOAL:.0f}/s",
        reached=rate >= RATE_GOAL,
    )


def relayed(
    coordinator: Coordinator, session_id: str, devices: Sequence[BenchDevice], model: Model
) -> list[Call]:
    """Return the calls with a signed update of each device."""
    task = ask_task(coordinator, devices[0], session_id)
    realm = coordinator.config.realm
    updates = [
        pb.SmallUpdate(
            header=pb.UpdateHeader(
                statement=signed(statement_of(realm, task, device, model), device),
                chunk_digests=b"".join(model.hashed.leaf_hashes),
            ),
            payload=model.payload,
        )
        for device in devices
    ]
    calls = []
    for start in range(0, len(updates), CALL_UPDATES):
        request = pb.SubmitUpdatesRequest(updates=updates[start : start + CALL_UPDATES])
        token = devices[start].token
        calls.append(Call(f"{COORDINATOR}SubmitUpdates", (request.SerializeToString(),), token))
    return calls
