"""Several processes behind one address, each with a device of its own."""
