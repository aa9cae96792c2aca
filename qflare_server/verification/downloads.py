"""The form in which devices get versions, made again from the versions themselves, a few chunks at a time."""

from collections.abc import Iterator

from qflare.tensors.download_encodings import narrowed
from qflare.tensors.encodings import Encoding
from qflare.tensors.payload import payload_digest
from qflare.v1 import security_pb2
from qflare_server.context import Context
from qflare_server.payloads.reader import read_chunks
from qflare_server.storage.payload_records import describe
from qflare_server.storage.repository import evidence, payloads
from qflare_server.storage.tables import GlobalModel
from qflare_server.training.versions import manifest_of
from qflare_server.verification.findings import Finding, Tally, problem_of, walk


class DownloadVerification:
    """One pass over the versions that devices get in a smaller form.

    Args:
        context: The coordinator's parts.
        tally: What was looked at.
        read_bytes: Round the versions again; else nothing is looked at here.
    """

    def __init__(self, context: Context, tally: Tally, *, read_bytes: bool) -> None:
        self._context = context
        self._tally = tally
        self._read_bytes = read_bytes

    def findings(self) -> Iterator[Finding]:
        """Yield what is wrong."""
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
    """Round a version again; return what is wrong with the form in which devices get it, empty if nothing is.

    Args:
        context: The coordinator's parts.
        model: A version whose statement names such a form.

    Raises:
        PayloadPrunedError: The bytes of the version are no longer kept.
    """
    stated = security_pb2.ModelStatement.FromString(model.statement).download
    with context.database.read() as session:
        stored = describe(payloads.get_payload(session, model.payload_id))
    encoding = Encoding.from_number(stated.encoding)
    digest = payload_digest(narrowed(manifest_of(model), encoding, read_chunks(context, stored)))
    if digest == stated.payload_digest:
        return ""
    return f"download: got {digest}, published {stated.payload_digest}"
