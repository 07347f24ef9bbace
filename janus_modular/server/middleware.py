"""What happens to every request before it is read: its log line, host, key and size."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from janus_modular.server.api_errors import ApiError
from janus_modular.server.service import REQUEST_ID, log_record
from janus_modular.server.settings import LimitsConfig

log = logging.getLogger("janus_modular.requests")

VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """Logs a line of JSON for each request: no headers, no query, nothing of the content."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; its answer has the header x-request-id, the request's own if it is valid."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if VALID_ID.fullmatch(sent_id) else uuid4().hex
        scope[REQUEST_ID] = request_id
        start, status, complete = time.monotonic(), 500, False

        async def send_logged(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, send_logged)
        finally:
            record = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.monotonic() - start, 4),
                "complete": complete,
                **{name: value for name, value in log_record(scope).items() if value is not None},
            }
            log.info("%s", json.dumps(record))


class Gate:
    """Refuses requests of unknown hosts, without a valid key, or with too large a body."""

    def __init__(
        self, app: ASGIApp, *, hosts: Sequence[str], keys: Sequence[str], limits: LimitsConfig
    ) -> None:
        self.app = app
        self._hosts = {host.lower() for host in hosts}
        self._keys = [_digest(key) for key in keys]
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            if scope["path"].startswith("/v1/"):
                self._check_key(headers)
            self._check_length(headers)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _check_host(self, headers: Headers) -> None:
        """Check the host by which the client calls the server: another is a web page's."""
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if "*" not in self._hosts and host not in self._hosts:
            raise ApiError(
                400,
                "the Host header names another machine; expected one of the server's hosts.",
                code="invalid_host",
            )

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        valid = [hmac.compare_digest(digest, known) for known in self._keys]  # all of them, in constant time
        if scheme.lower() != "bearer" or not any(valid):
            raise ApiError(
                401,
                "the API key is missing or wrong; expected the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._limits.body:
            raise ApiError(413, self._too_large, code="body_too_large")

    @property
    def _too_large(self) -> str:
        return f"the body is larger than the {self._limits.body:,} bytes that this server takes."

    def _limited(self, receive: Receive) -> Receive:
        """Return ``receive`` that raises an error on a body that is too large or too slow."""
        size, is_complete, end = 0, False, time.monotonic() + self._limits.body_time

        async def receive_limited() -> Message:
            nonlocal size, is_complete
            if is_complete:  # what comes now is the end of the connection
                return await receive()
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time.") from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self._limits.body:
                raise HTTPException(413, self._too_large)
            return message

        return receive_limited


def _digest(key: str) -> bytes:
    """Return a hash of a key: of equal length for all, so that comparing takes the same time."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
