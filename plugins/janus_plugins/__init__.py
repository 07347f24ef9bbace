"""The built-in components: one folder a slot, one file a component."""
