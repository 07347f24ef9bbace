"""Gates of `verify`: each compares one aspect of a bundle with the reference."""
