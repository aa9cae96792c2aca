"""The dashboard: read-only web pages for administrators, beside the gRPC server; an optional extra.

It reads only through the use cases. `app.PAGES` lists for every page the methods of the admin service that the
visitor's roles must allow. Its libraries are imported only if the setting `dashboard` is set.
"""

import os
import threading
from typing import TYPE_CHECKING

from qflare_server.config import WORKER_VARIABLE, ConfigError, ServerConfig
from qflare_server.use_cases import UseCases

if TYPE_CHECKING:
    from qflare_server.serving.http.server import HttpServer


def open_dashboard(
    config: ServerConfig, use_cases: UseCases, draining: threading.Event
) -> "HttpServer | None":
    """Return the dashboard's server, bound but not yet serving; None if the dashboard is disabled.

    Logins are kept in the memory of one process, so only the first of several workers serves the dashboard.

    Raises:
        ConfigError: The extra is not installed, the address cannot be bound or the TLS files cannot be read.
    """
    if not config.dashboard or os.environ.get(WORKER_VARIABLE, "0") != "0":
        return None
    try:
        from qflare_server.serving.dashboard.app import Site  # noqa: PLC0415  # an extra
        from qflare_server.serving.http.connections import Bounds  # noqa: PLC0415
        from qflare_server.serving.http.server import HttpServer  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "QFLARE_DASHBOARD: pip install 'qflare[dashboard]'",
            remedy="pip install 'qflare[dashboard]'",
        ) from error
    return HttpServer(
        config,
        Site(config, use_cases, draining),
        setting="QFLARE_DASHBOARD",
        address=config.dashboard_address,
        has_tls=config.dashboard_has_tls,
        # a proxy is the peer of all visitors
        bounds=Bounds(
            max_of_peer=Bounds.max_count if config.dashboard_behind_proxy else Bounds.max_of_peer
        ),
    )
