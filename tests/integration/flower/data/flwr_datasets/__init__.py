"""Data for apps that would download them: images of random blobs, one center for each of ten labels."""

from collections.abc import Callable
from typing import Any, Self

import numpy as np

SHAPES = {"uoft-cs/cifar10": ("img", (32, 32, 3)), "ylecun/mnist": ("image", (28, 28))}
"""Column and shape of the images, by data set; those of CIFAR-10 have values from 0 to 255, as files of pictures."""


class Partition:
    """Columns of one device."""

    def __init__(self, **columns: Any) -> None:
        self._columns = columns
        self._transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def with_format(self, _: str) -> Self:
        """Return this: the columns are arrays."""
        return self

    def with_transform(self, transform: Callable[[dict[str, Any]], dict[str, Any]]) -> "Partition":
        """Return the data with a function that is applied to each example, as to a batch of one."""
        other = Partition(**self._columns)
        other._transform = transform
        return other

    def train_test_split(self, *, test_size: float, seed: int) -> "Split":
        """Divide the examples at random."""
        order = np.random.default_rng(seed).permutation(len(self))
        border = round(len(self) * test_size)
        return Split(
            {
                name: Partition(**{key: column[part] for key, column in self._columns.items()})
                for name, part in {"test": order[:border], "train": order[border:]}.items()
            }
        )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._columns["label"])

    def __getitem__(self, key: str | int) -> Any:
        """Return a column by its name, or an example by its number."""
        if isinstance(key, str):
            return self._columns[key]
        if key >= len(self):
            raise IndexError(key)
        assert self._transform is not None
        batch = self._transform({name: column[[key]] for name, column in self._columns.items()})
        return {name: column[0] for name, column in batch.items()}


class Split(dict[str, Partition]):
    """The parts of a device's data, by name."""

    def with_transform(self, transform: Callable[[dict[str, Any]], dict[str, Any]]) -> "Split":
        """Return the parts with a function that is applied to each example."""
        return Split({name: part.with_transform(transform) for name, part in self.items()})


class FederatedDataset:
    """The data of a data set."""

    def __init__(self, *, dataset: str, partitioners: Any) -> None:
        del partitioners
        self._column, self._shape = SHAPES[dataset]

    def load_partition(self, partition_id: int, _split: str = "train") -> Partition:
        """Return the data of a device."""
        centers = np.random.default_rng(1).random((10, *self._shape))
        generator = np.random.default_rng([2, partition_id])
        labels = np.resize(generator.permutation(10), 40 + 10 * partition_id)
        noise = generator.standard_normal((len(labels), *self._shape))
        images = centers[labels] + 0.3 * noise
        if self._column == "img":
            images = (255 * images.clip(0, 1)).astype(np.uint8)
        return Partition(**{self._column: images, "label": labels})
