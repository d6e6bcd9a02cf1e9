"""Files: written whole or not at all, here or in an object store, and the user's cache."""
