"""Training: `engine` performs steps, `loop` runs them for any module, and `train` trains a stage of Janus.

A stage is data, a `TrainConfig`: trainable modules, a mixture of sources, a schedule. `fit` (in `loop`) is
all that an image tokenizer needs. `schema` and `mixture` import no torch.
"""
