"""Serving replicas of a model in a Ray cluster: the same application in each, behind Ray Serve's proxy."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event as Flag
from typing import Any

from fastapi import FastAPI

from janus_modular.errors import ConfigError, ServingError
from janus_modular.foreign import reason
from janus_modular.server.application import create_app
from janus_modular.server.run import listen, log_requests, make_service
from janus_modular.server.settings import RayConfig, ServerConfig
from janus_modular.serving import AnswerRequest, DrawRequest, Event

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers

import ray
from ray import serve

APPLICATION = "janus"
"""The name of the application in the cluster: ``ray.serve.get_app_handle("janus")``."""

STARTS = 3
"""How often Ray tries to start a replica before it gives the application up."""


class Replica:
    """A model and its engine in a process of the cluster."""

    def __init__(
        self, model: str, options: Mapping[str, Any], config: ServerConfig, keys: Sequence[str]
    ) -> None:
        """Load a model by the arguments of `janus_modular.Janus.from_pretrained`, and start its engine."""
        from janus_modular.janus import Janus

        log_requests(config)
        self.service = make_service(Janus.from_pretrained(model, **options), config, model, keys)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Ray calls this once in each replica."""
        return create_app(self.service)

    def check_health(self) -> None:
        """Raise an error if nothing is computed any more: Ray then starts another replica."""
        if not self.service.engine.is_alive:
            raise ServingError("the engine has stopped")

    async def submit(self, request: AnswerRequest | DrawRequest) -> AsyncIterator[Event]:
        """Yield the events of a request of another program in the cluster, the result last.

        ``handle.options(stream=True).submit.remote(DrawRequest("a seven"))``
        """
        job = await asyncio.to_thread(self.service.engine.submit, request)
        try:
            async for event in job:
                yield event
        finally:
            job.cancel()


def make_application(
    model: str, options: Mapping[str, Any], config: ServerConfig, keys: Sequence[str] = ()
) -> serve.Application:
    """Return the Ray Serve application of a model; deploy it with ``ray.serve.run``.

    A replica takes as many requests as its engine holds. More wait in the proxy, at most ``queue``, and are
    answered with 429 beyond. Replicas are added when each has more than ``ray.target`` requests, those that
    wait included.
    """
    settings = config.ray or RayConfig()
    deployment = serve.deployment(
        name="Replica",
        max_ongoing_requests=config.rows + config.queue,
        max_queued_requests=config.queue,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target or config.rows,
            "upscale_delay_s": settings.upscale_delay,
            "downscale_delay_s": settings.downscale_delay,
        },
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        graceful_shutdown_timeout_s=config.shutdown,
        max_constructor_retry_count=STARTS,
    )
    local = Path(model).expanduser()
    path = str(local.resolve()) if local.exists() else model  # replicas have folders of their own
    named = replace(config, name=config.name or Path(model).name or model)
    application: serve.Application = deployment(serve.ingress()(Replica)).bind(
        path, dict(options), named, list(keys)
    )
    return application


def serve_in_ray(
    model: str,
    options: Mapping[str, Any],
    config: ServerConfig,
    keys: Sequence[str],
    on_start: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM, in the cluster of ``ray.address``, or in one on this machine.

    Raises:
        ConfigError: the address is not free, a setting has no effect under Ray, or the cluster does not
            answer.
        ServingError: no replica starts.
    """
    if config.port == 0:
        raise ConfigError("port: 0; Ray's proxy takes no free port by itself. Name one, such as 8000.")
    if config.journal is not None:
        raise ConfigError(
            "journal: replicas cannot share one. Leave it out: a client that sends a request again with its"
            " x-request-id gets the same image from any replica."
        )
    listen(config.host, config.port).close()  # Ray's proxy would try again and again
    settings = config.ray or RayConfig()
    try:
        ray.init(address=settings.address, include_dashboard=False, logging_level="error")
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"ray.address: {settings.address}: {reason(error)}") from error
    stopped = Flag()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(
            http_options={"host": config.host, "port": config.port}, logging_config={"log_level": "WARNING"}
        )
        try:
            serve.run(make_application(model, options, config, keys), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise ServingError(f"no replica starts: {reason(error)}") from error
        on_start(f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{config.port}")
        stopped.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
