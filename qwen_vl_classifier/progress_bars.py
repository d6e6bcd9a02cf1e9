"""Progress bars: in a notebook its own, elsewhere text."""

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # a notebook without ipywidgets gets bars of text
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
