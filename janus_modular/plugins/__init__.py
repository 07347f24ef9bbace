"""Finds components: which are announced, what offers them, and how one is loaded.

A component is one Python file that ends by registering itself::

    from janus_modular import Adaptor, ComponentConfig, Registry, hookimpl

    @hookimpl
    def register_adaptors(registry: Registry[Adaptor]) -> None:
        registry.add("twice", TwiceAdaptor, TwiceConfig)

Try it without packaging: ``janus-modular --plugin twice.py plugins list`` (or name the file in
``JANUS_PLUGIN_FILES``). To install it, announce it in the distribution's ``pyproject.toml``, under the
slot and the version of the plugin API::

    [project.entry-points."janus_modular.v1.adaptors"]
    twice = "acme_twice"

Listing reads these lines only. A module is imported when one of its components is asked for, so one
that is slow or broken costs nobody who does not use it. ``JANUS_DISABLE_PLUGINS=a,b`` switches off by
component (``twice``, ``adaptors:twice``) or distribution; ``JANUS_PLUGINS_STRICT=1`` turns every broken
plugin into an error; ``janus-modular plugins doctor`` tries them all.
"""

from janus_modular.plugins.catalogue import Plugins, default_plugins, set_default_plugins
from janus_modular.plugins.entry_points import EntryPointInfo, installed

__all__ = ["EntryPointInfo", "Plugins", "default_plugins", "installed", "set_default_plugins"]
