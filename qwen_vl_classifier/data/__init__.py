"""Where examples come from: rows of pictures and text, checked as they are loaded.

`example` says what a row is, `loading` reads data sets into rows, and `images` is the one door by which
pixels come in: it turns whatever a row holds for a picture into RGB, or into a refusal of one line.
"""
