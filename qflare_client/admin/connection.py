"""Calls of an administrator: authenticated, repeated while the coordinator is away, pages put together.

A call that changes something carries a request id, under which the coordinator makes it once however often it arrives.
Streams are sent once. Errors are those of `qflare_client.errors`.
"""

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

from qflare.v1 import admin_service_pb2_grpc
from qflare_client.admin.profile import Profile, ProfileError
from qflare_client.errors import UnavailableError
from qflare_client.rpc.retry import Patience, RetryPolicy
from qflare_client.rpc.tls import Tls
from qflare_client.rpc.transport import Transport

PAGE_SIZE = 1000
RETRY: Final = RetryPolicy(total_time_s=3.0)


class Admin:
    """One connection to a coordinator; a context manager.

    Args:
        profile: Address, TLS settings and token.
        timeout_s: Deadline of one call, in seconds.
        renew: Called before each call with the profile; returns it with a token that is still valid, such as
            `login.refreshed`. Its errors are raised by the call.

    Raises:
        ProfileError: The profile lacks an address or a token, or names an unreadable file.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        timeout_s: float = 30.0,
        renew: Callable[[Profile], Profile] | None = None,
    ) -> None:
        if not profile.address:
            raise ProfileError(
                "no address: run qflare-admin profile set, or give --address",
                remedy="qflare-admin --address HOST:PORT, or qflare-admin profile set --address HOST:PORT",
            )
        self._profile, self._renew = profile, renew
        self._held_metadata = _credentials(profile)
        self._transport = Transport(
            profile.address, tls=_tls(profile), insecure=profile.insecure, timeout_s=timeout_s
        )
        self._stub = admin_service_pb2_grpc.AdminServiceStub(self._transport.channel)

    def __enter__(self) -> Self:
        """Return this connection."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the channel."""
        self._transport.close()

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """The credentials of a call."""
        if self._renew is not None:
            profile = self._renew(self._profile)
            if profile.token != self._profile.token:
                self._profile, self._held_metadata = profile, _credentials(profile)
        return self._held_metadata

    def call(self, method: str, request: Any) -> Any:
        """Return the answer to a unary call; it is repeated for some seconds where the coordinator cannot be reached.

        Args:
            method: Name of the method.
            request: Its request; given a request id if it takes one and has none.

        Raises:
            QflareClientError: The call failed.
        """
        if "request_id" in request.DESCRIPTOR.fields_by_name and not request.request_id:
            request.request_id = uuid.uuid4().hex
        patience = Patience(RETRY, threading.Event())
        while True:
            try:
                return self._transport.unary(
                    getattr(self._stub, method), request, metadata=self._metadata
                )
            except UnavailableError as error:
                patience.wait(error)

    def send(self, method: str, requests: Iterator[Any]) -> Any:
        """Return the response to a client stream.

        Raises:
            QflareClientError: The call failed.
        """
        return self._transport.send(getattr(self._stub, method), requests, metadata=self._metadata)

    def receive(self, method: str, request: Any) -> Iterator[Any]:
        """Yield the messages of a server stream; closing the iterator ends the call.

        Raises:
            QflareClientError: While iterating: the call failed.
        """
        yield from self._transport.receive(
            getattr(self._stub, method), request, metadata=self._metadata
        )

    def collect(self, method: str, request: Any, field: str, limit: int) -> Any:
        """Return the entries of a list method, with all pages merged into one response.

        Args:
            method: A list method.
            request: Its request; the page fields are set here.
            field: Response field that holds the entries.
            limit: Maximum number of entries; 0 means all. If there are more, next_page_token is set.

        Raises:
            QflareClientError: The call failed.
        """
        whole: Any = None
        while True:
            missing = limit - len(getattr(whole, field)) if limit and whole else limit
            request.page_size = min(missing or PAGE_SIZE, PAGE_SIZE)
            page = self.call(method, request)
            if whole is None:
                whole = page
            else:
                getattr(whole, field).extend(getattr(page, field))
                whole.next_page_token = page.next_page_token
            request.page_token = page.next_page_token
            if not page.next_page_token or (limit and len(getattr(whole, field)) >= limit):
                return whole


def _credentials(profile: Profile) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {profile.secret()}"),)


def _tls(profile: Profile) -> Tls | None:
    """Return the TLS settings; None lets the address decide."""
    files = [profile.ca_file, profile.certificate_file, profile.key_file]
    if not any(files) and not profile.server_name:
        return None
    ca, chain, key = (Path(name) if name else None for name in files)
    try:
        return Tls.from_files(ca, chain, key, profile.server_name)
    except OSError as error:
        raise ProfileError(
            f"{error.filename}: {error.strerror}", remedy="check the path of the TLS file"
        ) from error
