"""Finds components by their entry points, and loads them.

A component is one Python file that ends by registering itself::

    from janus_modular import Adaptor, ComponentConfig, Registry, hookimpl

    @hookimpl
    def register_adaptors(registry: Registry[Adaptor]) -> None:
        registry.add("twice", TwiceAdaptor, TwiceConfig)

Try it without packaging: ``janus-modular --plugin twice.py plugins list`` (or name the file in
``JANUS_PLUGIN_FILES``). To install it, declare it in the distribution's ``pyproject.toml``, under the
version of the plugin API and the slot::

    [project.entry-points."janus_modular.v1.adaptors"]
    twice = "acme_twice"

Listing components reads this metadata only. A module is imported when one of its components is used, so a
slow or broken plugin affects only its users. ``JANUS_DISABLE_PLUGINS=a,b`` disables components (``twice``,
``adaptors:twice``) or distributions; ``JANUS_PLUGINS_STRICT=1`` makes every broken plugin an error;
``janus-modular plugins doctor`` loads them all.
"""

from janus_modular.plugins.catalogue import Plugins, default_plugins, set_default_plugins
from janus_modular.plugins.entry_points import EntryPointInfo, installed

__all__ = ["EntryPointInfo", "Plugins", "default_plugins", "installed", "set_default_plugins"]
