"""What all verbs share: what they print, how options are declared for a reader."""
