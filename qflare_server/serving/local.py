"""A coordinator inside a Python process: notebooks, examples and tests.

    from qflare_server.serving.local import LocalCoordinator

    with LocalCoordinator("qflare-data") as coordinator:
        print(coordinator.address, coordinator.token)

It is the coordinator of `qflare-server serve`, on its own threads: devices and administrators reach it by gRPC.
"""

from pathlib import Path
from typing import Any, Self

from qflare.v1 import security_pb2
from qflare_server.config import ServerConfig
from qflare_server.keys import ensure_initialized
from qflare_server.keys.setup import bootstrap_bundle
from qflare_server.serving.coordinator import Coordinator
from qflare_server.storage.repository.audit import Caller
from qflare_server.use_cases.access.roles import Role

NAME = "local coordinator"


class LocalCoordinator:
    """A coordinator that serves while the context is open.

    Args:
        data_dir: Folder of database and keys; created if it does not exist, and continued if it does.
        listen: Address; port 0 takes a free one.
        **settings: Further settings by the names of `docs/operations.md` in lower case, such as `database_url`.

    Raises:
        ConfigError: A setting is unknown or contradicts another.
        KeyStoreError: The keys cannot be written or read.
        SchemaError: The database has another schema.
        OSError: The address cannot be bound.
    """

    def __init__(
        self, data_dir: str | Path, *, listen: str = "127.0.0.1:0", **settings: Any
    ) -> None:
        config = ServerConfig(data_dir=Path(data_dir), listen=listen, **settings).checked()
        ensure_initialized(config)
        self._coordinator = Coordinator(config)
        self._coordinator.start()
        self.address = self._coordinator.address
        """Address for devices and administrators, host:port."""
        tokens = self._coordinator.use_cases.tokens
        issued = tokens.issue_admin(Caller(), NAME, [Role.ADMIN, Role.AUDITOR])
        self.token = issued.secret
        """Admin token with every right; a secret, revoked when the context is closed."""
        self._token_id = issued.token.id

    def bundle(self, label: str = "") -> security_pb2.BootstrapBundle:
        """Return what one device needs to enroll: address, root key ids and a one-time token; a secret."""
        issued = self._coordinator.use_cases.tokens.issue_enrollment(Caller(), label=label)[0]
        parts = self._coordinator.parts
        return bootstrap_bundle(
            parts.keys.trust,
            self.address,
            enrollment_token=issued.secret,
            helper_key_ids=parts.helper_key_ids,
        )

    def __enter__(self) -> Self:
        """Return this coordinator."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving."""
        self.close()

    def close(self) -> None:
        """Stop: running calls end within the drain time, and the pass under way is finished."""
        self._coordinator.use_cases.tokens.revoke(Caller(), self._token_id, "closed")
        self._coordinator.stop(grace_s=1.0)
