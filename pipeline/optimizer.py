"""The optimizer of a run whose states are not sharded; ZeRO brings its own around PyTorch's AdamW."""

from typing import Any

import torch


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that skips a step whose gradient is not finite, as DeepSpeed's ZeRO optimizers do. For ZeRO 0."""

    overflow = False  # DeepSpeed's name for it, which its engine reads

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """The gradients are reduced by now: every rank decides alike."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
        if not self.overflow:
            super().step(closure)
