"""``python -m janus_modular`` is ``janus-modular``."""

from janus_modular.cli.app import main

main()
