"""janus-modular: train, swap and ship your own Janus. This is the public API, resolved on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from janus_modular.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        JanusError,
        MissingExtraError,
        PictureError,
        PluginError,
        PromptError,
    )
    from janus_modular.interfaces import (
        Adaptor,
        Backbone,
        Cache,
        GenerationPath,
        Head,
        ImageTokenizer,
        Layout,
        Part,
        PartConfig,
        PixelSpec,
        SamplingLoop,
        Session,
        Source,
        Tracker,
        UnderstandingEncoder,
        part,
    )
    from janus_modular.registry import Registry, hookimpl
    from janus_modular.sequence import (
        IGNORED,
        Message,
        PictureToDraw,
        PictureToRead,
        Sample,
        Sequence,
        Text,
    )

_HOME = {
    "errors": (
        "CheckpointError ConfigError DataError JanusError MissingExtraError PictureError PluginError PromptError"
    ),
    "interfaces": (
        "Adaptor Backbone Cache GenerationPath Head ImageTokenizer Layout Part PartConfig PixelSpec SamplingLoop "
        "Session Source Tracker UnderstandingEncoder part"
    ),
    "registry": "Registry hookimpl",
    "sequence": "IGNORED Message PictureToDraw PictureToRead Sample Sequence Text",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'janus_modular' has no attribute '{name}'")
    return getattr(import_module(f"janus_modular.{_MODULE_OF[name]}"), name)
