"""Lightning: a training function that fits a `LightningModule`.

    train = training_function(module, loader)
    run(client, train, training_session_id=session_id)

Each task is one ``Trainer.fit`` of the task's number of epochs, which starts with a new optimizer. A module with an
attribute ``learning_rate`` gets the task's before ``configure_optimizers`` is called. The proximal term of FedProx is
added to the gradients. Metrics that the module logs are sent with the update. State is converted by the adapter for
PyTorch. Lightning is imported at the first training; the SDK does not depend on it.
"""

from collections.abc import Callable
from typing import Any

from qflare.tensors import Array
from qflare_client.adapters.pytorch import ProximalTerm, load_arrays, to_arrays
from qflare_client.tasks import TrainingTask

__all__ = ["load_arrays", "to_arrays", "training_function"]

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Options of the `Trainer` unless others are passed: a device writes no files and no progress to the terminal."""


def training_function(
    module: Any, loader: Any, **options: Any
) -> Callable[[dict[str, Array], TrainingTask], tuple[dict[str, Array], int, dict[str, float]]]:
    """Return a training function for `qflare_client.run`.

    Args:
        module: A `LightningModule`. It keeps its device and everything that is not in its state dict.
        loader: A `torch.utils.data.DataLoader`; the example count is the length of its data set.
        options: Arguments of `lightning.Trainer`, such as ``accelerator="gpu"``.
    """

    def train(
        arrays: dict[str, Array], task: TrainingTask
    ) -> tuple[dict[str, Array], int, dict[str, float]]:
        load_arrays(module, arrays)
        if hasattr(module, "learning_rate"):
            module.learning_rate = task.learning_rate
        trainer = _trainer(module, task, options)
        trainer.fit(module, loader)
        return to_arrays(module), len(loader.dataset), _metrics(trainer)

    return train


def _trainer(module: Any, task: TrainingTask, options: dict[str, Any]) -> Any:
    import lightning  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    term = ProximalTerm(module, task.proximal_mu)
    # The hook runs after the backward pass and after gradients of reduced precision are scaled back.
    proximal = lightning.pytorch.callbacks.LambdaCallback(
        on_before_optimizer_step=lambda *_: term.add_gradient()
    )
    callbacks = [*options.get("callbacks", []), proximal]
    return lightning.Trainer(
        **(QUIET | options | {"max_epochs": task.local_epochs, "callbacks": callbacks})
    )


def _metrics(trainer: Any) -> dict[str, float]:
    # A version adds `train_` to the names of metrics of updates.
    logged = trainer.callback_metrics.items()
    return {name.removeprefix("train_"): float(value) for name, value in logged}
