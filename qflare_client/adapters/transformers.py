"""Hugging Face Trainer with PEFT: only the adapter of a `PeftModel`, such as LoRA, is shared.

    train = training_function(model, make_trainer)
    run(client, train, training_session_id=session_id)

The base model is neither sent nor received: every device loads the same one itself. What is shared is the state dict
of the adapter: its matrices, and the modules that it saves as a whole, such as the head of a classifier. State is
converted by the adapter for PyTorch. PEFT and Transformers are imported at the first call; the SDK does not depend on
them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qflare.tensors import Array
from qflare_client.adapters.pytorch import ProximalTerm, to_array, to_tensor
from qflare_client.tasks import TrainingTask


def to_arrays(model: Any, adapter: str = "default") -> dict[str, Array]:
    """Copy the state of an adapter of a `peft.PeftModel` into arrays, in the order of its state dict.

    Embedding layers are included only if the adapter trains them.
    """
    return {name: to_array(tensor) for name, tensor in _adapter_state(model, adapter).items()}


def load_arrays(model: Any, arrays: Mapping[str, Array], adapter: str = "default") -> None:
    """Copy arrays into an adapter of a `peft.PeftModel`, onto the devices of its tensors.

    Raises:
        ValueError: Names or shapes differ from the adapter's; the model is unchanged.
    """
    import peft  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    state = _adapter_state(model, adapter)
    if state.keys() != arrays.keys():
        raise ValueError(f"the adapter lacks or has in addition: {sorted(state.keys() ^ arrays)}")
    for name, tensor in state.items():
        if arrays[name].shape != tuple(tensor.shape):
            raise ValueError(f"{name}: got shape {arrays[name].shape}, want {tuple(tensor.shape)}")
    tensors = {name: to_tensor(array) for name, array in arrays.items()}
    peft.set_peft_model_state_dict(model, tensors, adapter_name=adapter)


def training_function(
    model: Any,
    make_trainer: Callable[[Any, TrainingTask], Any],
    adapter: str = "default",
) -> Callable[[dict[str, Array], TrainingTask], tuple[dict[str, Array], int, dict[str, float]]]:
    """Return a training function for `qflare_client.run` that trains an adapter.

    The proximal term of FedProx is added to the gradients. The only metric is ``loss``, the mean over the training.

    Args:
        model: A `peft.PeftModel`.
        make_trainer: Takes the model and the task; returns a `transformers.Trainer` with a training data set whose
            length is the example count. The task's epochs and learning rate are for its ``TrainingArguments``.
        adapter: Name of the adapter.
    """

    def train(
        arrays: dict[str, Array], task: TrainingTask
    ) -> tuple[dict[str, Array], int, dict[str, float]]:
        load_arrays(model, arrays, adapter)
        trainer = make_trainer(model, task)
        trainer.add_callback(_proximal_callback(ProximalTerm(model, task.proximal_mu)))
        loss = trainer.train().training_loss
        return to_arrays(model, adapter), len(trainer.train_dataset), {"loss": float(loss)}

    return train


def _adapter_state(model: Any, adapter: str) -> dict[str, Any]:
    import peft  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    # Without `save_embedding_layers`, PEFT asks the model hub whether the vocabulary was resized.
    state: dict[str, Any] = peft.get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    return state


def _proximal_callback(term: ProximalTerm) -> Any:
    import transformers  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    class AddProximalGradient(transformers.TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            term.add_gradient()

    return AddProximalGradient()
