"""Processes of a Ray cluster as a pool: simulations on more than one machine.

What devices run, the versions that they train from and the files that they keep travel through Ray's object store: once
to each machine, or with the call that needs them. Machines share no folder. A call depends on nothing but what travels
with it, so that Ray may repeat it elsewhere when a machine is lost, and results do not depend on where it ran.
"""

import copy
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Self

from qflare.tensors import CHUNK_BYTES
from qflare_simulation import worker
from qflare_simulation.errors import SimulationError
from qflare_simulation.memory import HomeFolder, Shipment, ShippedHome
from qflare_simulation.worker import Brief, ModelFile, Programs

LOCAL: Final = "local"
"""Address that starts Ray on this machine."""

_STARTED: list[str] = []
"""Id of the programs that this process of a cluster has started; set by the first call of a simulation."""


class RayPool:
    """Runs functions of `worker` in processes of a Ray cluster; a context manager.

    A program that has called `ray.init` keeps its connection, and its runtime environment. Otherwise the pool connects,
    and disconnects at its end.

    Args:
        programs: What the devices run. Functions of files and notebooks are shipped; packages must be installed on
            every machine.
        address: `auto`, host:port, or `local`.
        workers: Most processes that train at once; 0 means all processors of the cluster.

    Raises:
        SimulationError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, programs: Programs, address: str, workers: int) -> None:
        self._ray = _library()
        self._owns_connection = not self._ray.is_initialized()
        if self._owns_connection:
            self._connect(address, workers)
        processors = int(self._ray.cluster_resources().get("CPU", 1)) or 1
        self.size = min(workers or processors, processors)
        assert isinstance(programs.home, HomeFolder)
        self._home = programs.home
        self._run = self._ray.remote(num_cpus=1)(run)
        self._models: dict[str, Any] = {}
        self._last_calls: dict[int, int] = {}
        self._call_count = 0
        self._pending: set[Any] = set()
        try:
            self._programs = _put_programs(self._ray, programs)
        except BaseException:
            self.__exit__()
            raise

    def _connect(self, address: str, workers: int) -> None:
        settings: dict[str, Any] = {"address": address, "log_to_driver": False}
        if address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            settings |= {"include_dashboard": False, "num_cpus": workers or None}
        try:
            self._ray.init(**settings)
        except Exception as error:  # Ray raises the class itself when its start takes too long
            self._ray.shutdown()
            raise SimulationError(f"simulation.ray: no cluster at {address!r}: {error}") from error

    def submit(
        self, function: Callable[..., Any], *arguments: Any, devices: Sequence[int] = ()
    ) -> Callable[[], Any]:
        """Start a function; return what waits for its result and returns it."""
        self._call_count += 1
        self._last_calls.update(dict.fromkeys(devices, self._call_count))
        shipped = [self._shipped(item) for item in arguments]
        # In a list, the reference travels instead of what it refers to, which a process needs once.
        reference = self._run.remote([self._programs], function, shipped, self._home.pack(devices))
        self._pending.add(reference)
        return _Result(self, reference, self._call_count)

    def _shipped(self, argument: Any) -> Any:
        """Return an argument as it travels: a brief, with a version in the object store instead of a file."""
        if not isinstance(argument, Brief) or not isinstance(argument.model, ModelFile):
            return argument
        path = argument.model.path
        if path not in self._models:
            self._models = {name: ref for name, ref in self._models.items() if Path(name).exists()}
            self._models[path] = self._ray.put(Path(path).read_bytes())
        return argument._replace(model=ShippedModel(path, self._models[path]))

    def finish(self, reference: Any, number: int) -> Any:
        """Return the result of a call, and keep what its devices have written.

        A device that was given other work since has dropped what it wrote here.

        Raises:
            SimulationError: The call was lost, again and again.
        """
        errors = self._ray.exceptions
        try:
            result, shipment = self._ray.get(reference)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            raise SimulationError(
                f"Ray lost a process, probably for want of memory: {type(error).__name__}"
            ) from error
        finally:
            self._pending.discard(reference)
        self._home.unpack(
            {
                index: content
                for index, content in shipment.items()
                if self._last_calls[index] == number
            }
        )
        return result

    def __enter__(self) -> Self:
        """Return this pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """Disconnect; work that was not waited for is abandoned."""
        for reference in self._pending:
            with suppress(self._ray.exceptions.RayError, ValueError):
                self._ray.cancel(reference, force=True)
        if self._owns_connection:
            self._ray.shutdown()


class _Result:
    """Waits for the result of a call, once."""

    def __init__(self, pool: RayPool, reference: Any, number: int) -> None:
        self._call = pool, reference, number
        self._found: list[Any] = []

    def __call__(self) -> Any:
        if not self._found:
            pool, reference, number = self._call
            self._found.append(pool.finish(reference, number))
        return self._found[0]


@dataclass(frozen=True)
class ShippedModel:
    """The payload of a version in the object store.

    Attributes:
        name: File that it comes from.
        reference: Of its bytes.
    """

    name: str
    reference: Any = field(compare=False)

    def chunks(self) -> Iterator[bytes]:
        """Yield the payload in chunks."""
        data: bytes = _library().get(self.reference)
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def run(
    programs: Sequence[Any],
    function: Callable[..., Any],
    arguments: Sequence[Any],
    shipment: Shipment,
) -> tuple[Any, Shipment]:
    """Run a function of `worker` in a process of the cluster.

    Args:
        programs: One reference, of what the devices run.
        function: The function.
        arguments: Its arguments.
        shipment: The files of the devices that it works for.

    Returns:
        Its result, and the files as it left them.
    """
    reference = programs[0]
    if [reference.hex()] != _STARTED:
        # Arrays in the object store cannot be written to; those of a process can.
        worker.start(copy.deepcopy(_library().get(reference)))
        _STARTED[:] = [reference.hex()]
    home = ShippedHome(shipment)
    worker.move_to(home)
    return function(*arguments), home.shipment


def _put_programs(ray: Any, programs: Programs) -> Any:
    """Put what the devices run into the object store, with the modules that no package installs."""
    modules = _loose_modules(programs)
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(programs)
    except TypeError as error:
        raise SimulationError(f"simulation.ray: the programs cannot be shipped: {error}") from error
    finally:
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _loose_modules(programs: Programs) -> list[ModuleType]:
    """Return the modules of the programs that are files of their own."""
    parts = [programs.train, programs.evaluate, programs.data, programs.test, programs.held_out]
    parts += programs.columns.values()
    found = {inspect.getmodule(part) or inspect.getmodule(type(part)) for part in parts}
    installed = importlib.metadata.packages_distributions().keys() | sys.stdlib_module_names
    return [
        module
        for module in found
        if module is not None and _top(module.__name__) not in installed | {"qflare_simulation"}
    ]


def _top(name: str) -> str:
    return name.partition(".")[0]


def _library() -> Any:
    try:
        import ray  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise SimulationError("simulation.ray needs Ray: pip install 'qflare[ray]'") from error
    return ray
