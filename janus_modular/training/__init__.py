"""Training: `engine` takes steps, `loop` runs them, and `train` runs the stages of a Janus.

`engine` and `loop` train any module (``fit`` is all that an image tokenizer needs). A stage is data, a
`TrainConfig`: what learns, from which mixture of sources, for how long. `schema` and `mixture` import
no torch.
"""
