"""What requests and answers look like, one module for each family of routes.

The one place from which both the checks and the OpenAPI page are made. Requests refuse fields that they do not know:
a misspelt option must not be passed over in silence.
"""
