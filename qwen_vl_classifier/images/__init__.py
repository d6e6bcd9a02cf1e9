"""Read pictures, here only: formats, limits, decoding, fetching by URL, and which pictures are the same."""
