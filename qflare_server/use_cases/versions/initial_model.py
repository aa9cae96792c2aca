"""Upload of a training session's initial model."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final

from qflare.crypto import merkle
from qflare.tensors import CHUNK_BYTES, BytesLike, Manifest, ManifestLimits
from qflare.tensors import InvalidManifestError as BadManifestError
from qflare.tensors.download_encodings import download_manifest
from qflare.tensors.encodings import Encoding
from qflare.tensors.safetensors_files import own_metadata
from qflare.v1 import admin_service_pb2, tensor_pb2, training_pb2
from qflare_server.config import ServerConfig
from qflare_server.context import Context
from qflare_server.errors import InvalidManifestError, InvalidRequestError, WrongStateError
from qflare_server.payloads.expected import ExpectedPayload
from qflare_server.payloads.sealed_receiver import receiver_of, version_seal_context
from qflare_server.payloads.writer import VersionWriter, received_chunks
from qflare_server.storage.records import GlobalModel
from qflare_server.storage.repository import global_models
from qflare_server.storage.repository.audit import Caller
from qflare_server.training.config import download_encoding, require_trainable
from qflare_server.use_cases.training_sessions.administration import Training, checked

MAX_METADATA_BYTES: Final = 65_536
"""Maximum size of a model file's metadata, in bytes of UTF-8."""


class InitialModels:
    """Accepts initial models."""

    def __init__(self, context: Context, executor: ThreadPoolExecutor, training: Training) -> None:
        self._context = context
        self._executor = executor
        self._training = training

    def validate(
        self,
        name: str,
        model_type: str,
        config: training_pb2.TrainingConfig,
        layout: tensor_pb2.Manifest | None,
        architecture: Mapping[str, str] | None = None,
    ) -> training_pb2.TrainingConfig:
        """Validate the parameters of a training session without creating it.

        Args:
            name: 1 to 200 characters.
            model_type: At most 100 characters.
            config: Configuration; unset fields take their defaults.
            layout: Layout of the initial model; None skips its checks.
            architecture: Free text by name.

        Returns:
            The configuration with every default filled in, except the seed, which is drawn at creation.

        Raises:
            InvalidRequestError: A field is out of range.
            StrategyRefusedError: The strategy's settings contradict each other.
            InvalidManifestError: Devices could not train the model under the configuration.
            UpdateTooLargeError: The model is larger than this coordinator takes.
        """
        done = checked(name, model_type, config, architecture)
        if layout is not None:
            checked_layout(self._context.config, done, layout)
        done.selection.seed = config.selection.seed
        return done

    def upload(
        self,
        caller: Caller,
        header: admin_service_pb2.InitialModelHeader,
        chunks: Iterator[tuple[int, BytesLike]],
    ) -> GlobalModel:
        """Store a model and publish it as version 0. Idempotent for the same model.

        Raises:
            InvalidManifestError: The manifest is no layout, has no floating tensor, or none that the training
                session's download encoding makes smaller, or devices could not train it under its configuration.
            InvalidUpdateError: The bytes are not what the manifest says, or hold NaN or infinity, or a number
                beyond the range of the download encoding.
            InvalidRequestError: The metadata of its file is too long.
            DigestMismatchError: The bytes do not match the digest.
            WrongStateError: The training session has been started, or has an initial model.
        """
        metadata = _file_metadata(header.metadata)
        known = self._known(header, metadata)
        if known is not None:
            return _same(known, chunks)
        training_session = self._training.require_waiting(header.training_session_id)
        config = training_session.config
        manifest = checked_layout(self._context.config, config, header.manifest)
        encoding = download_encoding(config)
        expected = ExpectedPayload(manifest, header.payload_digest)
        expected.check(self._context.config.max_payload_bytes)
        seal_context = version_seal_context(self._context, config, training_session.id, 0)
        receiver = receiver_of(self._context, self._executor, expected, seal_context)
        if receiver.is_large:
            receiver.begin(self._context.clock())
        try:
            for index, chunk in chunks:
                receiver.add(index, chunk)
            received = receiver.finish()
        except BaseException:
            receiver.abandon()
            raise
        at = self._context.clock()
        writer = VersionWriter(self._context, self._executor, manifest, encoding, at)
        download = None
        if encoding is not Encoding.FULL_PRECISION:
            download = writer.write_download(received_chunks(self._context, received))
        return self._training.add_initial_model(
            caller, header.training_session_id, manifest, received, download, metadata
        )

    def _known(
        self, header: admin_service_pb2.InitialModelHeader, metadata: Mapping[str, str]
    ) -> GlobalModel | None:
        """Return version 0 of a training session if it may be the model of an upload, None otherwise."""
        with self._context.database.read() as session:
            known = global_models.get_model(session, header.training_session_id, 0)
        if known is None or known.layout_digest != header.manifest.layout_digest:
            return None
        if not metadata.items() <= known.architecture.items():
            return None
        return known if header.payload_digest in {"", known.payload_digest} else None


def checked_layout(
    settings: ServerConfig, config: training_pb2.TrainingConfig, message: tensor_pb2.Manifest
) -> Manifest:
    """Return the layout of an initial model, if devices can train it under a configuration.

    Args:
        settings: Configuration of this coordinator.
        config: Configuration of the training session, with every default filled in.
        message: The layout.

    Raises:
        InvalidManifestError: It is no layout, has no floating tensor, or none that the download encoding makes smaller,
            or devices could not train it.
        UpdateTooLargeError: The payload is larger than the limit.
    """
    manifest = _parse(settings, message)
    _require_smaller(manifest, download_encoding(config))
    require_trainable(config, manifest, settings.max_payload_bytes)
    ExpectedPayload(manifest).check(settings.max_payload_bytes)
    return manifest


def _parse(settings: ServerConfig, message: tensor_pb2.Manifest) -> Manifest:
    """Parse a layout and check it against the limits of this coordinator and of devices."""
    devices_take = ManifestLimits()
    limits = ManifestLimits(
        min(settings.max_tensors, devices_take.max_tensors),
        min(settings.max_payload_bytes, devices_take.max_payload_bytes),
    )
    try:
        manifest = Manifest.from_proto(message, limits)
    except BadManifestError as error:
        raise InvalidManifestError(str(error), field="header.manifest") from error
    if not any(spec.dtype.is_float and spec.element_count for spec in manifest.tensors):
        raise InvalidManifestError("manifest: no floating tensor", field="header.manifest")
    return manifest


def _same(known: GlobalModel, chunks: Iterator[tuple[int, BytesLike]]) -> GlobalModel:
    """Return version 0 if the chunks of an upload match its bytes.

    Raises:
        WrongStateError: They differ.
    """
    chunk_count = -(-known.size_bytes // CHUNK_BYTES)
    leaves = [merkle.leaf_hash(data) for _, data in islice(chunks, chunk_count + 1)]
    if merkle.root(leaves).hex() != known.payload_digest:
        raise WrongStateError("the training session has another initial model")
    return known


def _file_metadata(entries: Iterable[admin_service_pb2.FileMetadata]) -> dict[str, str]:
    """Return the metadata of a model's file to store.

    Raises:
        InvalidRequestError: It is too long (every version has a copy), or holds a NUL, which databases do not store.
    """
    own = own_metadata({entry.name: entry.value for entry in entries})
    size_bytes = sum(len(name.encode()) + len(value.encode()) for name, value in own.items())
    if size_bytes > MAX_METADATA_BYTES:
        raise InvalidRequestError(
            f"header.metadata: got {size_bytes} bytes, want at most {MAX_METADATA_BYTES}",
            field="header.metadata",
        )
    if any("\0" in name + value for name, value in own.items()):
        raise InvalidRequestError(
            "header.metadata: got a NUL, want text without", field="header.metadata"
        )
    return own


def _require_smaller(manifest: Manifest, encoding: Encoding) -> None:
    """Refuse a download encoding that does not make the model smaller."""
    if encoding is Encoding.FULL_PRECISION:
        return
    if download_manifest(manifest, encoding) == manifest:
        raise InvalidManifestError(
            f"manifest: no tensor over 16 bits that downloads as {encoding.name.lower()} make smaller",
            field="header.manifest",
        )
