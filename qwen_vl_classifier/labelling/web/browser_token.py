"""Let in only the browser of whoever started the program: others on this machine can reach its address too.

The address that the program prints holds a random token. A browser that opens it gets the token as a cookie, which no
script can read and no other site's page can send, and goes on to the address without it, so that the token stays in no
bookmark. The cookie is named by the port: browsers send one site's cookies to all its ports.
"""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_vl_classifier.serving.http.problems import ProblemResponse

_TOKEN_BYTES = 24

# Not a redirect: after a link on another site's page, or in a file, browsers would follow it without the new cookie.
_ENTER = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=/">'
    '<title>Label</title><p><a href="/">Go on to the page</a></p></html>'
)
_REFUSED = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>Open the printed address</title><h1>Open the printed address</h1><p>This page is only for whoever started "
    "<code>qwen-vl-classifier label</code>. Open the address that it printed in the terminal. It begins with this "
    "page's address and ends with a token. Each start of the command prints a new one.</p></html>"
)
_DETAIL = "no valid token; open the address that the command printed in the terminal"


class BrowserToken:
    """A random token, for the address to print and for the cookie.

    Args:
        port: Where the server listens.
    """

    def __init__(self, port: int) -> None:
        self._token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._once = ""
        self._cookie = f"qwen-vl-classifier-label-{port}"
        self._page = f"http://127.0.0.1:{port}/"
        self.url = f"{self._page}?token={self._token}"
        """The address to open."""

    def url_for_once(self) -> str:
        """Return an address that can be opened once: others on this machine see with which one a browser starts."""
        self._once = secrets.token_urlsafe(_TOKEN_BYTES)
        return f"{self._page}?token={self._once}"

    @property
    def set_cookie(self) -> str:
        """The header by which a browser keeps the token until it is closed."""
        return f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/"

    def is_in_address(self, query: bytes) -> bool:
        """Tell whether the query of an address holds the token, or one that can be used once and now has been."""
        try:
            given = parse_qs(query.decode("ascii"), max_num_fields=8).get("token", [])
        except ValueError:
            return False
        if len(given) != 1:
            return False
        if self._once and hmac.compare_digest(given[0].encode(), self._once.encode()):
            self._once = ""
            return True
        return self._is_same(given[0])

    def is_in_cookies(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Tell whether the headers of a request hold the cookie."""
        for name, value in headers:
            if name == b"cookie":
                try:
                    cookies = SimpleCookie(value.decode("latin-1"))
                except CookieError:
                    continue
                if self._cookie in cookies and self._is_same(cookies[self._cookie].value):
                    return True
        return False

    def _is_same(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


class TokenCheck:
    """Refuse requests without the cookie, and give it to a browser that opens the printed address.

    Args:
        app: What is behind the check.
        token: The token.
    """

    def __init__(self, app: ASGIApp, *, token: BrowserToken) -> None:
        self.app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401; answer the printed address with the cookie."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = self._answer(scope)
        await (answer or self.app)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        is_page = scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        if is_page and self._token.is_in_address(scope["query_string"]):
            return HTMLResponse(_ENTER, headers={"set-cookie": self._token.set_cookie})
        if self._token.is_in_cookies(scope["headers"]):
            return None
        if is_page:
            return HTMLResponse(_REFUSED, status_code=401)
        return ProblemResponse(401, "invalid_token", _DETAIL)
