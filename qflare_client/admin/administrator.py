"""Administration of a coordinator from Python: notebooks, scripts and tests.

    from qflare_client.admin.administrator import Administrator

    with Administrator("127.0.0.1:50051", token) as admin:
        settings = {"rounds.quorum": 3, "total_rounds": 20}
        session = admin.create_session("wards", settings, model={"w": weights}, start=True)
        admin.wait(session.training_session_id)
        arrays = admin.download(session.training_session_id)

Answers are messages of `qflare.v1`, whose stubs are typed; models are NumPy arrays by name. A call that changes
something is made once, however often it is sent.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

from qflare.tensors import Array, Manifest, assemble
from qflare.training_settings import SettingError, from_mapping, read_file
from qflare.v1 import admin_service_pb2 as pb
from qflare.v1 import device_pb2, training_pb2
from qflare_client import arguments
from qflare_client.admin import references
from qflare_client.admin.connection import Admin
from qflare_client.admin.live import ENDED, events
from qflare_client.admin.login import refreshed
from qflare_client.admin.measurements import history, series
from qflare_client.admin.profile import Profile, load, profile_path, read_profile
from qflare_client.admin.queries import (
    Protection,
    QueryResult,
    Question,
    create_query,
    query_config,
    read_result,
    refine_query,
)
from qflare_client.admin.transfers import download_model, open_model, upload_model
from qflare_client.errors import DeadlineExceededError, InvalidRequestError

Settings: TypeAlias = training_pb2.TrainingConfig | Mapping[str, object] | Path
"""A configuration, its values by key (`docs/training-settings.md`), or a .json or .toml file."""

Model: TypeAlias = Mapping[str, Array] | Path
"""Arrays by name, or a .safetensors file."""


class Administrator:
    """One connection to a coordinator with the rights of an admin token; a context manager.

    Every method raises `QflareClientError` if the coordinator refuses a call or cannot be reached. Devices and
    training sessions can be given by id, name, or the beginning of an id (4 characters or more); one that means several
    is an `AmbiguousReferenceError`.

    Args:
        address: Coordinator, host:port.
        token: Admin token, or the path of a file with it that only its owner can read.
        ca_file: Authorities to trust instead of the system's; needed for an address that is not loopback, unless the
            system trusts the coordinator's certificate.
        certificate_file: Certificate chain, for mutual TLS.
        key_file: Key of that certificate.
        insecure: Use plaintext with any address.
        timeout_s: Deadline of one call, in seconds.

    Raises:
        ProfileError: There is no token, or others can read its file.
    """

    def __init__(
        self,
        address: str,
        token: str | Path,
        *,
        ca_file: Path | None = None,
        certificate_file: Path | None = None,
        key_file: Path | None = None,
        insecure: bool = False,
        timeout_s: float = 30.0,
    ) -> None:
        profile = Profile(
            address,
            str(ca_file or ""),
            str(certificate_file or ""),
            str(key_file or ""),
            token="" if isinstance(token, Path) else token,
            token_file=str(token) if isinstance(token, Path) else "",
            insecure=insecure,
        )
        self._admin = Admin(profile, timeout_s=timeout_s)

    @classmethod
    def from_profile(cls, path: Path | None = None, *, timeout_s: float = 30.0) -> Self:
        """Connect as the commands of `qflare-admin` do, with its profile.

        A token of `qflare-admin login` is refreshed before it expires, and the profile gets the new one.

        Args:
            path: The profile; None means the one that QFLARE_PROFILE names or the default one, with the token of
                QFLARE_TOKEN in place of its own.
            timeout_s: Deadline of one call, in seconds.

        Raises:
            ProfileError: The profile lacks an address or a token, or others can read it.
            LoginError: Raised by every method: the provider has ended the log-in.
        """
        profile = load(os.environ, {}) if path is None else read_profile(path)
        renew = partial(refreshed, path=profile_path(os.environ) if path is None else path)
        made = cls.__new__(cls)
        made._admin = Admin(profile, timeout_s=timeout_s, renew=renew)  # noqa: SLF001 - of this class
        return made

    def __enter__(self) -> Self:
        """Return this connection."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._admin.__exit__()

    def status(self) -> pb.GetCoordinatorStatusResponse:
        """Return the coordinator's version, keys, replicas and counts."""
        answer: pb.GetCoordinatorStatusResponse = self._call(
            "GetCoordinatorStatus", pb.GetCoordinatorStatusRequest()
        )
        return answer

    def validate_session(
        self, settings: Settings, *, model: Model | None = None, name: str = "unnamed"
    ) -> training_pb2.TrainingSession:
        """Check settings and a model, and create nothing.

        Returns:
            What would be created: `config` with every default, and `warnings`.

        Raises:
            InvalidRequestError: The settings or the model are refused.
        """
        request = _creation(name, settings)
        request.validate_only = True
        if model is not None:
            request.manifest.CopyFrom(open_model(model).manifest.to_proto())
        return _session(self._call("CreateTrainingSession", request))

    def create_session(
        self,
        name: str,
        settings: Settings,
        *,
        model: Model | None = None,
        start: bool = False,
        model_type: str = "",
        request_id: str = "",
    ) -> training_pb2.TrainingSession:
        """Create a training session; with a model, upload it; on request, start the first round.

        Nothing is created if the settings or the model are refused; a failed upload cancels the training session.

        Args:
            name: 1 to 200 characters.
            settings: What is left out takes its default.
            model: The initial model.
            start: Start the first round; needs a model.
            model_type: Kind of model, free text.
            request_id: Idempotency key; empty means one of this call.

        Raises:
            InvalidRequestError: The settings or the model are refused.
        """
        request = _creation(name, settings)
        request.model_type, request.request_id = model_type, request_id
        if model is not None:
            self.validate_session(request.config, model=model, name=name)
        session = _session(self._call("CreateTrainingSession", request))
        session_id = session.training_session_id
        if model is not None:
            try:
                upload_model(self._admin, session_id, model)
            except BaseException:
                self.cancel(session_id, "its initial model was not uploaded")
                raise
        return self.start(session_id) if start else self.session(session_id)

    def session(self, training_session_id: str) -> training_pb2.TrainingSession:
        """Return a training session."""
        request = pb.GetTrainingSessionRequest(
            training_session_id=self._session_id(training_session_id)
        )
        return _session(self._call("GetTrainingSession", request))

    def sessions(self) -> list[training_pb2.TrainingSession]:
        """Return all training sessions, the latest first."""
        return self._list(
            "ListTrainingSessions", pb.ListTrainingSessionsRequest(), "training_sessions"
        )

    def start(self, training_session_id: str) -> training_pb2.TrainingSession:
        """Start the first round; no effect while it is running."""
        request = pb.StartTrainingSessionRequest(
            training_session_id=self._session_id(training_session_id)
        )
        return _session(self._call("StartTrainingSession", request))

    def pause(self, training_session_id: str) -> training_pb2.TrainingSession:
        """Take no updates until `resume`; the open round keeps its updates."""
        request = pb.PauseTrainingSessionRequest(
            training_session_id=self._session_id(training_session_id)
        )
        return _session(self._call("PauseTrainingSession", request))

    def resume(self, training_session_id: str) -> training_pb2.TrainingSession:
        """Continue after a pause."""
        request = pb.ResumeTrainingSessionRequest(
            training_session_id=self._session_id(training_session_id)
        )
        return _session(self._call("ResumeTrainingSession", request))

    def update(
        self,
        training_session_id: str,
        *,
        quorum: int | None = None,
        target: int | None = None,
        deadline_s: float | None = None,
    ) -> training_pb2.TrainingSession:
        """Change the rule by which rounds close, from the open round on; None leaves a value as it is.

        Args:
            training_session_id: Id, beginning of the id, or name of a training session that has not ended.
            quorum: Minimum number of updates for a version.
            target: Number of updates at which a round closes immediately.
            deadline_s: Time after opening at which a round closes if it has reached the quorum, in seconds.
        """
        request = pb.UpdateTrainingSessionRequest(
            training_session_id=self._session_id(training_session_id)
        )
        if quorum is not None:
            request.quorum = arguments.whole("quorum", quorum, 1)
        if target is not None:
            request.target = arguments.whole("target", target, 1)
        if deadline_s is not None:
            seconds = arguments.positive("deadline_s", deadline_s)
            request.deadline.FromTimedelta(timedelta(seconds=seconds))
        return _session(self._call("UpdateTrainingSession", request))

    def cancel(self, training_session_id: str, reason: str = "") -> training_pb2.TrainingSession:
        """End a training session; its versions are kept."""
        request = pb.CancelTrainingSessionRequest(
            training_session_id=self._session_id(training_session_id), reason=reason
        )
        return _session(self._call("CancelTrainingSession", request))

    def watch(
        self, training_session_id: str, for_s: float | None = None
    ) -> Iterator[pb.WatchTrainingSessionResponse]:
        """Yield the events of a training session until it ends.

        Args:
            training_session_id: Training session.
            for_s: How long at most, in seconds; None means until the end.
        """
        yield from events(self._admin, self._session_id(training_session_id), for_s)

    def wait(
        self, training_session_id: str, timeout_s: float | None = None
    ) -> training_pb2.TrainingSession:
        """Wait for the end of a training session and return it; `state` says how it ended.

        Args:
            training_session_id: Training session.
            timeout_s: How long at most, in seconds; None means until the end.

        Raises:
            DeadlineExceededError: It has not ended in time.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        training_session_id = self._session_id(training_session_id)
        while True:
            left_s = None if until is None else max(0.001, until - time.monotonic())
            for _event in self.watch(training_session_id, left_s):
                pass
            session = self.session(training_session_id)
            if session.state in ENDED:
                return session
            if until is not None and time.monotonic() >= until:
                raise DeadlineExceededError("the training session has not ended in time")

    def rounds(self, training_session_id: str) -> list[training_pb2.Round]:
        """Return all rounds, the latest first."""
        request = pb.ListRoundsRequest(training_session_id=self._session_id(training_session_id))
        return self._list("ListRounds", request, "rounds")

    def updates(self, training_session_id: str, round_number: int) -> list[Any]:
        """Return the updates of a round."""
        request = pb.ListUpdatesRequest(
            training_session_id=self._session_id(training_session_id), round_number=round_number
        )
        return self._list("ListUpdates", request, "updates")

    def versions(self, training_session_id: str) -> list[training_pb2.GlobalModel]:
        """Return all versions, without their bytes."""
        request = pb.ListGlobalModelsRequest(
            training_session_id=self._session_id(training_session_id)
        )
        return self._list("ListGlobalModels", request, "global_models")

    def metrics(self, training_session_id: str) -> dict[str, list[tuple[int, float]]]:
        """Return versions and values of every metric, oldest first; names with `train_` are training metrics."""
        return series(history(self._admin, self._session_id(training_session_id)), [])

    def download(self, training_session_id: str, version: int | None = None) -> dict[str, Array]:
        """Return the arrays of a version, checked against the digest that the coordinator signed.

        Args:
            training_session_id: Training session.
            version: None means the latest.

        Raises:
            CorruptModelError: The bytes do not match the digest.
        """
        session_id = self._session_id(training_session_id)
        model, checked = download_model(self._admin, session_id, version)
        return assemble(Manifest.from_proto(model.manifest), checked)

    def release(
        self, training_session_id: str, version: int, reason: str = ""
    ) -> training_pb2.GlobalModel:
        """Release a version, whatever the release gate says."""
        request = pb.ReleaseGlobalModelRequest(
            training_session_id=self._session_id(training_session_id),
            version=version,
            reason=reason,
        )
        model: training_pb2.GlobalModel = self._call("ReleaseGlobalModel", request).global_model
        return model

    def rollback(
        self, training_session_id: str, version: int, reason: str = ""
    ) -> training_pb2.GlobalModel:
        """Make an earlier version the base of the next round; return the version that restores it."""
        request = pb.RollbackGlobalModelRequest(
            training_session_id=self._session_id(training_session_id),
            version=version,
            reason=reason,
        )
        model: training_pb2.GlobalModel = self._call("RollbackGlobalModel", request).global_model
        return model

    def create_query(
        self, name: str, question: Question, protection: Protection, *, request_id: str = ""
    ) -> training_pb2.TrainingSession:
        """Ask devices for a statistic of their data; `wait` and then `query_result` return the answer.

        Args:
            name: 1 to 200 characters.
            question: What is asked.
            protection: How those who answer are protected.
            request_id: Idempotency key; empty means one of this call.

        Raises:
            InvalidRequestError: The query is refused.
        """
        return create_query(self._admin, name, query_config(question, protection), request_id)

    def queries(self) -> list[training_pb2.TrainingSession]:
        """Return all queries, the latest first."""
        return [item for item in self.sessions() if item.config.HasField("analytics")]

    def query_result(self, query: str) -> QueryResult:
        """Return the result of a query, checked against the digest that the coordinator signed.

        Args:
            query: Id, beginning of the id, or name.

        Raises:
            InvalidRequestError: It is a training session that trains a model.
            FailedPreconditionError: There is no result yet.
            CorruptModelError: The bytes do not match the digest.
        """
        return read_result(self._admin, self._session_id(query))

    def refine_query(
        self,
        query: str,
        name: str,
        quantile: float,
        *,
        epsilon: float,
        delta: float = 0.0,
        bins: int = 0,
        request_id: str = "",
    ) -> training_pb2.TrainingSession:
        """Ask for a quantile again, with bins only where the result of a query says that it lies.

        Args:
            query: A query of kind histogram or quantiles with a result: id, beginning of the id, or name.
            name: Of the new query, 1 to 200 characters.
            quantile: 0 to 1.
            epsilon: Of the new result, which adds to what the earlier one has cost.
            delta: Of the new result; 0 means 1e-6.
            bins: Of the new query; 0 means 100.
            request_id: Idempotency key; empty means one of this call.

        Raises:
            InvalidRequestError: It is no such query, or the new one is refused.
            FailedPreconditionError: There is no result yet, or its noise leaves no narrower bounds.
        """
        return refine_query(
            self._admin,
            self._session_id(query),
            name,
            quantile,
            epsilon=epsilon,
            delta=delta,
            bins=bins,
            request_id=request_id,
        )

    def devices(self) -> list[device_pb2.Device]:
        """Return all devices."""
        return self._list("ListDevices", pb.ListDevicesRequest(), "devices")

    def device(self, device_id: str) -> device_pb2.Device:
        """Return a device."""
        return _device(
            self._call("GetDevice", pb.GetDeviceRequest(device_id=self._device_id(device_id)))
        )

    def rename(self, device_id: str, name: str, reason: str = "") -> device_pb2.Device:
        """Change the name of a device.

        Args:
            device_id: Device.
            name: 1 to 64 printable characters without spaces, that no other device has.
            reason: For the audit log.
        """
        request = pb.RenameDeviceRequest(
            device_id=self._device_id(device_id), name=name, reason=reason
        )
        return _device(self._call("RenameDevice", request))

    def suspend(self, device_id: str, reason: str) -> device_pb2.Device:
        """Suspend a device until it is reinstated."""
        request = pb.SuspendDeviceRequest(device_id=self._device_id(device_id), reason=reason)
        return _device(self._call("SuspendDevice", request))

    def reinstate(self, device_id: str, reason: str) -> device_pb2.Device:
        """End a suspension."""
        request = pb.ReinstateDeviceRequest(device_id=self._device_id(device_id), reason=reason)
        return _device(self._call("ReinstateDevice", request))

    def revoke(self, device_id: str, reason: str) -> device_pb2.Device:
        """Revoke a device permanently."""
        request = pb.RevokeDeviceRequest(device_id=self._device_id(device_id), reason=reason)
        return _device(self._call("RevokeDevice", request))

    def issue_enrollment_tokens(
        self, count: int = 1, *, label: str = "", groups: Sequence[str] = ()
    ) -> list[str]:
        """Return secrets, each of which enrolls one device within a day.

        Args:
            count: 1 to 1000.
            label: Becomes the name of the devices, from the second one on with a number.
            groups: Groups of the new devices.
        """
        request = pb.IssueEnrollmentTokensRequest(token_count=count, label=label, groups=groups)
        return [item.secret for item in self._call("IssueEnrollmentTokens", request).tokens]

    def _session_id(self, reference: str) -> str:
        return references.session_id(self._admin, reference)

    def _device_id(self, reference: str) -> str:
        return references.device_id(self._admin, reference)

    def _call(self, method: str, request: Any) -> Any:
        return self._admin.call(method, request)

    def _list(self, method: str, request: Any, field: str) -> list[Any]:
        return list(getattr(self._admin.collect(method, request, field, 0), field))


def _creation(name: str, settings: Settings) -> pb.CreateTrainingSessionRequest:
    """Return the request for a training session.

    Raises:
        InvalidRequestError: There is no such setting, or a value is not of its type.
    """
    config = training_pb2.TrainingConfig()
    try:
        if isinstance(settings, Path):
            read_file(settings, config)
        elif isinstance(settings, training_pb2.TrainingConfig):
            config = settings
        else:
            config = from_mapping(settings)
    except SettingError as error:
        raise InvalidRequestError(f"{error}; want {error.remedy}") from error
    return pb.CreateTrainingSessionRequest(name=name, config=config)


def _session(answer: Any) -> training_pb2.TrainingSession:
    session: training_pb2.TrainingSession = answer.training_session
    return session


def _device(answer: Any) -> device_pb2.Device:
    device: device_pb2.Device = answer.device
    return device
