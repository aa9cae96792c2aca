"""TLS credentials of the gRPC server, reloaded when their files change."""

import logging

import grpc

from qflare_server.config import ServerConfig

logger = logging.getLogger(__name__)


def tls_credentials(config: ServerConfig) -> grpc.ServerCredentials:
    """Return credentials that reload their files after a change."""
    assert config.tls_certificate_file is not None
    assert config.tls_key_file is not None
    files = _CertificateFiles(config)
    return grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.changed,  # type: ignore[arg-type]  # None means no change, which the stub leaves out
        require_client_authentication=config.tls_client_ca_file is not None,
    )


class _CertificateFiles:
    """The TLS files of a server and their modification times."""

    def __init__(self, config: ServerConfig) -> None:
        files = (config.tls_certificate_file, config.tls_key_file, config.tls_client_ca_file)
        self._paths = [path for path in files if path is not None]
        self._stamp = self._look()

    def _look(self) -> list[int]:
        return [path.stat().st_mtime_ns for path in self._paths]

    def read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key, *client_ca = [path.read_bytes() for path in self._paths]
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate)], root_certificates=client_ca[0] if client_ca else None
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration if a file has changed; None keeps the current one."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return None
            fresh = self.read()
        except OSError:
            logger.exception(
                "certificate files could not be reloaded; keeping the current certificate"
            )
            return None
        self._stamp = stamp
        return fresh
