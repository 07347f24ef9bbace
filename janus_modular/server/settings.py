"""The configuration of a server. A YAML file in configs/serve is an instance of `ServerConfig`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from math import isfinite
from pathlib import Path
from typing import Literal

from janus_modular.errors import ConfigError
from janus_modular.foreign import printable, read_text

KEYS_VARIABLE = "JANUS_API_KEYS"
"""The environment variable of API keys, separated by commas or white space."""

MIN_KEY = 16
"""Characters of a key; shorter ones can be guessed."""

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]
"""What a program on this machine calls the server in the header Host."""


@dataclass
class LimitsConfig:
    """What one request may hold; more is refused before anything is computed."""

    body: int = 20_000_000  # bytes of a request
    body_time: float = 60.0  # seconds until all of it has arrived
    prompt: int = 100_000  # characters of all texts; the model's context limits tokens
    images: int = 8  # input images
    pixels: int = 16_777_216  # of an input image, checked before it is decoded
    n: int = 8  # answers, or drawn images

    def __post_init__(self) -> None:
        """Check that every limit lets something pass."""
        low = [name for name in ("body", "prompt", "pixels", "n") if getattr(self, name) < 1]
        errors = [f"{name}: {getattr(self, name)}; expected 1 at least" for name in low]
        if self.images < 0:
            errors.append(f"images: {self.images}; expected 0 or more")
        if not (isfinite(self.body_time) and self.body_time > 0):
            errors.append(f"body_time: {self.body_time}; expected a number of seconds above 0")
        if errors:
            raise ValueError("\n".join(errors))


@dataclass
class RayConfig:
    """Replicas in a Ray cluster; each is a process with the model and `ServerConfig.rows` rows."""

    address: str | None = None  # of a cluster that runs; null: RAY_ADDRESS, or one on this machine
    min_replicas: int = 1
    max_replicas: int = 1
    target: float | None = (
        None  # requests of a replica, running and waiting, above which one is added; null: rows
    )
    upscale_delay: float = 10.0  # seconds that more replicas are needed before they start
    downscale_delay: float = 300.0  # seconds that fewer are enough before the others end
    cpus: float = 1.0  # of a replica, by which Ray places it; torch has as many threads
    gpus: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        errors = []
        if self.min_replicas < 1:
            errors.append(f"min_replicas: {self.min_replicas}; expected 1 at least")
        if self.max_replicas < self.min_replicas:
            errors.append(
                f"max_replicas: {self.max_replicas}; expected at least min_replicas, {self.min_replicas}"
            )
        if self.target is not None and not (isfinite(self.target) and self.target > 0):
            errors.append(f"target: {self.target}; expected a number above 0, or null")
        for name in ("upscale_delay", "downscale_delay", "cpus", "gpus"):
            if not (isfinite(value := getattr(self, name)) and value >= 0):
                errors.append(f"{name}: {value}; expected a number from 0")
        if errors:
            raise ValueError("\n".join(errors))


@dataclass
class ServerConfig:
    """Where a server listens, what it computes at once, and what it refuses."""

    host: str = "127.0.0.1"  # 0.0.0.0: other machines too, which needs API keys
    port: int = 8000  # 0: any free port
    name: str | None = None  # of the model in requests and answers; null: the name of its folder
    hosts: list[str] = field(
        default_factory=list
    )  # accepted Host headers; empty: this machine's, if it is bound to that
    text_sampler: str | None = None  # registered name; null: the model's own
    image_sampler: str | None = None  # likewise: parallel draws the same images in fewer passes
    rows: int = 8  # rows of the batch: 1 an answer, 2 an image that is drawn with guidance
    queue: int = 64  # requests that wait for rows; more are answered with 429
    journal: str | None = None  # folder of drawings' codes: after a crash, open drawings go on; null: none
    deadline: float = 600.0  # seconds from a request's arrival to its last token; then it is cancelled
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    api_keys: str | None = None  # file of keys, one a line; null: the variable JANUS_API_KEYS
    allow_anonymous: bool = False  # serve other machines without keys, behind a proxy that checks requests
    fetch_images: bool = False  # let requests name images by http(s) addresses on the public Internet
    warm_up: bool = True  # compute one answer and one drawing before the server is ready
    shutdown: float = 30.0  # seconds that open requests may take after SIGTERM
    log: Literal["json", "none"] = "json"  # a line on stderr for each request, without its content
    traces: bool = False  # spans for OpenTelemetry, to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names
    ray: RayConfig | None = None  # serve replicas in a Ray cluster; null: one process, this one

    def __post_init__(self) -> None:
        """Check the values."""
        errors = []
        if not 0 <= self.port <= 65535:
            errors.append(f"port: {self.port}; expected 0 to 65535")
        if self.name is not None and not self.name.strip():
            errors.append("name: empty; expected the model's name in requests, or null")
        for name, low in (("rows", 1), ("queue", 1)):
            if getattr(self, name) < low:
                errors.append(f"{name}: {getattr(self, name)}; expected {low} at least")
        if not (isfinite(self.deadline) and self.deadline > 0):
            errors.append(f"deadline: {self.deadline}; expected a number of seconds above 0")
        if not (isfinite(self.shutdown) and self.shutdown >= 0):
            errors.append(f"shutdown: {self.shutdown}; expected a number of seconds from 0")
        if errors:
            raise ValueError("\n".join(errors))

    @property
    def is_local(self) -> bool:
        """True if only programs on this machine reach the server."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:  # a name, whose address may change
            return False

    @property
    def accepted_hosts(self) -> list[str]:
        """The accepted Host headers; ``*``: any.

        A web page whose name resolves to this machine could otherwise use the server of whoever visits it.
        """
        return self.hosts or ([*LOOPBACK_NAMES, self.host] if self.is_local else ["*"])


def read_keys(config: ServerConfig, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the API keys of a server; none: everybody who reaches it may use it.

    Raises:
        ConfigError: a key is too short or not printable ASCII, the file has none or cannot be read, or there
            are none and other machines could use the server.
    """
    if config.api_keys is not None:
        source = printable(config.api_keys)
        lines = read_text(Path(config.api_keys).expanduser(), ConfigError, most=1_000_000).splitlines()
        keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
        if not keys:
            raise ConfigError(f"{source} has no API keys: expected one a line")
    else:
        source = KEYS_VARIABLE
        keys = environment.get(KEYS_VARIABLE, "").replace(",", " ").split()
        if KEYS_VARIABLE in environment and not keys:
            raise ConfigError(f"{KEYS_VARIABLE} is set, and holds no API keys: unset it, or put keys into it")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY or not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                f"API key {number} of {source}: expected {MIN_KEY} or more printable ASCII characters without"
                " spaces. Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
    if not keys and not config.is_local and not config.allow_anonymous:
        raise ConfigError(
            f"host {printable(config.host)} lets other machines use the server, and there are no API keys."
            f" Put keys into a file (api_keys=FILE) or into {KEYS_VARIABLE}; or, behind a proxy that checks"
            " requests, set allow_anonymous=true"
        )
    return keys
