"""One training step: batch, forward, losses, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn.utils import get_total_norm

from samfeat.pipelines.config import Config
from samfeat.pipelines.training.batches import Part, RawBatch, first_items, make_batch
from samfeat.pipelines.training.objective import losses, total
from samfeat.pipelines.training.processes import average, check_compiler, has_bf16, reduction_over
from samfeat.student.network import SAMFeatNetwork


class TrainingStep:
    """The student, its optimiser, and what a step does with them.

    Args:
        config: of the run.
        fabric: devices and processes, see :func:`samfeat.pipelines.training.processes.connect`.

    Attributes:
        student: the plain network, in channels-last order; its parameters are those that are trained.
        names: of the values that a step gives.
    """

    def __init__(self, config: Config, fabric: Fabric) -> None:
        self.config, self.fabric = config, fabric
        generator = torch.Generator().manual_seed(config.run.seed)
        self.student = SAMFeatNetwork(config.network, generator=generator)
        for parameter in self.student.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.adam = torch.optim.Adam(
            self.student.parameters(),
            lr=config.optimiser.learning_rate,
            weight_decay=config.optimiser.weight_decay,
            fused=True,
        )
        if config.run.compile:
            check_compiler()
            self.student.compile()
        self.network, self.optimiser = fabric.setup(self.student, self.adam)
        narrow = config.run.precision == "bf16" or (config.run.precision == "auto" and has_bf16(fabric.device))
        self.autocast = torch.autocast(fabric.device.type, torch.bfloat16, enabled=narrow)
        self._reduction = reduction_over(fabric.world_size)
        self.names: list[str] = []

    def __call__(self, raw: RawBatch, number: int, *, learning_rate: float, part: Part, asked: bool = False) -> Tensor:
        """Train on a batch; a step whose loss is not finite changes nothing.

        Args:
            raw: this process's part of the batch.
            number: of the batch; all random choices follow from it.
            learning_rate: of this step.
            part: which part of the batch it is.
            asked: whether this process was asked to stop.

        Returns:
            float32 [n], on the device, the same in all processes, named by ``names``: the terms, their ``total``, the
            ``gradient_norm``, and ``asked``, the share of processes that were asked to stop.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        terms = self._terms(raw, number, part)
        self.optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(terms["total"])
        if self.config.optimiser.clip_norm:
            self.fabric.clip_gradients(
                self.network, self.optimiser, max_norm=self.config.optimiser.clip_norm, error_if_nonfinite=False
            )
        norm = get_total_norm([weight.grad for weight in self.student.parameters() if weight.grad is not None])
        stop = torch.full_like(norm, float(asked))
        self.names = [*terms, "gradient_norm", "asked"]
        values = torch.stack([*(term.detach() for term in terms.values()), norm, stop])
        values = average(values, self.fabric.world_size)
        cast(Any, self.adam).found_inf = (~torch.isfinite(values).all()).float()
        self.optimiser.step()
        return values

    def _terms(self, raw: RawBatch, number: int, part: Part) -> dict[str, Tensor]:
        generator = torch.Generator(self.fabric.device).manual_seed(self.config.run.seed * 1_000_003 + number)
        batch = make_batch(raw, self.config.data, generator, part)
        with self.autocast:
            output = self.network(batch.images.contiguous(memory_format=torch.channels_last))
            terms = losses(
                output, batch, self.config.losses, sampling=self.config.network.sampling, reduction=self._reduction
            )
        terms["total"] = total(terms, self.config.losses)
        return terms

    def largest_that_fits(self, raw: RawBatch) -> int:
        """The largest number of the batch's first items that there is memory for, found by trying; 0: not one."""
        fits, too_many = 0, len(raw.synthetic)
        while too_many - fits > 1:
            tried = (fits + too_many) // 2
            try:
                self.optimiser.zero_grad(set_to_none=True)
                self.fabric.backward(self._terms(first_items(raw, tried), 0, Part(0, tried, tried))["total"])
                fits = tried
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                too_many = tried
            if self.fabric.device.type == "cuda":
                torch.cuda.empty_cache()
        return fits


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is not enough memory, of the device or of the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
