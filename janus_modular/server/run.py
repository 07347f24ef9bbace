"""Serving a model over HTTP until a signal ends the process."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import uvicorn

from janus_modular.bundles import check_weights, find_bundle
from janus_modular.errors import ConfigError, require_extras
from janus_modular.foreign import printable, reason
from janus_modular.protocols import VariantRuntime
from janus_modular.server.application import create_app
from janus_modular.server.service import Service
from janus_modular.server.settings import ServerConfig, read_keys
from janus_modular.serving import Engine

if TYPE_CHECKING:
    from janus_modular.janus import Janus
    from janus_modular.server.traces import Traces

KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than those of proxies, which reuse them."""


def make_service(
    janus: Janus, config: ServerConfig, model: str, keys: Sequence[str] | None = None
) -> Service:
    """Start an engine for a model; ``model`` is its path, whose last part is its name unless one is set.

    ``keys``: those that open the API; None: those of the config. From now on, ``janus`` uses the
    samplers that the config names.

    Raises:
        BundleError: a weight file of the bundle differs from its hash.
        PluginError: there is no sampler of a name.
    """
    janus.use_samplers(text=config.text_sampler, image=config.image_sampler)
    if isinstance(janus.runtime, VariantRuntime) and (folder := find_bundle(model)):
        check_weights(folder, janus.runtime.variant)
    keys = read_keys(config) if keys is None else keys
    name = config.name or Path(model).name or model
    traces = _traces(name) if config.traces else None
    engine = Engine(janus, config.rows, queue_size=config.queue, journal=config.journal)
    return Service(janus, engine, config, name, keys, traces=traces)


def _traces(model: str) -> Traces:
    with require_extras("'traces'", "otel"):
        from janus_modular.server.traces import Traces

    return Traces(model)


def serve(service: Service, on_start: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; open requests may then take ``shutdown`` seconds.

    ``on_start`` is called with the server's address.

    Raises:
        ConfigError: the address is not free, or not this machine's.
    """
    with listen(service.config.host, service.config.port) as listener:
        log_requests(service.config)
        on_start(address_of(listener))
        make_server(service).run(sockets=[listener])


def make_server(service: Service) -> uvicorn.Server:
    """Return the server of a service, which closes its engine at the end."""
    options = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(service.config.shutdown),
        ws="none",
    )
    return uvicorn.Server(options)


@contextmanager
def serving_in_background(janus: Janus, config: ServerConfig, model: str) -> Iterator[str]:
    """Serve a model to this process, without keys, until the block ends; yield the server's address."""
    with listen(config.host, config.port) as listener:
        server = make_server(make_service(janus, config, model, keys=()))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]}, name="janus-server")
        thread.start()
        try:
            yield address_of(listener)
        finally:
            server.should_exit = True
            thread.join()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address is not free, or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {printable(host)}, port {port}: {reason(error)}. Choose another host or port"
            " (port=0: any that is free)."
        ) from error


def address_of(listener: socket.socket) -> str:
    """Return the address of a server, as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def log_requests(config: ServerConfig) -> None:
    """Write the log of requests to stderr, if the config has one."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("janus_modular.requests")
    requests.handlers, requests.propagate = [handler], False
    requests.setLevel(logging.INFO if config.log == "json" else logging.CRITICAL)
