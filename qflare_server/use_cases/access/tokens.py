"""Issue, list and revoke tokens. A secret appears only in the response that issues it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from sqlalchemy.orm import Session

from qflare_server.context import Context
from qflare_server.errors import (
    DeviceNotFoundError,
    InvalidRequestError,
    TokenNotFoundError,
)
from qflare_server.storage.paging import Page, PageRequest
from qflare_server.storage.records import UserToken
from qflare_server.storage.repository import audit, devices, tokens
from qflare_server.storage.repository.audit import Caller, Event
from qflare_server.storage.repository.idempotent_calls import run_once
from qflare_server.storage.tables import RiskLevel, TokenKind
from qflare_server.training.groups import checked_groups
from qflare_server.use_cases.access.authentication import mint_secret
from qflare_server.use_cases.access.roles import ADMINISTRATIVE

T = TypeVar("T")
MAX_TOKENS = 1000
MAX_LABEL = 200
MAX_LIFETIME_S = 10 * 366 * 86_400


@dataclass(frozen=True)
class IssuedToken:
    """A newly issued token; the only object that contains its secret."""

    token: UserToken
    secret: str

    def __repr__(self) -> str:
        """Show the token's id only."""
        return f"Issued({self.token.id})"


class Tokens:
    """Token use cases."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def issue_enrollment(
        self,
        caller: Caller,
        *,
        count: int = 1,
        label: str = "",
        lifetime_s: float | None = None,
        device_id: str = "",
        groups: Sequence[str] = (),
    ) -> Sequence[IssuedToken]:
        """Issue one-time enrollment tokens, optionally for groups; with a device id, to replace that device's keys.

        Raises:
            AlreadyExistsError: The call's request id has issued tokens; secrets are not kept.
            InvalidRequestError: The count, the label, the lifetime or a group is out of range, or groups are given for
                an enrolled device.
            DeviceNotFoundError: There is no such device.
        """
        if not 1 <= count <= MAX_TOKENS or (device_id and count != 1):
            raise InvalidRequestError(f"token_count: got {count}", field="token_count")
        life = self._context.config.enrollment_token_s if lifetime_s is None else lifetime_s
        if not 0 < life <= MAX_LIFETIME_S:
            raise InvalidRequestError(f"lifetime: got {life:g} s", field="lifetime")
        if len(label) > MAX_LABEL:
            raise InvalidRequestError("label: longer than 200 characters", field="label")
        wanted = checked_groups(groups, "groups")
        if device_id and wanted:
            raise InvalidRequestError("groups: the device keeps those that it has", field="groups")

        def work(session: Session) -> list[IssuedToken]:
            if device_id and devices.get_device(session, device_id) is None:
                raise DeviceNotFoundError
            return [
                self._issue(
                    session,
                    caller,
                    TokenKind.ENROLLMENT,
                    "qfe1",
                    label,
                    life,
                    device_id,
                    groups=wanted,
                )
                for _ in range(count)
            ]

        return self._once(caller, work)

    def issue_admin(
        self,
        caller: Caller,
        name: str,
        roles: Sequence[str],
        lifetime_s: float | None = None,
        hand_over: Callable[[str], None] = lambda _secret: None,
    ) -> IssuedToken:
        """Issue an admin token.

        Args:
            caller: For the audit log.
            name: Name of the holder, 1 to 200 printable characters.
            roles: Roles of the holder.
            lifetime_s: Lifetime in seconds; None means no expiry.
            hand_over: Called with the secret before the token is committed; a retry passes another secret.

        Raises:
            AlreadyExistsError: The call's request id has issued a token; secrets are not kept.
            InvalidRequestError: The name is invalid, a role is not administrative, or the lifetime is out of
                range.
        """
        if not 1 <= len(name) <= MAX_LABEL or not name.isprintable():
            raise InvalidRequestError("name: want 1 to 200 printable characters", field="name")
        if not roles or not set(roles) <= ADMINISTRATIVE:
            wanted = ", ".join(sorted(ADMINISTRATIVE))
            raise InvalidRequestError(f"roles: want some of {wanted}", field="roles")
        if lifetime_s is not None and not 0 < lifetime_s <= MAX_LIFETIME_S:
            raise InvalidRequestError(f"lifetime: got {lifetime_s:g} s", field="lifetime")

        def work(session: Session) -> IssuedToken:
            issued = self._issue(
                session, caller, TokenKind.ADMIN, "qfa1", name, lifetime_s, "", sorted(set(roles))
            )
            hand_over(issued.secret)
            return issued

        return self._once(caller, work)

    def _once(self, caller: Caller, work: Callable[[Session], T]) -> T:
        at = self._context.clock()
        return self._context.database.write(
            lambda session: run_once(session, caller, at, lambda: work(session))
        )

    def _issue(
        self,
        session: Session,
        caller: Caller,
        kind: TokenKind,
        prefix: str,
        subject: str,
        lifetime_s: float | None,
        device_id: str,
        roles: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> IssuedToken:
        at = self._context.clock()
        token_id, secret, digest = mint_secret(prefix)
        expires: datetime | None = (
            None if lifetime_s is None else at + timedelta(seconds=lifetime_s)
        )
        tokens.insert_token(
            session,
            token_id=token_id,
            token_hash=digest,
            kind=kind,
            subject=subject,
            at=at,
            expires_at=expires,
            device_id=device_id or None,
            roles=roles,
            device_groups=groups,
        )
        details = {"kind": kind.value, "roles": ",".join(roles)}
        if groups:
            details["groups"] = ",".join(groups)
        event = Event("token.issued", f"token:{token_id}", RiskLevel.MEDIUM, details)
        audit.record(session, caller, event, at)
        token = tokens.get_token(session, token_id)
        assert token is not None
        return IssuedToken(token, secret)

    def list(self, request: PageRequest, kind: str = "") -> Page[UserToken]:
        """Return tokens, newest first."""
        with self._context.database.read() as session:
            return tokens.list_tokens(session, request, kind)

    def revoke(self, caller: Caller, token_id: str, reason: str) -> UserToken:
        """Revoke a token, effective on its next call. Idempotent.

        Raises:
            TokenNotFoundError: There is no such token.
        """
        if len(reason) > MAX_LABEL:
            raise InvalidRequestError("reason: longer than 200 characters", field="reason")

        def work(session: Session) -> UserToken:
            if tokens.get_token(session, token_id) is None:
                raise TokenNotFoundError
            at = self._context.clock()
            if tokens.revoke(session, token_id, reason, at):
                event = Event(
                    "token.revoked", f"token:{token_id}", RiskLevel.HIGH, {"reason": reason}
                )
                audit.record(session, caller, event, at)
            token = tokens.get_token(session, token_id)
            assert token is not None
            return token

        return self._once(caller, work)
