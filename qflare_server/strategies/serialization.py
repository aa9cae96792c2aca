"""JSON form of an outcome, stored with the version.

Recomputation from the recorded assessments needs no norms and no Gram matrix, so it works on machines whose BLAS rounds
differently.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from math import isnan, nan
from typing import Any

from qflare_server.strategies.types import Outcome, UpdateAssessment

_NUMBERS = ("factor", "coefficient", "weight")
_FIELDS = tuple(item.name for item in fields(UpdateAssessment))
_NO_ROWS = '"judgements": []'  # its first occurrence: only the clipped fraction sorts before it


def outcome_to_data(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as data that JSON represents without loss: floats keep every bit, NaN becomes null."""
    return {**_facts(outcome), "judgements": [_row(entry) for entry in outcome.judgements]}


class OutcomeEncoder:
    """Encodes an outcome as JSON: assessments as they become known, so that little is left to do at the end.

    The bytes are those of `outcome_to_data` with sorted keys, whatever was encoded beforehand. Not thread-safe.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[UpdateAssessment, str]] = {}

    def prepare(self, entries: Iterable[UpdateAssessment]) -> None:
        """Encode assessments that the outcome will probably contain; about 200 bytes each are kept."""
        for entry in entries:
            self._known[entry.update_id] = entry, _dumps(_row(entry))

    def encode(self, outcome: Outcome) -> bytes:
        """Return the JSON of an outcome, UTF-8."""
        known = self._known
        rows = []
        for entry in outcome.judgements:
            found = known.get(entry.update_id)
            # the same object, since assessments are immutable, and comparing them costs more than encoding
            rows.append(found[1] if found and found[0] is entry else _dumps(_row(entry)))
        before, empty, after = _dumps({**_facts(outcome), "judgements": []}).partition(_NO_ROWS)
        assert empty
        return "".join((before, _NO_ROWS[:-1], ", ".join(rows), "]", after)).encode()


def _dumps(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True)


def _facts(outcome: Outcome) -> dict[str, Any]:
    """Return what an outcome says besides the judgements."""
    return {
        "strategy": outcome.strategy,
        "weight_sum": outcome.weight_sum,
        "scalars": dict(outcome.scalars),
        "clipped_fraction": outcome.clipped_fraction,
        "noise_stddev": outcome.noise_stddev,
    }


def _row(entry: UpdateAssessment) -> dict[str, Any]:
    row = {name: getattr(entry, name) for name in _FIELDS}  # a tenth of the time of `asdict`
    return {**row, "norm": None if isnan(entry.norm) else entry.norm}


def outcome_from_data(data: Mapping[str, Any]) -> Outcome:
    """Read the output of `outcome_to_data`.

    Raises:
        ValueError: A field is missing or of another type.
    """
    try:
        return Outcome(
            strategy=str(data["strategy"]),
            judgements=_judgements(data["judgements"]),
            weight_sum=float(data["weight_sum"]),
            scalars={str(name): float(value) for name, value in data["scalars"].items()},
            clipped_fraction=float(data["clipped_fraction"]),
            noise_stddev=float(data["noise_stddev"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the record of an outcome: {error!r}") from error


def _judgements(rows: Sequence[Mapping[str, Any]]) -> tuple[UpdateAssessment, ...]:
    return tuple(
        UpdateAssessment(
            update_id=str(row["update_id"]),
            **{name: float(row[name]) for name in _NUMBERS},
            rejection=str(row["rejection"]),
            norm=nan if row["norm"] is None else float(row["norm"]),
            cosine=None if row["cosine"] is None else float(row["cosine"]),
        )
        for row in rows
    )


def by_update(outcome: Outcome) -> dict[str, UpdateAssessment]:
    """Return the judgements by update id, as `begin` takes them."""
    return {entry.update_id: entry for entry in outcome.judgements}
