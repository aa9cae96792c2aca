"""A device that fine-tunes a Hugging Face model with LoRA: does a sequence hold more low than high tokens?

python lora_device.py initial adapter.safetensors
python lora_device.py train HOME SESSION

The base model is a small one with random weights, the same on every device because of the seed. In a program of yours
it is `AutoModelForSequenceClassification.from_pretrained(...)`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from qflare_client import Client, TrainingTask, run
from qflare_client.adapters.transformers import to_arrays, training_function

set_seed(0)
base = BertForSequenceClassification(
    BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=2,
    )
)
model = get_peft_model(
    base,
    LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"]),
)

tokens = torch.randint(0, 20, (128, 12))
labels = ((tokens < 10).sum(dim=1) > 6).long()  # noqa: PLR2004
examples = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def make_trainer(model: Any, task: TrainingTask) -> Trainer:
    """Return the trainer of a task."""
    arguments = TrainingArguments(
        output_dir=str(Path(tempfile.gettempdir()) / "lora"),  # nothing is saved
        num_train_epochs=task.local_epochs,
        learning_rate=task.learning_rate,
        per_device_train_batch_size=task.batch_size,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=examples)


train = training_function(model, make_trainer)


if __name__ == "__main__":
    if sys.argv[1] == "initial":
        save_file(to_arrays(model), sys.argv[2])
    else:
        with Client(home=Path(sys.argv[2])) as client:
            print(run(client, train, training_session_id=sys.argv[3]))
