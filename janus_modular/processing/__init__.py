"""From text and images to token sequences, and back. numpy, Pillow, tokenizers and jinja2; no torch.

Read in this order: ``processor`` (the interface), ``templates`` and ``template_spans`` (how a conversation
becomes text and special tokens), ``text_tokenizer`` (how text becomes ids),
``image_io`` and ``image_transforms`` (how an image becomes an array).
"""
