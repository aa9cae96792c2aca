"""Authenticated, retried and resumed calls.

`Calls` combines a `Transport` (one attempt), a `RetryPolicy` (when to retry) and the credentials of the device (which
log in when a token is needed). A call that the coordinator refuses as unauthenticated is retried once with a new login,
and once more after each progress of a transfer.

It does not interpret messages.
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
    """Source of the metadata of authenticated calls."""

    def metadata(self, method: str, first_message: Message) -> Metadata:
        """Return the metadata for one attempt; obtains a token if there is none.

        Args:
            method: Full name of the method, such as /qflare.v1.CoordinatorService/GetTask.
            first_message: The request, or the first message of a stream of requests.
        """

    def refused(self, metadata: Metadata) -> None:
        """Discard the token in `metadata`, which the coordinator has refused."""


class _Anonymous:
    """Credentials of an unauthenticated caller."""

    def metadata(self, method: str, first_message: Message) -> Metadata:
        del method, first_message
        return ()

    def refused(self, metadata: Metadata) -> None:
        del metadata


class Calls:
    """Calls of a device, with retries and credentials. Thread-safe.

    Args:
        transport: Makes the attempts.
        policy: Retry policy.
        credentials: Credentials of this device; None for unauthenticated calls.
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
        """Deadline and cancellation of the calls."""
        return self.transport.lifetime

    def close(self) -> None:
        """End all waits and close the channel."""
        self.transport.close()

    def authenticated(self, credentials: Credentials) -> "Calls":
        """Return calls over the same channel, with credentials."""
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
            method: Method of the transport's stub.
            request: The request.
            timeout_s: Deadline of each attempt, in seconds; None means the transport's.

        Raises:
            QflareClientError: The error of the last attempt.
        """
        return self.repeat(
            lambda attempts: self.transport.unary(
                method, request, metadata=attempts.metadata(request), timeout_s=timeout_s
            )
        )

    def repeat(self, attempt: "Callable[[Attempts], R]") -> R:
        """Return the result of `attempt`, retrying it after retryable errors.

        Args:
            attempt: One complete attempt; gets its metadata from its argument, and reports progress to it.

        Raises:
            QflareClientError: The error of the last attempt.
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
            method: Method of the transport's stub.
            next_request: Returns the request for the remaining messages; called for each attempt.
            is_progress: Whether a consumed message makes the next request smaller.
            timeout_s: Deadline of each attempt, in seconds; None means the transport's.

        Raises:
            QflareClientError: While iterating: the error of the last attempt.
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

    A refused token is replaced by a new login once, and once more after each progress: a transfer may outlive any
    number of tokens, but a login that does not help must not be repeated forever.

    Attributes:
        patience: Retry budget of this call.

    Args:
        credentials: Credentials of this device.
        patience: Retry budget of this call.
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
            QflareClientError: No token could be obtained.
        """
        self._used = ()
        self._used = self._credentials.metadata(method_of(first_message), first_message)
        return self._used

    def progressed(self) -> None:
        """Reset the retry budget: data was transferred that the next attempt does not repeat."""
        self.patience.progressed()
        self._logged_in_again = False

    def recover(self, error: QflareClientError) -> None:
        """Prepare the next attempt, after one that raised `error`.

        Raises:
            QflareClientError: `error`, if there is no further attempt.
        """
        if isinstance(error, UnavailableError):
            self.patience.wait(error)
        elif self._logged_in_again or not self._used:
            raise error  # a new token did not help, or the login itself was refused
        else:
            self._logged_in_again = True
            self._credentials.refused(self._used)


def method_of(request: Message) -> str:
    """Return the full name of the method that a request belongs to.

    Every method has its own request type, named after it; the linter of the protos enforces this.
    """
    return _SERVICE + request.DESCRIPTOR.name.removesuffix("Request")
