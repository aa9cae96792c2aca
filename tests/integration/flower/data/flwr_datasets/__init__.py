"""Data for apps that would download them: images of random blobs, one center for each of ten labels."""

from typing import Any, Self

import numpy as np


class Partition:
    """Columns of one device."""

    def __init__(self, **columns: Any) -> None:
        self._columns = columns

    def with_format(self, _: str) -> Self:
        """Return this: the columns are arrays."""
        return self

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._columns["label"])

    def __getitem__(self, name: str) -> Any:
        """Return a column."""
        return self._columns[name]


class FederatedDataset:
    """The data, whatever the name of the data set."""

    def __init__(self, *, dataset: str, partitioners: Any) -> None:
        del dataset, partitioners

    def load_partition(self, partition_id: int, _split: str = "train") -> Partition:
        """Return the data of a device."""
        centers = np.random.default_rng(1).random((10, 28, 28))
        generator = np.random.default_rng([2, partition_id])
        labels = np.resize(generator.permutation(10), 40 + 10 * partition_id)
        noise = generator.standard_normal((len(labels), 28, 28))
        return Partition(image=centers[labels] + 0.3 * noise, label=labels)
