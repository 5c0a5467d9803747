"""DeepSpeed behind one small seam: build, step, and whole tensors in and out whatever the ZeRO stage.

The rest of the code sees named float32 tensors and one `train_step`. What DeepSpeed does underneath was tried with
0.19.8 on gloo; the surprises are noted where they matter.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from pipeline.buffers import average_buffers, load_buffers_into
from pipeline.config import EngineConfig
from pipeline.distributed import World, autocast
from pipeline.errors import CheckpointError
from pipeline.optimizer import SkippingAdamW
from pipeline.recipe import split_batch

MOMENTS = ("exp_avg", "exp_avg_sq")
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    loss: float
    """Mean over the global batch; not finite where a rank's was not."""
    finite: bool
    """Whether this rank's losses were finite."""
    skipped: bool
    """Known to all ranks alike."""
    scalars: dict[str, Tensor]
    """Means over this rank's micro-batches, on the device."""
    batches: list[Batch]
    """Of this rank."""


class Engine:
    """A module under training: `module.forward(batch)` returns (loss, scalars by name)."""

    def __init__(
        self,
        module: nn.Module,
        parameter_groups: list[dict[str, Any]],
        config: EngineConfig,
        world: World,
        *,
        betas: tuple[float, float],
        gradient_clipping: float | None,
        global_batch_size: int,
        micro_batch_size: int | None,
    ) -> None:
        """Collective. Rank 0's weights are everybody's afterwards.

        parameter_groups: `params`, `lr`, `weight_decay` and any extra keys; only these parameters train.
        Raises ConfigError if the batch does not divide over the ranks.
        """
        self.config, self.world = config, world
        self.micro_batch_size, self.accumulation = split_batch(global_batch_size, micro_batch_size, world.size)
        self.global_batch_size = global_batch_size
        kind = torch.optim.AdamW if config.zero_stage else SkippingAdamW
        optimizer = kind(parameter_groups, betas=betas, eps=1e-8, foreach=True)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=trained,
            config=self._deepspeed_config(gradient_clipping),
        )
        self.module: nn.Module = self._engine.module
        self._trained = [(self._names[id(parameter)], parameter) for parameter in trained]
        learning = {id(parameter) for parameter in trained}
        self._frozen = [(name, each) for name, each in module.named_parameters() if id(each) not in learning]

    def _deepspeed_config(self, gradient_clipping: float | None) -> dict[str, Any]:
        bf16 = self.config.precision == "bf16"
        return {
            "train_batch_size": self.global_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": gradient_clipping or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.config.zero_stage, "reduce_bucket_size": 50_000_000},
            # An empty list: gradients are reduced in float32, as without autocast.
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": 1 << 60,
        }

    def train_step(
        self,
        batches: Iterator[Batch],
        learning_rate: Callable[[dict[str, Any]], float],
        seed: Callable[[int], int],
        loss_limit: float = float("inf"),
    ) -> StepOutcome:
        """Collective. One optimizer step over `accumulation` micro-batches.

        learning_rate gives a parameter group's rate. seed gives the random seed of a micro-step: what is random in the
        forward (drop path) is a pure function of the step and the rank, so a resumed run needs no generator state.
        Where the loss of any rank or the gradient is not finite, or the mean loss is above loss_limit, the step is
        skipped on all ranks: weights, moments and buffers stay as they were.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate(group)
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        losses, metrics, used = [], [], []
        for micro in range(self.accumulation):
            batch = next(batches)
            torch.manual_seed(seed(micro))
            loss, scalars = self._engine(to_device(batch, self.world.device))
            losses.append(loss.detach())
            if micro == self.accumulation - 1:
                own = torch.stack(losses)
                mean, veto = self._agree(own, loss_limit)
                loss = loss * veto
            self._engine.backward(loss)
            self._engine.step()
            metrics.append(scalars)
            used.append(batch)
        skipped = not self._engine.was_step_applied()
        if skipped:
            load_buffers_into(self.module, buffers)
        found = {name: torch.stack([scalars[name].detach() for scalars in metrics]).mean() for name in metrics[0]}
        return StepOutcome(float(mean), bool(torch.isfinite(own).all()), skipped, found, used)

    def _agree(self, losses: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        """Collective. The mean loss over all ranks, and 1, or nan where the step must not be taken.

        A nan makes every gradient one, which the optimizer's overflow handling answers by skipping, on all ranks alike.
        """
        mean = losses.double().mean() / self.world.size
        if self.world.size > 1:
            dist.all_reduce(mean)  # a single nan makes the sum one
        return mean, torch.where(torch.isfinite(mean) & (mean <= limit), 1.0, float("nan")).to(losses.dtype)

    def gradient_norm(self) -> float:
        """Of the last step, before clipping; nan where the engine does not keep it."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def whole_weights(self) -> dict[str, Tensor]:
        """Whole float32 weights that train, by name, as they lie on this rank's device. Not with ZeRO 3."""
        assert self.config.zero_stage < 3, "ZeRO 3 keeps no whole weights"
        return {name: parameter.detach() for name, parameter in self._trained}

    def weights(self) -> dict[str, Tensor]:
        """Collective. Whole float32 weights by name, frozen ones too, on the CPU; empty on ranks other than 0."""
        found = {name: value.cpu().clone() for name, value in self._read_frozen() if self.world.is_main}
        for name, parameter in self._trained:
            value = self._read(parameter, None)
            if self.world.is_main:
                found[name] = value.cpu().clone()
        return found

    def state(self) -> dict[str, Tensor]:
        """Collective. Whole weights, moments and optimizer steps by name, spread evenly over the ranks, on the CPU.

        Frozen parameters have weights alone.
        """
        found = {}
        for index, (name, value) in enumerate(self._read_frozen()):
            if index % self.world.size == self.world.rank:
                found[f"weight/{name}"] = value.cpu().clone()
        self._link_moments()
        steps = self._optimizer_steps()
        for index, (name, parameter) in enumerate(self._trained):
            own = index % self.world.size == self.world.rank
            for key in (None, *MOMENTS):
                value = self._read(parameter, key)
                if own:
                    found[f"{key or 'weight'}/{name}"] = value.cpu().clone()
            if own:
                found[f"step/{name}"] = torch.tensor(steps, dtype=torch.float32)
        return found

    def load(self, tensors: Mapping[str, Tensor], batches: Iterator[Batch]) -> None:
        """Collective. Puts whole tensors of `state()` back, written by any world and ZeRO stage.

        Takes one optimizer step on a zero loss first (rate and decay 0, on throw-away batches): it creates the moments
        that are then overwritten. Raises CheckpointError if names or shapes differ.
        """
        self._check(tensors)
        self._create_moments(batches)
        self._link_moments()
        for name, parameter in self._trained:
            for key in (None, *MOMENTS):
                self._write(parameter, tensors[f"{key or 'weight'}/{name}"].to(self.world.device), key)
        for name, parameter in self._frozen:
            self._write_frozen(parameter, tensors[f"weight/{name}"].to(self.world.device))
        if self._trained:
            self._set_optimizer_steps(float(tensors[f"step/{self._trained[0][0]}"]))
        if self.config.zero_stage == 3:
            # Small parameters stay gathered, with the values from before: shard all and gather those again.
            self._engine.optimizer.checkpoint_event_prologue()
            self._engine.optimizer.checkpoint_event_epilogue()

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The module in eval mode, with batch-norm statistics averaged over the ranks; restored afterwards. Collective."""
        own = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        load_buffers_into(self.module, self.averaged_buffers())
        self.module.eval()
        try:
            with torch.no_grad(), autocast(self.config.precision, self.world.device):
                yield self.module
        finally:
            self.module.train()
            load_buffers_into(self.module, own)

    def buffers(self) -> dict[str, Tensor]:
        """This rank's buffers, on the CPU. Not collective."""
        return {name: buffer.detach().cpu().clone() for name, buffer in self.module.named_buffers()}

    def averaged_buffers(self) -> dict[str, Tensor]:
        """Collective. Running statistics averaged over ranks, weighted by the samples that each rank's decoder saw."""
        mine = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        if self.world.size == 1:
            return mine
        gathered: list[dict[str, Tensor]] = [dict(mine) for _ in range(self.world.size)]
        for name in sorted(mine):
            slots = [torch.empty_like(mine[name]) for _ in range(self.world.size)]
            dist.all_gather(slots, mine[name].contiguous())
            for share, slot in zip(gathered, slots, strict=True):
                share[name] = slot
        return average_buffers(gathered)

    def _read_frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Collective. Names and whole weights of the parameters that don't train."""
        for name, parameter in self._frozen:
            if self.config.zero_stage < 3:
                yield name, parameter.detach().float()
            else:
                # The optimizer knows nothing of them, so neither do the accessors of _read().
                with deepspeed.zero.GatheredParameters([parameter]):
                    value = parameter.detach().float().clone()
                yield name, value

    def _write_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.config.zero_stage < 3:
            parameter.data.copy_(value)
        else:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)

    def _read(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        if self.config.zero_stage == 0:
            state = self._engine.optimizer.state[parameter]
            return parameter.detach().float() if key is None else state.get(key, torch.zeros_like(parameter)).float()
        if key is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)

    def _write(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        if self.config.zero_stage == 0:
            target = parameter.data if key is None else self._engine.optimizer.state[parameter][key]
            target.copy_(value)
        elif self.config.zero_stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
        else:
            # The full setters fail on a parameter that the ranks do not divide: hand over this rank's padded slice.
            share = -(-value.numel() // self.world.size)
            flat = torch.nn.functional.pad(value.flatten(), (0, share * self.world.size - value.numel()))
            own = flat[share * self.world.rank : share * (self.world.rank + 1)]
            if key is None:
                safe_set_local_fp32_param(parameter, own)
                parameter.ds_tensor.data.copy_(own)
            else:
                safe_set_local_optimizer_state(parameter, own, key)

    def _link_moments(self) -> None:
        """Makes ZeRO 1 and 2 find the moments of every parameter group.

        DeepSpeed links them once, after the first group's first step, when the other groups have none yet.
        """
        if self.config.zero_stage in (1, 2):
            optimizer = self._engine.optimizer
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer if self.config.zero_stage == 0 else optimizer.optimizer

    def _optimizer_steps(self) -> float:
        states = [state for state in self._torch_optimizer().state.values() if "step" in state]
        return float(states[0]["step"]) if states else 0.0

    def _set_optimizer_steps(self, step: float) -> None:
        for state in self._torch_optimizer().state.values():
            if "step" in state:
                state["step"].fill_(step)

    def _create_moments(self, batches: Iterator[Batch]) -> None:
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        groups = self._engine.optimizer.param_groups
        decays = [group["weight_decay"] for group in groups]
        for group in groups:
            group["lr"] = group["weight_decay"] = 0.0
        for _ in range(self.accumulation):
            loss, _ = self._engine(to_device(next(batches), self.world.device))
            self._engine.backward(loss * 0.0)
            self._engine.step()
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay
        load_buffers_into(self.module, buffers)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        expected = {f"{key or 'weight'}/{name}" for name, _ in self._trained for key in (None, *MOMENTS)}
        expected |= {f"weight/{name}" for name, _ in self._frozen}
        found = {name for name in tensors if not name.startswith("step/")}
        if expected != found:
            differing = sorted(expected ^ found)[:5]
            raise CheckpointError(
                f"the resume point holds other parameters than the model; differing: {', '.join(differing)}"
            )
        for name, parameter in (*self._trained, *self._frozen):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if tuple(tensors[f"weight/{name}"].shape) != shape:
                raise CheckpointError(f"the resume point's {name} has another shape than the model's {shape}")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; the dataset index stays, rows are found on the CPU without a sync."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) and key != "dataset" else value
        for key, value in batch.items()
    }
