"""Others' checkpoint formats, one file each: which of their tensors is which of ours. `registry.py` names them all."""
