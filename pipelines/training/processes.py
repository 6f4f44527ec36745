"""The processes of a training run: one, or one per device; they split every batch and stay in step.

A process group is started by torchrun, by anything that sets the same environment variables, or by :func:`launch`.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from samfeat.pipelines.config import RunConfig
from samfeat.student.losses import Reduction, mean_over_images

INTERRUPTED = 75  # exit code EX_TEMPFAIL of sysexits.h: the same command resumes

logger = logging.getLogger(__name__)


def connect(run: RunConfig) -> Fabric:
    """Set up the devices of a run, and join the other processes if started by torchrun or :func:`launch`.

    Raises:
        ValueError: CUDA requested but not available, or more processes on a machine than it has GPUs.
    """
    if run.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.accelerator=cuda, but this machine has no usable CUDA device: leave it at auto")
    accelerator = "cuda" if run.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        device = torch.device("cuda", 0) if accelerator == "cuda" else torch.device("cpu")
        return Fabric(accelerator=accelerator, devices=1, strategy=SingleDeviceStrategy(device))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if accelerator == "cuda" and here > torch.cuda.device_count():
        raise ValueError(f"{here} processes, but {torch.cuda.device_count()} GPUs: start one process per GPU")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces every process
    fabric = Fabric(
        accelerator=accelerator,
        devices=here,
        num_nodes=processes // here,
        strategy=DDPStrategy(static_graph=True, gradient_as_bucket_view=True),
    )
    fabric.launch()
    return fabric


def reduction_over(processes: int) -> Reduction:
    """Mean over the images of all processes, as a loss whose gradients are averaged over the processes."""
    if processes == 1:
        return mean_over_images

    def mean_over_all_images(values: Tensor, used: Tensor) -> Tensor:
        count = used.sum().to(values.dtype)
        torch.distributed.all_reduce(count)
        return (used * values).sum() * processes / count.clamp(min=1)

    return mean_over_all_images


def average(values: Tensor, processes: int) -> Tensor:
    """Mean of a tensor over all processes."""
    if processes > 1:
        torch.distributed.all_reduce(values)
        values /= processes
    return values


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn a backend's error when another process is gone into one clear ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        if not torch.distributed.is_initialized() or not any(word in str(error) for word in ("gloo", "NCCL", "peer")):
            raise
        raise ConnectionError(
            f"process {torch.distributed.get_rank()}: another process of the run is gone; "
            "the same command with --resume auto continues from the last checkpoint"
        ) from error


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run this program's command line in several processes on this machine, as one run.

    If one of them exits early, the others are stopped as well.

    Args:
        processes: number of processes, one per GPU if there are GPUs.
        arguments: command-line arguments, without the program's name.

    Returns:
        the exit code.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="samfeat",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "samfeat.cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode  # it said why
        logger.warning(
            "process %d was ended by %s, and the others with it: "
            "the same command with --resume auto continues from the last checkpoint",
            rank,
            signal.Signals(-failure.exitcode).name,
        )
        return INTERRUPTED
    except SignalException:
        return INTERRUPTED
    return 0


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_compiler() -> None:
    """Check that torch.compile can work.

    Raises:
        ValueError: there is no C++ compiler.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise ValueError("run.compile=true needs a C++ compiler (g++ or clang++), and there is none: leave it at false")
