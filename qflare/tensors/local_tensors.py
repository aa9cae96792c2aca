"""Partial sharing: patterns of the names of tensors that stay on a device.

    is_local("encoder.bn1.weight", ["*.bn?.*"])

Personalization layers stay local in FedPer (Arivazhagan et al. 2019, arXiv:1912.00818), batch normalization in FedBN
(Li et al. 2021, arXiv:2102.07623), and the base model where only LoRA adapters travel (Hu et al. 2021,
arXiv:2106.09685).
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def is_local(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a tensor stays on the device.

    Args:
        name: Name of the tensor.
        patterns: Shell-style patterns, as of `fnmatch`, that match whole names: ``*`` any characters, ``?`` one
            character, ``[seq]`` one of these. Upper and lower case differ.
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)
