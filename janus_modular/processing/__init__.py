"""From words and pictures to sequences of tokens, and back. numpy, Pillow, tokenizers and jinja2; no torch.

Read in this order: ``processor`` (what everybody uses), ``marking`` and ``templates`` (how a conversation
becomes pieces of text and special tokens), ``text_tokenizer`` (how the pieces become ids), ``pictures``
and ``pixels`` (how a picture becomes an array).
"""
