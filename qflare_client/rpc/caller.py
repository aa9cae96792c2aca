"""Calls as the rest of the SDK makes them: authenticated, repeated, resumed.

`Calls` joins a `Transport` (one attempt), a `RetryPolicy` (when to make another) and the credentials of
the device (login is invisible: a token is obtained when one is needed). A call that the coordinator
refuses as unauthenticated is made once more with a fresh login, and once more after each progress of a transfer.

What it does not do: know what the messages mean.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from qflare_client.errors import AuthenticationError, QflareClientError, UnavailableError
from qflare_client.rpc.lifetime import Lifetime
from qflare_client.rpc.retry import Patience, RetryPolicy
from qflare_client.rpc.transport import Metadata, Transport

Q = TypeVar("Q", bound=Message)
R = TypeVar("R")

_SERVICE = "/qflare.v1.CoordinatorService/"


class Credentials(Protocol):
    """Where the metadata of authenticated calls comes from."""

    def metadata(self, method: str, first_message: Message) -> Metadata:
        """Return the metadata for one attempt; obtains a token when there is none.

        Args:
            method: Full name of the method, such as /qflare.v1.CoordinatorService/GetTask.
            first_message: The request, or the first message of a stream of requests.
        """

    def refused(self, metadata: Metadata) -> None:
        """Forget the token in `metadata`, which the coordinator has refused."""


class _Anonymous:
    """Credentials of a caller that has none yet."""

    def metadata(self, method: str, first_message: Message) -> Metadata:
        del method, first_message
        return ()

    def refused(self, metadata: Metadata) -> None:
        del metadata


class Calls:
    """Makes calls. Thread-safe.

    Args:
        transport: Makes the attempts.
        policy: When an attempt is repeated.
        credentials: Of this device; None for calls that need none.
    """

    def __init__(
        self,
        transport: Transport,
        policy: RetryPolicy,
        credentials: Credentials | None = None,
    ) -> None:
        self.transport = transport
        self._policy = policy
        self._credentials = credentials or _Anonymous()

    @property
    def lifetime(self) -> Lifetime:
        """Until when calls go on."""
        return self.transport.lifetime

    def close(self) -> None:
        """End all waits and close the channel."""
        self.transport.close()

    def authenticated(self, credentials: Credentials) -> "Calls":
        """Return calls over the same channel that carry credentials."""
        return Calls(self.transport, self._policy, credentials)

    def unary(
        self,
        method: "grpc.UnaryUnaryMultiCallable[Q, R]",
        request: Q,
        *,
        timeout_s: float | None = None,
    ) -> R:
        """Make a unary call.

        Args:
            method: Of the transport's stub.
            request: What to send.
            timeout_s: Deadline of each attempt, in seconds; None means the transport's.

        Raises:
            QflareClientError: What the last attempt raised.
        """
        return self.repeat(
            lambda attempts: self.transport.unary(
                method, request, metadata=attempts.metadata(request), timeout_s=timeout_s
            )
        )

    def repeat(self, attempt: "Callable[[Attempts], R]") -> R:
        """Return what `attempt` returns, making it again after errors that allow it.

        Args:
            attempt: One complete attempt; asks its argument for metadata, and tells it of progress.

        Raises:
            QflareClientError: What the last attempt raised.
        """
        patience = self.lifetime.patience(self._policy)
        attempts = Attempts(self._credentials, patience)
        with self.lifetime.sharing(patience):
            while True:
                try:
                    return attempt(attempts)
                except (UnavailableError, AuthenticationError) as error:
                    attempts.recover(error)

    def receive(
        self,
        method: "grpc.UnaryStreamMultiCallable[Q, R]",
        next_request: Callable[[], Q],
        *,
        is_progress: Callable[[R], bool] = lambda _: True,
        timeout_s: float | None = None,
    ) -> Iterator[R]:
        """Yield the messages of a server stream, across broken connections.

        Args:
            method: Of the transport's stub.
            next_request: Makes the request for what has not been received; called for each attempt.
            is_progress: Whether a message, once it has been consumed, makes the next request ask for less.
            timeout_s: Deadline of each attempt, in seconds; None means the transport's.

        Raises:
            QflareClientError: While iterating: what the last attempt raised.
        """
        attempts = Attempts(self._credentials, self.lifetime.patience(self._policy))
        while True:
            request = next_request()
            try:
                with self.lifetime.sharing(attempts.patience):
                    metadata = attempts.metadata(request)
                for response in self.transport.receive(
                    method, request, metadata=metadata, timeout_s=timeout_s
                ):
                    yield response
                    if is_progress(response):
                        attempts.progressed()
            except (UnavailableError, AuthenticationError) as error:
                attempts.recover(error)
            else:
                return


class Attempts:
    """The attempts of one call.

    A refused token is replaced by a fresh login once, and once more after each progress: a transfer may outlive any
    number of tokens, while a login that does not help is noticed.

    Attributes:
        patience: Of this call.

    Args:
        credentials: Of this device.
        patience: Of this call.
    """

    def __init__(self, credentials: Credentials, patience: Patience) -> None:
        self.patience = patience
        self._credentials = credentials
        self._used: Metadata = ()
        self._logged_in_again = False

    def metadata(self, first_message: Message) -> Metadata:
        """Return the metadata for the next attempt.

        Args:
            first_message: The request, or the first message of a stream of requests.

        Raises:
            QflareClientError: There is no token and none is to be had.
        """
        self._used = ()
        self._used = self._credentials.metadata(method_of(first_message), first_message)
        return self._used

    def progressed(self) -> None:
        """Start again: the coordinator has taken or given data that the next attempt need not repeat."""
        self.patience.progressed()
        self._logged_in_again = False

    def recover(self, error: QflareClientError) -> None:
        """Prepare the next attempt, after one that raised `error`.

        Raises:
            QflareClientError: `error`, when there is to be no further attempt.
        """
        if isinstance(error, UnavailableError):
            self.patience.wait(error)
        elif self._logged_in_again or not self._used:
            raise error  # a fresh token did not help, or it was the login itself that was refused
        else:
            self._logged_in_again = True
            self._credentials.refused(self._used)


def method_of(request: Message) -> str:
    """Return the full name of the method that a request belongs to.

    Every method has a request type of its own, named after it: the contract's linter holds that.
    """
    return _SERVICE + request.DESCRIPTOR.name.removesuffix("Request")
