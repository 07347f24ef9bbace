"""The HTTP server: OpenAI's API for text and images, over `janus_modular.serving`. Imports no torch.

`settings` is what an operator can set, `application` puts routes together, `run` serves them.
"""
