"""Training: `engine` takes steps, `loop` runs them, and `stages` make a Janus of it.

`engine` and `loop` train any module (``fit`` is all that an image tokenizer needs). A stage is data, a
`TrainConfig`: what learns, from which mixture of sources, for how long. `schema` and `mixture` import
no torch.
"""
