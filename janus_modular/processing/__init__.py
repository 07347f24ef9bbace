"""From words and images to sequences of tokens, and back. numpy, Pillow, tokenizers and jinja2; no torch.

Read in this order: ``processor`` (what everybody uses), ``template_spans`` and ``templates`` (how a
conversation becomes pieces of text and special tokens), ``text_tokenizer`` (how the pieces become ids),
``image_io`` and ``image_transforms`` (how an image becomes an array).
"""
