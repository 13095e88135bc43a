"""DeepSpeed: optimizer state (ZeRO-1), gradients (2) and weights (3) in parts (Rajbhandari et al. 2020).

The loop, the loss and the checkpoints are those of every other run. DeepSpeed gets fp32 weights, torch's AdamW and the
step's loss times the number of processes, which undoes its mean over them; precision, clipping and the schedule are the
run's own. Its files (a pickle per process) are neither written nor read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.config.deepspeed_file import DeepSpeedFile
from tunesmith.distributed.compiling import ready_deepspeed
from tunesmith.distributed.fsdp import move_buffers
from tunesmith.distributed.shards import StoredTensor
from tunesmith.distributed.spread import Spread
from tunesmith.distributed.world import World
from tunesmith.model.loss import SupervisedLM


class Zero(Spread):
    """The model in DeepSpeed's engine.

    Args:
        file: from `read_deepspeed`.
        tell: shows a remark to the user.
    """

    name = "deepspeed"
    needs_equal_forwards = True
    must_gather = True

    def __init__(self, world: World, device: torch.device, file: DeepSpeedFile, max_norm: float, tell: Any) -> None:
        self._world, self._device, self._file, self._max_norm, self._tell = world, device, file, max_norm, tell
        self._engine: Any = None
        self._zero: Any = None

    @property
    def _is_sharded(self) -> bool:
        return self._file.stage == 3

    def attach(self, lm: SupervisedLM, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self._optimizer = ZeroOptimizer(self, optimizer)
        with ready_deepspeed(self._world, self._device, self._tell) as deepspeed:
            self._deepspeed = deepspeed
            if deepspeed.comm.comm.cdb is not None:  # of a run before in this process, whose groups have ended
                deepspeed.comm.comm.cdb = None
                deepspeed.utils.groups._release_process_group_references(group=None)
            self._engine = deepspeed.initialize(model=lm, optimizer=optimizer, config=self._settings())[0]
        move_buffers(lm, self._device)
        self._zero = self._engine.optimizer
        self._optimizer.create_state()
        if not self._is_sharded:  # DeepSpeed links them after the step of the first group, when others have none
            self._zero._lazy_init_hp_params_optimizer_state()
        return self._optimizer

    def _settings(self) -> dict[str, Any]:
        return {
            # one forward at a time; the loop tells the last one of a step
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._max_norm,
            "zero_optimization": self._file.zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }

    def callable(self, lm: SupervisedLM) -> nn.Module:
        engine: nn.Module = self._engine
        return engine

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss * self._world.size)  # it takes the mean over the processes
        self._optimizer.has_gradients = True

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """The gradients' norm; the engine's step clips by the same."""
        if self._is_sharded:
            norms = [torch.as_tensor(norm, dtype=torch.float32) for norm in self._zero._get_norm_groups()]
            norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
            is_valid = all(float(n) >= 0 for n in norms)
        else:
            norm = torch.as_tensor(self._zero.scaled_global_norm(), dtype=torch.float32)
            is_valid = float(norm) >= 0
        # a norm that is not finite comes as -1
        return norm.to(self._device) if is_valid else torch.tensor(math.inf, device=self._device)

    def take_step(self) -> None:
        self._engine.step()

    @property
    def has_whole_gradients(self) -> bool:
        """Whether the backwards of a step are complete."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    @property
    def parts(self) -> list[Tensor]:
        """The flat parts of this process, which AdamW updates."""
        flat: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if self._is_sharded else self._zero.single_partition_of_fp32_groups
        )
        return flat

    def whole(self, tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_id"):
            return self._of_main(tensor)
        with self._deepspeed.zero.GatheredParameters([tensor]):
            return self._of_main(tensor)

    def _of_main(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU in process 0, which writes it; nothing in the others."""
        return tensor.detach().to("cpu", copy=True) if self._world.is_main else torch.empty(0)

    def copy_state(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Any]]:
        assert isinstance(optimizer, ZeroOptimizer)
        if not (count := optimizer.count_steps()):
            return
        for parameter in optimizer.parameters():
            yield parameter, "step", torch.tensor(float(count))
            for key in _AVERAGES:
                value = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                yield parameter, key, self._of_main(value.reshape(_shape_of(parameter)))

    def set_state(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, value: StoredTensor
    ) -> None:
        assert isinstance(optimizer, ZeroOptimizer)
        whole = value.read()
        if key == "step":
            optimizer.set_steps(int(whole))
        elif not self._is_sharded:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, whole.to(self._device), key)
        else:
            own: Any = parameter
            size = own.ds_tensor.numel()  # of each part; the last one is padded
            flat = whole.new_zeros(size * self._world.size)
            flat[: whole.numel()] = whole.reshape(-1)
            part = flat[size * self._world.rank :][:size].to(self._device)
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, key)

    @contextmanager
    def whole_adapter(self, lm: SupervisedLM) -> Iterator[None]:
        if not self._is_sharded:
            yield
            return
        with self._deepspeed.zero.GatheredParameters([p for p in lm.parameters() if p.requires_grad]):
            yield

    @contextmanager
    def callable_parts(self, lm: SupervisedLM) -> Iterator[None]:
        """For ZeRO-3, every process has all weights within the block."""
        if not self._is_sharded:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(_without_hooks(self._zero.parameter_offload))
            stack.enter_context(self._deepspeed.zero.GatheredParameters(list(lm.parameters())))
            yield


_AVERAGES = ("exp_avg", "exp_avg_sq")


def _shape_of(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    """ZeRO-3 fetches and releases the weights of each module around its forward; not within this block."""
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()
    offload.partition_all_parameters()
    offload._remove_module_hooks()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload.setup_zero_stage3_hooks()


class ZeroOptimizer(torch.optim.Optimizer):
    """The optimizer as the loop sees it: groups of the model's own parameters, whose step is the engine's.

    Args:
        inner: AdamW, whose parameters DeepSpeed replaces by its flat parts.
    """

    def __init__(self, spread: Zero, inner: torch.optim.Optimizer) -> None:
        self._spread, self._inner = spread, inner
        self.has_gradients = False
        super().__init__([dict(group) for group in inner.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        for group, own in zip(self._inner.param_groups, self.param_groups, strict=True):
            group["lr"] = own["lr"]
        self._spread.take_step()
        self.has_gradients = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of a step that is left out: the engine takes its step, in which AdamW does nothing."""
        if not self.has_gradients or not self._spread.has_whole_gradients:
            return
        inner: Any = self._inner
        inner.step = _do_nothing
        try:
            self._spread.take_step()
        finally:
            del inner.step
        self.has_gradients = False

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def count_steps(self) -> int:
        return max((int(entries["step"]) for entries in self._inner.state.values() if "step" in entries), default=0)

    def set_steps(self, count: int) -> None:
        for part in self._spread.parts:
            self._inner.state[part]["step"].fill_(count)

    def create_state(self) -> None:
        """The averages that AdamW would create in its first step."""
        for part in self._spread.parts:
            self._inner.state[part].update({key: torch.zeros_like(part) for key in _AVERAGES})
            self._inner.state[part]["step"] = torch.zeros((), dtype=torch.float32, device=part.device)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """In place of AdamW's step."""
