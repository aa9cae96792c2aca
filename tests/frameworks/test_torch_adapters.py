"""PyTorch, Lightning, and PEFT with the Trainer of Hugging Face."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from qflare_client import TrainingTask
from qflare_client.adapters import lightning, pytorch, transformers

pytestmark = pytest.mark.frameworks
EXAMPLES = Path(__file__).parents[2] / "examples/frameworks"
TASK = TrainingTask(
    training_session_id="s",
    round_number=1,
    base_version=0,
    local_epochs=2,
    batch_size=32,
    learning_rate=0.1,
)


def example(name: str) -> Any:
    """Return a new module of an example's program."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return sum(float(np.square(one[name] - other[name], dtype=np.float64).sum()) for name in one)


def with_mu(mu: float) -> TrainingTask:
    return replace(TASK, parameters={"proximal_mu": mu})


def test_the_state_of_a_module_survives_the_round_trip_with_its_types() -> None:
    def made() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()

    trained, other = made(), made()
    trained(torch.randn(5, 3, dtype=torch.bfloat16))

    pytorch.load_arrays(other, pytorch.to_arrays(trained))

    for name, tensor in trained.state_dict().items():
        assert other.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(other.state_dict()[name], tensor), name


def test_the_proximal_term_is_that_of_the_formula() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    term = pytorch.ProximalTerm(module, 0.5)
    with torch.no_grad():
        module.weight += 3
    module.weight.grad = torch.ones(1, 2)

    term.add_gradient()

    torch.testing.assert_close(module.weight.grad, torch.full((1, 2), 1 + 0.5 * 3))


def test_lightning_trains_with_the_task_s_settings_and_sends_what_is_logged() -> None:
    program = example("lightning_device")
    base = lightning.to_arrays(program.module)

    arrays, examples, metrics = program.train(base, TASK)

    assert program.module.learning_rate == TASK.learning_rate
    assert examples == 200
    assert metrics.keys() == {"loss", "accuracy"}
    assert distance(arrays, base) > 0
    assert arrays["layers.1.num_batches_tracked"] == 2 * 4


def test_lightning_adds_the_proximal_term() -> None:
    moved = []
    for mu in (0, 5):
        program = example("lightning_device")
        base = lightning.to_arrays(program.module)
        trained, _, _ = program.train(base, with_mu(mu))
        names = dict(program.module.named_parameters())
        moved.append(distance({name: trained[name] for name in names}, base))

    assert moved[1] < 0.5 * moved[0]


def test_only_the_lora_adapter_travels_and_the_base_model_stays() -> None:
    program = example("lora_device")
    base = transformers.to_arrays(program.model)
    frozen = {
        name: tensor.clone()
        for name, tensor in program.model.named_parameters()
        if not tensor.requires_grad
    }

    arrays, examples, metrics = program.train(base, TASK)

    assert examples == 128
    assert metrics.keys() == {"loss"}
    assert all("lora_" in name or "classifier" in name for name in arrays)
    assert any("lora_B" in name and array.any() for name, array in arrays.items())
    after = dict(program.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_a_lora_model_predicts_the_same_after_the_round_trip() -> None:
    trained, other = example("lora_device"), example("lora_device")
    arrays, _, _ = trained.train(transformers.to_arrays(trained.model), TASK)

    transformers.load_arrays(other.model, arrays)

    trained.model.eval()
    other.model.eval()
    with torch.no_grad():
        expected = trained.model(input_ids=trained.tokens).logits
        assert torch.equal(other.model(input_ids=other.tokens).logits, expected)


def test_lora_adds_the_proximal_term() -> None:
    moved = []
    for mu in (0, 50):
        program = example("lora_device")
        start = transformers.to_arrays(program.model)
        moved.append(distance(program.train(start, with_mu(mu))[0], start))

    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("name", ["base_model.model.classifier.bias", "absent"])
def test_another_shape_or_name_is_refused_and_changes_nothing(name: str) -> None:
    program = example("lora_device")
    before = transformers.to_arrays(program.model)
    changed = {key: array + 1 for key, array in before.items()}

    with pytest.raises(ValueError, match=name):
        transformers.load_arrays(program.model, changed | {name: np.zeros(3, np.float32)})

    assert distance(transformers.to_arrays(program.model), before) == 0


def test_another_adapter_than_the_default_is_shared_by_its_name() -> None:
    program = example("lora_device")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    program.model.add_adapter("second", config)

    arrays = transformers.to_arrays(program.model, "second")
    transformers.load_arrays(
        program.model, {name: array + 1 for name, array in arrays.items()}, "second"
    )

    second = transformers.to_arrays(program.model, "second")
    assert {array.shape[0] for name, array in second.items() if "lora_A" in name} == {2}
    assert all((second[name] == array + 1).all() for name, array in arrays.items())
