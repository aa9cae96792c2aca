"""Secret sharing by polynomials: any t shares of a secret give it, fewer tell nothing about it.

Secrets are 32 bytes, taken as integers, big-endian. The field is that of the integers modulo 2^256 + 297, the smallest
prime above 2^256. The share at an abscissa x, 1 or more, is the value at x of a random polynomial of degree t - 1 whose
value at 0 is the secret; it has 33 bytes.

Source: Shamir 1979, "How to share a secret", Communications of the ACM 22(11).
"""

import secrets
from collections.abc import Iterable, Mapping
from math import prod
from typing import Final

SECRET_BYTES: Final = 32
"""Length of a secret."""

SHARE_BYTES: Final = 33
"""Length of a share."""

PRIME: Final = 2**256 + 297
"""Size of the field."""


class InvalidShareError(ValueError):
    """A share is no element of the field, or shares are not those of a secret."""


def split(secret: bytes, threshold: int, points: Iterable[int]) -> dict[int, bytes]:
    """Return the share at each point.

    Args:
        secret: 32 bytes.
        threshold: Number of shares that give the secret, 1 or more.
        points: Distinct abscissas, each from 1 to 2^32 - 1; at least `threshold` of them.

    Raises:
        ValueError: A value is out of range.
    """
    points = list(points)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"secret has {len(secret)} bytes, want {SECRET_BYTES}")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold: got {threshold}, want 1 to {len(points)}")
    _check_points(points)
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret))
    return {point: _value(coefficients, point).to_bytes(SHARE_BYTES) for point in points}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of as many shares as its threshold.

    Args:
        shares: Share by point. All are used: one that is not of the secret changes the result.

    Raises:
        InvalidShareError: A share is malformed, or the result is no secret.
    """
    points = list(shares)
    _check_points(points)
    values = [read_share(share) for share in shares.values()]
    weights = _weights_at_zero(points)
    total = sum(value * weight for value, weight in zip(values, weights, strict=True)) % PRIME
    if total >> 8 * SECRET_BYTES:
        raise InvalidShareError("the shares are not those of a secret")
    return total.to_bytes(SECRET_BYTES)


def read_share(share: bytes) -> int:
    """Return a share as an element of the field.

    Raises:
        InvalidShareError: It is none.
    """
    value = int.from_bytes(share)
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise InvalidShareError(f"share of {len(share)} bytes is no element of the field")
    return value


def _check_points(points: list[int]) -> None:
    if not points or len(set(points)) != len(points) or not all(0 < x < 2**32 for x in points):
        raise ValueError("points: want distinct numbers from 1 to 2^32 - 1")


def _value(coefficients: list[int], point: int) -> int:
    """Return the value of a polynomial, given from its highest coefficient down."""
    total = 0
    for coefficient in coefficients:
        total = (total * point + coefficient) % PRIME
    return total


def _weights_at_zero(points: list[int]) -> list[int]:
    """Return the Lagrange coefficients at 0: prod over j != i of x_j / (x_j - x_i)."""
    top = prod(points)
    bottoms = [x * prod(other - x for other in points if other != x) % PRIME for x in points]
    return [top * inverse % PRIME for inverse in _inverses(bottoms)]


def _inverses(values: list[int]) -> list[int]:
    """Return the inverses of numbers that are not 0, with one division."""
    before = [1]
    for value in values:
        before.append(before[-1] * value % PRIME)
    rest = pow(before.pop(), -1, PRIME)
    inverses = []
    for value in reversed(values):
        inverses.append(rest * before.pop() % PRIME)
        rest = rest * value % PRIME
    return inverses[::-1]
