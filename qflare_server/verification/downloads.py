"""Verification of downloads: recomputes the payload of a download encoding from the version, in bounded memory."""

from collections.abc import Iterator

from qflare.tensors.download_encodings import narrowed
from qflare.tensors.encodings import Encoding
from qflare.tensors.payload import payload_digest
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.payloads.reader import read_chunks
from qflare_server.storage.payload_records import describe
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import evidence, payloads
from qflare_server.training.versions import manifest_of
from qflare_server.verification.findings import Finding, Tally, problem_of, walk


class DownloadVerification:
    """One pass over the versions with a download encoding.

    Args:
        context: The coordinator's dependencies.
        tally: Counts of what was checked.
        read_bytes: Recompute the downloads; otherwise nothing is checked here.
    """

    def __init__(self, context: Context, tally: Tally, *, read_bytes: bool) -> None:
        self._context = context
        self._tally = tally
        self._read_bytes = read_bytes

    def findings(self) -> Iterator[Finding]:
        """Yield discrepancies."""
        for row in walk(
            self._context.database,
            evidence.downloads_after,
            ("", -1),
            lambda model: (model.training_session_id, model.version),
        ):
            yield from self._check(row)

    def _check(self, row: GlobalModel) -> Iterator[Finding]:
        if not self._read_bytes:
            self._tally.unchecked["downloads whose versions were not read"] += 1
            return
        self._tally.checked["download"] += 1
        problem = problem_of(self._compare, row)
        if problem:
            yield Finding("download", f"{row.training_session_id} version {row.version}", problem)

    def _compare(self, row: GlobalModel) -> None:
        problem = download_problem(self._context, row)
        if problem:
            raise ValueError(problem)


def download_problem(context: Context, model: GlobalModel) -> str:
    """Recompute the download of a version; return its problem, empty if there is none.

    Args:
        context: The coordinator's dependencies.
        model: A version whose statement names a download.

    Raises:
        PayloadPrunedError: The bytes of the version were pruned.
    """
    stated = security_pb2.ModelStatement.FromString(model.statement).download
    with context.database.read() as session:
        stored = describe(payloads.get_payload(session, model.payload_id))
    encoding = Encoding.from_number(stated.encoding)
    digest = payload_digest(narrowed(manifest_of(model), encoding, read_chunks(context, stored)))
    if digest == stated.payload_digest:
        return ""
    return f"download: got {digest}, published {stated.payload_digest}"
