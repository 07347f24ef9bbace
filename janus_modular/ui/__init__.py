"""The web page of a server: chat with images, and drawing. It knows a server's address alone, and no model.

`api_client` calls the server, `page` is what people see.
"""
