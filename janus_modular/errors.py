"""Errors that a user can cause and cure; the command line prints them without a traceback.

Each says what was found, what was expected, and what to do next.
"""


class JanusError(Exception):
    """Anything a user can put right."""


class ConfigError(JanusError):
    """A configuration that cannot be built; lists every fault with its path."""


class PluginError(JanusError):
    """A component that is unknown, defined twice, or whose plugin does not load."""


class CheckpointError(JanusError):
    """Weights that are missing, left over, of another shape, or not readable."""


class PictureError(JanusError):
    """A picture that cannot be read, or that is too large to be read safely."""


class PromptError(JanusError):
    """A conversation that cannot become a sequence of tokens, or one longer than the context."""


class DataError(JanusError):
    """A training sample that cannot be used as it is."""


class MissingExtraError(JanusError):
    """Something is needed that this installation leaves out; says the pip line that adds it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the extra '{extra}': pip install 'janus-modular[{extra}]'")
