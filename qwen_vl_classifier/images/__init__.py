"""The only way in for pixels: formats, limits, decoding, fetching by URL, and which pictures are the same."""
