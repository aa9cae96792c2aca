"""How data are divided among devices."""


class IidPartitioner:
    """As many parts as devices."""

    def __init__(self, *, num_partitions: int) -> None:
        self.num_partitions = num_partitions
