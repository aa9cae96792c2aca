"""Dashboard log-ins with an identity provider: the redirect to it, and the browser's return.

The session cookie is `SameSite=Strict`, so the browser does not send it along a redirect that began at the provider:
the return answers with a small page that leads to the overview.
"""

from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Final

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from qflare_server import errors
from qflare_server.config import ServerConfig
from qflare_server.use_cases import UseCases
from qflare_server.use_cases.access.oidc_login import OidcLogin

BEGIN: Final = "/login/oidc"
RETURN: Final = "/login/oidc/callback"
PENDING_S: Final = 600
REQUESTS: Final = 2
"""Requests to the provider at once; pages have threads of their own."""

PROBLEMS: Final[dict[type[errors.QflareError], tuple[HTTPStatus, str]]] = {
    errors.IdentityProviderUnavailableError: (
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The identity provider cannot be reached. An admin token opens the dashboard all the same.",
    ),
    errors.PermissionDeniedError: (
        HTTPStatus.FORBIDDEN,
        "Your account has no role on this coordinator.",
    ),
    errors.TooManyRequestsError: (
        HTTPStatus.TOO_MANY_REQUESTS,
        "Too many attempts. Wait a few seconds and try again.",
    ),
    errors.UnauthenticatedError: (
        HTTPStatus.UNAUTHORIZED,
        "The log-in with the identity provider failed or took too long. Try again.",
    ),
}


class ProviderLogin:
    """The two routes of a log-in.

    Args:
        config: The `oidc_*` and `dashboard*` settings.
        use_cases: With an identity provider.
        plain: Renders a page for visitors without a log-in.
        keep: Sets the session cookie.
        peer_of: Returns the address of a request's browser.
    """

    def __init__(
        self,
        config: ServerConfig,
        use_cases: UseCases,
        plain: Callable[..., Response],
        keep: Callable[[Response, str], None],
        peer_of: Callable[[Request], str],
    ) -> None:
        assert use_cases.oidc is not None
        self._config = config
        self._login = OidcLogin(
            use_cases.oidc.provider, use_cases.oidc.tokens, use_cases.dashboard_login
        )
        self._plain = plain
        self._keep = keep
        self._peer_of = peer_of
        self._secure = config.dashboard_has_tls or config.dashboard_behind_proxy
        self._cookie = "__Host-qflare-oidc" if self._secure else "qflare-oidc"
        self._limiter = CapacityLimiter(REQUESTS)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(BEGIN, self._begin, methods=["GET"]),
            Route(RETURN, self._finish, methods=["GET"]),
        ]

    async def _begin(self, request: Request) -> Response:
        work = partial(self._login.begin, self._config.oidc_client_id, self._return_to(request))
        try:
            url, pending = await to_thread.run_sync(work, limiter=self._limiter)
        except errors.QflareError as error:
            return self._problem(error)
        response = RedirectResponse(url, HTTPStatus.SEE_OTHER)
        response.set_cookie(
            self._cookie,
            pending.as_cookie(),
            max_age=PENDING_S,
            secure=self._secure,
            httponly=True,
            samesite="lax",
        )
        return response

    async def _finish(self, request: Request) -> Response:
        work = partial(
            self._login.finish,
            request.cookies.get(self._cookie, ""),
            dict(request.query_params),
            self._return_to(request),
            self._peer_of(request),
        )
        try:
            secret = await to_thread.run_sync(work, limiter=self._limiter)
        except errors.QflareError as error:
            response = self._problem(error)
        else:
            response = self._plain("welcome.html", HTTPStatus.OK)
            self._keep(response, secret)
        response.delete_cookie(self._cookie, secure=self._secure, httponly=True, samesite="lax")
        return response

    def _return_to(self, request: Request) -> str:
        """Return the address of `RETURN`, by the host name of the request, which `KnownHosts` has checked."""
        scheme = "https" if self._secure else "http"
        return f"{scheme}://{request.headers.get('host', '')}{RETURN}"

    def _problem(self, error: errors.QflareError) -> Response:
        for kind in type(error).__mro__:
            if kind in PROBLEMS:
                code, text = PROBLEMS[kind]
                return self._plain("login.html", code, problem=text, note="")
        raise error
