"""What surrounds an example: the chat template, the tokens of texts, and thinking turned off."""
