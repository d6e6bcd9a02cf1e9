"""Code that all verbs share: output, endings and the reference of options."""
