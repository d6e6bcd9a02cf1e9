"""Files on this machine: written whole or not at all, and what is kept about them in the user's cache."""
