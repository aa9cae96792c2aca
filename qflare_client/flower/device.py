"""A Flower ClientApp as training and evaluation functions of a QFLARE device."""

import hashlib
import json
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

from qflare.tensors import Array
from qflare_client import arguments
from qflare_client.errors import InvalidArgumentError
from qflare_client.flower.library import client_app_class, flower
from qflare_client.flower.messages import Dialect
from qflare_client.flower.project import (
    FlowerProject,
    UserConfig,
    overridden,
    read_project,
    user_config,
)
from qflare_client.flower.state import AppState
from qflare_client.keystore.passphrase import secret_coding
from qflare_client.tasks import TrainingTask

_FOLDER: Final = "flower"
_DEFAULT: Final = ("train.default", "evaluate.default")


class FlowerDevice:
    """A Flower ClientApp that trains and evaluates for a device; made by `flower_device`.

    `train` and `evaluate` are the functions of `qflare_client.run` and, with the node configuration of each device as
    its data, of `qflare_simulation.simulate`. It can be sent to another process; an app that was given as a folder is
    then imported there.
    """

    def __init__(
        self,
        app: Any,
        home: Path,
        passphrase: str | None,
        run_config: Mapping[str, Any],
        node_config: Mapping[str, Any],
        weight_key: str,
    ) -> None:
        self._source = app
        self._home = home
        self._coding = secret_coding(passphrase)
        self._run_config = _run_config(app, run_config)
        self._node_config = user_config("node_config", node_config)
        self._weight_key = weight_key
        self._loaded: tuple[Any, Dialect] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs; the app itself is imported there."""
        return {**self.__dict__, "_loaded": None}

    def load(self) -> None:
        """Import the app, if that has not been done.

        Raises:
            Exception: Whatever importing the app raises.
        """
        self._app()

    @property
    def evaluates(self) -> bool:
        """Whether the app can evaluate; of a `client_fn` that is not known before it is called, and then True."""
        app, dialect = self._app()
        return dialect.is_old or "evaluate.default" in app._registered_funcs  # noqa: SLF001 - flwr has no public way

    @property
    def ignored(self) -> list[str]:
        """One sentence for each part of the app that is not carried over."""
        app, dialect = self._app()
        named = list(self._source.ignored) if isinstance(self._source, FlowerProject) else []
        functions = () if dialect.is_old else app._registered_funcs  # noqa: SLF001
        return named + [
            f"the function {name!r} of the ClientApp is never called: sessions train and evaluate only"
            for name in functions
            if name not in _DEFAULT
        ]

    def train(
        self, arrays: Mapping[str, Array], config: TrainingTask, data: Any = None
    ) -> tuple[dict[str, Array], int, dict[str, float]]:
        """Answer a training task.

        Args:
            arrays: The version's arrays.
            config: The task's settings.
            data: Node configuration of a virtual device, beside that of this object; None for a real device.

        Raises:
            TaskFailedError: The app answered with an error.
            TrainingFunctionError: The session cannot carry what it answered.
            KeyStoreError: `Context.state` cannot be read or written.
            Exception: Whatever the app raises.
        """
        reply, dialect = self._ask("train", arrays, config, data)
        return dialect.trained(reply, arrays)

    def evaluate(
        self, arrays: Mapping[str, Array], config: TrainingTask, data: Any = None
    ) -> tuple[int, dict[str, float]]:
        """Answer an evaluation task; arguments and errors as of `train`."""
        reply, dialect = self._ask("evaluate", arrays, config, data)
        return dialect.evaluated(reply)

    def _ask(
        self, kind: str, arrays: Mapping[str, Array], task: TrainingTask, data: Any
    ) -> tuple[Any, Dialect]:
        app, dialect = self._app()
        node_config = {**self._node_config, **user_config("data", data or {})}
        node = _digest(json.dumps(node_config, sort_keys=True))
        folder = self._home / _FOLDER
        state = AppState(folder if data is None else folder / f"{node:016x}", self._coding)
        run_id = _digest(task.training_session_id)
        context = flower().Context(
            run_id=run_id,
            node_id=node,
            node_config=node_config,
            state=state.read(task.training_session_id),
            run_config=dict(self._run_config),
        )
        reply = app(dialect.message(kind, arrays, task, run_id, node), context)
        state.write(task.training_session_id, context.state)
        return reply, dialect

    def _app(self) -> tuple[Any, Dialect]:
        """Return the ClientApp, imported at the first call."""
        if self._loaded is None:
            is_project = isinstance(self._source, FlowerProject)
            app = self._source.load() if is_project else self._source
            is_old = app._call is not None  # noqa: SLF001 - flwr has no public way to ask
            self._loaded = app, Dialect(is_old, self._weight_key)
        return self._loaded


def flower_device(
    app: Any,
    *,
    home: Path | str | None = None,
    passphrase: str | None = None,
    run_config: Mapping[str, Any] | None = None,
    node_config: Mapping[str, Any] | None = None,
    weight_key: str = "num-examples",
) -> FlowerDevice:
    """Return a Flower ClientApp as the functions of a device.

    Args:
        app: Folder of the app, with its pyproject.toml, or a `flwr.clientapp.ClientApp`.
        home: Key store of the device; `Context.state` is kept in a folder inside it. None keeps it as long as this
            object lives.
        passphrase: Passphrase of the key store; None if it has none.
        run_config: `Context.run_config`: replaces values of the app's pyproject.toml; for a ClientApp, all of it.
        node_config: `Context.node_config`, such as `{"partition-id": 0, "num-partitions": 10}`.
        weight_key: Metric that is the example count, in the message API.

    Raises:
        MissingFlowerError: flwr is not installed.
        InvalidArgumentError: An argument cannot be used, or the folder holds no app with a ClientApp.
        OSError: The folder cannot be read.
        Exception: Whatever importing the app raises.
    """
    source = read_project(Path(app)) if isinstance(app, str | Path) else app
    if not isinstance(source, FlowerProject | client_app_class()):
        raise InvalidArgumentError(f"app: got {type(app).__name__}, want a folder or a ClientApp")
    is_temporary = home is None
    folder = (
        Path(mkdtemp(prefix="qflare-flower-")) if home is None else arguments.path("home", home)
    )
    device = FlowerDevice(
        source,
        folder,
        passphrase,
        run_config or {},
        node_config or {},
        arguments.text("weight_key", weight_key),
    )
    if is_temporary:
        weakref.finalize(device, shutil.rmtree, folder, ignore_errors=True)
    device.load()
    return device


def _run_config(app: Any, given: Mapping[str, Any]) -> UserConfig:
    if isinstance(app, FlowerProject):
        return overridden(app.run_config, given)
    return user_config("run_config", given)


def _digest(text: str) -> int:
    """Return a positive number of 63 bits, as Flower numbers runs and nodes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
