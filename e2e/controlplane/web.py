"""One HTTP GET, without proxies: everything we ask is on loopback."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request


def get(url: str, *, context: ssl.SSLContext | None = None, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body, whatever the status. Status 0 when nobody answers (yet)."""
    return request("GET", url, context=context, timeout_s=timeout_s)


def request(
    method: str, url: str, *, context: ssl.SSLContext | None = None, timeout_s: float = 5.0
) -> tuple[int, bytes]:
    """As ``get``, with any method and no body."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if context is not None:
        handlers.append(urllib.request.HTTPSHandler(context=context))
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(urllib.request.Request(url, method=method), timeout=timeout_s) as answer:
            return int(answer.status), bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except (urllib.error.URLError, OSError):
        return 0, b""
