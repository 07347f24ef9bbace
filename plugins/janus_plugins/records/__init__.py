"""Reading training records as people have them: files of JSON, conversations, image-text pairs."""
