"""Synthetic people: raw datasets in the real formats, for trials without downloads."""

from pipeline.data.synthetic.config import SyntheticConfig
from pipeline.data.synthetic.generate import generate

__all__ = ["SyntheticConfig", "generate"]
