"""The dashboard's ASGI application: routes, authorization and login.

A page requires a login whose token may call every method that `PAGES` lists for it, according to the table in
`use_cases.access.roles`. The token is sent once, in the body of a form; afterwards a cookie identifies the login.
Scripts cannot read the cookie, and other sites cannot send it.
"""

import ipaddress
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qs

from anyio import CapacityLimiter, to_thread
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

import qflare
from qflare.terminal import printable_lines
from qflare_server import errors
from qflare_server.config import ServerConfig
from qflare_server.serving.dashboard import formatting
from qflare_server.serving.dashboard.cache import DashboardCache
from qflare_server.serving.dashboard.middleware import SecurityHeaders
from qflare_server.serving.dashboard.page_context import PageContext
from qflare_server.serving.dashboard.pages import (
    audit,
    comparison,
    devices,
    lineage,
    overview,
    queries,
    session,
    system,
    training,
)
from qflare_server.serving.http.hosts import KnownHosts, certificate_names
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.access.authentication import MAX_TOKEN_CHARACTERS, Principal

READERS: Final = 4
"""Threads that build pages; bounds the database connections used for all visitors together."""
MAX_FORM_BYTES: Final = 4096
DIALECTS: Final = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
ENTER: Final = "/login"

STATUS: Final[dict[type[errors.QflareError], HTTPStatus]] = {
    errors.InvalidRequestError: HTTPStatus.BAD_REQUEST,
    errors.UnauthenticatedError: HTTPStatus.UNAUTHORIZED,
    errors.PermissionDeniedError: HTTPStatus.FORBIDDEN,
    errors.NotFoundError: HTTPStatus.NOT_FOUND,
    errors.TooManyRequestsError: HTTPStatus.TOO_MANY_REQUESTS,
    errors.StoreUnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.IdentityProviderUnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
}


@dataclass(frozen=True)
class Page:
    """A page; its visitor must be allowed to call `methods` of the admin service, most specific first."""

    path: str
    template: str
    section: str
    methods: tuple[str, ...]
    build: Callable[[PageContext], Mapping[str, Any]]


PAGES: Final = (
    Page(
        "/",
        "overview.html",
        "Overview",
        ("GetCoordinatorStatus", "ListTrainingSessions", "GetTrainingSession", "ListMetrics"),
        overview.build,
    ),
    Page("/sessions", "sessions.html", "Training", ("ListTrainingSessions",), training.build_list),
    Page(
        "/sessions/{session_id}",
        "session.html",
        "Training",
        (
            "GetTrainingSession",
            "ListMetrics",
            "ListRounds",
            "ListGlobalModels",
            "DownloadGlobalModel",
        ),
        session.build,
    ),
    Page(
        "/sessions/{session_id}/versions",
        "versions.html",
        "Training",
        ("ListGlobalModels",),
        lineage.build_list,
    ),
    Page(
        "/sessions/{session_id}/versions/{number}",
        "version.html",
        "Training",
        ("DescribeGlobalModel", "ListUpdates"),
        lineage.build_version,
    ),
    Page(
        "/sessions/{session_id}/rounds/{number}",
        "round.html",
        "Training",
        ("ListUpdates", "ListRounds"),
        training.build_round,
    ),
    Page("/queries", "queries.html", "Queries", ("ListTrainingSessions",), queries.build_list),
    Page(
        "/compare",
        "comparison.html",
        "Training",
        ("GetTrainingSession", "ListMetrics"),
        comparison.build,
    ),
    Page("/devices", "devices.html", "Devices", ("ListDevices",), devices.build_list),
    Page("/device", "device.html", "Devices", ("GetDevice",), devices.build_device),
    Page("/audit", "audit.html", "Audit", ("ListAuditEntries",), audit.build),
    Page("/system", "system.html", "System", ("GetCoordinatorStatus",), system.build),
)
SECTIONS: Final = (
    ("/", "Overview"),
    ("/sessions", "Training"),
    ("/queries", "Queries"),
    ("/devices", "Devices"),
    ("/audit", "Audit"),
    ("/system", "System"),
)
_METHODS: Final = {page.path: page.methods for page in PAGES}


class Site:
    """The dashboard as an ASGI application.

    Args:
        config: `dashboard` and its settings.
        use_cases: Use cases that provide the data.
        draining: Set when the coordinator is draining.
    """

    def __init__(
        self, config: ServerConfig, use_cases: UseCases, draining: threading.Event
    ) -> None:
        self._config = config
        self._use_cases = use_cases
        self._draining = draining
        self._secure = config.dashboard_has_tls or config.dashboard_behind_proxy
        self._cookie = "__Host-qflare" if self._secure else "qflare"
        self._limiter = CapacityLimiter(READERS)
        self._recent = DashboardCache(use_cases)
        self._templates = _templates()
        self._templates.globals["has_provider"] = use_cases.oidc is not None
        names = [config.dashboard_address[0], *config.dashboard_hosts.split(",")]
        if config.dashboard_has_tls:
            names += certificate_names(config.tls_certificate_file)
        app = KnownHosts(self._build(), names, "QFLARE_DASHBOARD_HOSTS")
        self._app = SecurityHeaders(app, secure=self._secure)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        await self._app(scope, receive, send)

    def _build(self) -> ASGIApp:
        static = StaticFiles(packages=[("qflare_server.serving.dashboard", "static")])
        return Starlette(
            routes=[
                Mount("/static", static),
                Route(ENTER, self._login_form, methods=["GET"]),
                Route(ENTER, self._log_in, methods=["POST"]),
                Route("/logout", self._log_out, methods=["POST"]),
                *self._provider_routes(),
                *(Route(page.path, self._endpoint(page), methods=["GET"]) for page in PAGES),
            ],
            exception_handlers={
                errors.UnauthenticatedError: self._to_login,
                errors.QflareError: self._refused,
                HTTPException: self._refused,
                Exception: self._failed,
            },
        )

    def _provider_routes(self) -> list[Route]:
        """Return the routes of log-ins with an identity provider; none without one."""
        if self._use_cases.oidc is None:
            return []
        from qflare_server.serving.dashboard.provider_login import ProviderLogin  # noqa: PLC0415  # an extra

        login = ProviderLogin(self._config, self._use_cases, self._plain, self._keep, self._peer)
        return login.routes()

    def _endpoint(self, page: Page) -> Callable[[Request], Any]:
        async def show(request: Request) -> Response:
            return await to_thread.run_sync(self._show, page, request, limiter=self._limiter)

        return show

    def _show(self, page: Page, request: Request) -> Response:
        principal = self._admit(request, page.methods)
        visit = PageContext(
            use_cases=self._use_cases,
            recent=self._recent,
            principal=principal,
            path=request.path_params,
            query=request.query_params,
            at=self._use_cases.overview.now(),
            draining=self._draining.is_set(),
        )
        return self._page(page.template, visit, section=page.section, **page.build(visit))

    def _admit(self, request: Request, methods: tuple[str, ...]) -> Principal:
        """Return the login's principal if it may call all methods of a page; checked for every request."""
        secret, login = request.cookies.get(self._cookie, ""), self._use_cases.dashboard_login
        first, *more = [login.admit(secret, method) for method in methods]
        assert all(principal == first for principal in more)
        return first

    def _page(self, template: str, visit: PageContext, *, section: str, **values: Any) -> Response:
        sections = [
            (path, name)
            for path, name in SECTIONS
            if all(visit.may(method) for method in _METHODS[path])
        ]
        text = self._templates.get_template(template).render(
            section=section, sections=sections, visit=visit, **values
        )
        return HTMLResponse(text)

    def _plain(self, template: str, answer: int, /, **values: Any) -> Response:
        text = self._templates.get_template(template).render(**values)
        return HTMLResponse(text, status_code=answer)

    async def _login_form(self, request: Request) -> Response:
        if self._cookie not in request.cookies:
            return self._plain("login.html", HTTPStatus.OK, problem="", note="")
        try:
            await to_thread.run_sync(self._admit, request, PAGES[0].methods, limiter=self._limiter)
        except errors.UnauthenticatedError:
            note = "Your log-in is over. Log in again."
            response = self._plain("login.html", HTTPStatus.OK, problem="", note=note)
            self._forget(response)
            return response
        return RedirectResponse("/", HTTPStatus.SEE_OTHER)

    async def _log_in(self, request: Request) -> Response:
        _require_same_origin(request)
        token = await _token(request)
        try:
            secret = await to_thread.run_sync(
                self._use_cases.dashboard_login.log_in,
                token,
                self._peer(request),
                limiter=self._limiter,
            )
        except errors.TooManyRequestsError as error:
            wait_s = max(1, round(error.retry_after_s))
            problem = f"Too many attempts. Wait {wait_s} s and try again."
            response = self._plain(
                "login.html", HTTPStatus.TOO_MANY_REQUESTS, problem=problem, note=""
            )
            response.headers["Retry-After"] = str(wait_s)
            return response
        except (errors.UnauthenticatedError, errors.PermissionDeniedError):
            problem = "This token does not open the dashboard."
            return self._plain("login.html", HTTPStatus.UNAUTHORIZED, problem=problem, note="")
        response = RedirectResponse("/", HTTPStatus.SEE_OTHER)
        self._keep(response, secret)
        return response

    def _keep(self, response: Response, secret: str) -> None:
        """Let the browser keep the secret of a login."""
        response.set_cookie(
            self._cookie,
            secret,
            max_age=int(self._config.dashboard_login_s),
            secure=self._secure,
            httponly=True,
            samesite="strict",
        )

    async def _log_out(self, request: Request) -> Response:
        _require_same_origin(request)
        secret = request.cookies.get(self._cookie, "")
        await to_thread.run_sync(
            self._use_cases.dashboard_login.log_out,
            secret,
            self._peer(request),
            limiter=self._limiter,
        )
        response = RedirectResponse(ENTER, HTTPStatus.SEE_OTHER)
        self._forget(response)
        return response

    def _forget(self, response: Response) -> None:
        response.delete_cookie(self._cookie, secure=self._secure, httponly=True, samesite="strict")

    def _peer(self, request: Request) -> str:
        """Return the browser's address; behind a proxy, the last one of the header, which the proxy itself has added.

        A proxy may add it as a header line of its own, after those that the browser made up.
        """
        if self._config.dashboard_behind_proxy:
            lines = request.headers.getlist("x-forwarded-for")
            address = _address(",".join(lines).rpartition(",")[2])
            if address:
                return address
        return request.client.host if request.client is not None else ""

    async def _to_login(self, _request: Request, _error: Exception) -> Response:
        return RedirectResponse(ENTER, HTTPStatus.SEE_OTHER)

    async def _refused(self, _request: Request, error: Exception) -> Response:
        """Return the error text for the visitor; messages of domain errors are safe to show."""
        if isinstance(error, HTTPException):
            return self._error(HTTPStatus(error.status_code), "")
        return self._error(_status(error), str(error))

    async def _failed(self, _request: Request, _error: Exception) -> Response:
        return self._error(
            HTTPStatus.INTERNAL_SERVER_ERROR, "The log of the coordinator says more."
        )

    def _error(self, code: HTTPStatus, text: str) -> Response:
        return self._plain("error.html", code, code=code, text=text)


def _status(error: Exception) -> HTTPStatus:
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return HTTPStatus.INTERNAL_SERVER_ERROR


def _address(text: str) -> str:
    """Return an IP address that may have a port after it, as IPv6 only in brackets; empty if the text is none."""
    text = text.strip()
    bracketed = re.fullmatch(r"\[([^]]*)\](?::\d+)?", text)
    host = bracketed[1] if bracketed else text.partition(":")[0] if text.count(":") == 1 else text
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return ""


async def _token(request: Request) -> str:
    """Return the token of a form; empty if there is none.

    Raises:
        HTTPException: The form is too large or has too many fields.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    try:
        fields = parse_qs(body.decode("ascii", "replace"), max_num_fields=4)
    except ValueError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST) from error
    values = fields.get("token", [""])
    return values[0].strip()[: MAX_TOKEN_CHARACTERS + 1]


def _require_same_origin(request: Request) -> None:
    """Refuse a cross-site form, by the headers with which browsers state its origin.

    Raises:
        HTTPException: The form is from another site.
    """
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    foreign = origin is not None and origin.partition("://")[2] != request.headers.get("host")
    if site != "same-origin" or foreign:
        raise HTTPException(HTTPStatus.FORBIDDEN)


def _shown(value: object) -> object:
    """Return a text in printable characters: control and bidirectional ones would make a page say something else."""
    is_plain = isinstance(value, str) and not hasattr(value, "__html__")
    return printable_lines(value) if is_plain else value


def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("qflare_server.serving.dashboard"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(version=qflare.__version__)
    environment.filters.update(
        dialect=lambda name: DIALECTS.get(name, name),
        duration=formatting.duration,
        size=formatting.size,
        number=formatting.number,
        share=formatting.share,
        measure=formatting.measure,
        metric=formatting.metric,
        has=formatting.has,
        short=formatting.short,
    )
    return environment
