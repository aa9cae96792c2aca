"""Results of queries of federated analytics, for those who may download versions."""

from typing import Final

from qflare.analytics.results import NoisySum
from qflare_server.context import Context
from qflare_server.payloads.reader import PayloadBytes, check_digests
from qflare_server.storage.payload_records import describe
from qflare_server.storage.records import GlobalModel, TrainingSession
from qflare_server.storage.repository import global_models, payloads
from qflare_server.training.analytics import is_query

RESULT_VERSION: Final = 1
"""Version that is the result of a query."""


class QueryResults:
    """Reads results of queries.

    Args:
        context: The coordinator's parts.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def find(self, row: TrainingSession) -> tuple[GlobalModel, NoisySum] | None:
        """Return the version that is the result of a query, and the sum that it holds; None without a result.

        Args:
            row: The training session; one that trains a model has no result.

        Raises:
            DamagedPayloadError: The stored bytes are not those of the version.
        """
        if not is_query(row.config):
            return None
        with self._context.database.read() as session:
            model = global_models.get_model(session, row.id, RESULT_VERSION)
            if model is None:
                return None
            stored = describe(payloads.get_payload(session, model.payload_id))
        check_digests(stored)
        source = PayloadBytes(self._context, stored, None, 1)
        data = bytes(source.read(0, stored.size_bytes))
        return model, NoisySum.of_version(row.config, data)
