"""One training step: it never waits for the device, and leaves out what is not finite."""

from __future__ import annotations

import pytest
import torch
from test_train import config
from torch.utils._python_dispatch import TorchDispatchMode
from toys import toy_store

from samfeat.pipelines.training.batches import Item, Part, item_generators, read_batch
from samfeat.pipelines.training.cached import FromDisk
from samfeat.pipelines.training.processes import connect
from samfeat.pipelines.training.step import TrainingStep, out_of_memory

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "allclose")
ITEMS = [Item(0, "real", 0), Item(0, "synthetic", 1), Item(0, "synthetic", 4)]
PART = Part(0, 3, 3)


class HostReads(TorchDispatchMode):
    """Collects the operators whose results the host has to wait for on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for argument in args[1:]
            if isinstance(argument, (list, tuple))
            for index in argument
        )
        if by_mask or any(name.startswith(word) for word in WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return toy_store(tmp_path_factory.mktemp("cache") / "a.zarr")


@pytest.fixture
def raw(store):
    return read_batch(FromDisk([store]), ITEMS, config().data, item_generators(0, 0, PART))


def step_of(*overrides: str, preset: str = "default") -> TrainingStep:
    chosen = config(*overrides, preset=preset)
    return TrainingStep(chosen, connect(chosen.run))


@pytest.mark.parametrize("preset", ["default", "paper", "released"])
def test_nothing_in_a_step_waits_for_the_device(raw, preset):
    step = step_of("data.photometric_probability=1.0", "optimiser.clip_norm=1.0", preset=preset)
    step(raw, 0, learning_rate=1e-4, part=PART)
    with HostReads() as reads:
        values = step(raw, 1, learning_rate=1e-4, part=PART)
        assert reads.found == []
        values[0].item()
    assert reads.found == ["_local_scalar_dense"]


def test_values_are_named_and_the_gradient_norm_is_that_of_the_weights(raw):
    step = step_of()
    values = step(raw, 0, learning_rate=0.0, part=PART, asked=True).tolist()
    named = dict(zip(step.names, values))
    terms = ("detection", "descriptor", "relation", "edge", "wsc")
    assert list(named) == [*terms, "total", "gradient_norm", "asked"]
    assert named["asked"] == 1
    expected = torch.cat([weight.grad.flatten().double() for weight in step.student.parameters()]).norm()
    assert named["gradient_norm"] == pytest.approx(float(expected), rel=1e-5)


def test_a_gradient_that_is_not_finite_changes_no_weight(raw):
    step = step_of()
    before = [weight.detach().clone() for weight in step.student.parameters()]
    step.student.conv_des.weight.register_hook(lambda gradient: gradient * float("inf"))
    values = step(raw, 0, learning_rate=1e-3, part=PART)
    assert values[: len(step.names) - 2].isfinite().all()
    assert all(torch.equal(now, then) for now, then in zip(step.student.parameters(), before))


def test_the_largest_batch_that_fits_is_found_by_trying(raw, monkeypatch):
    step, tried = step_of(), []

    def limited(part_of_it, *arguments):
        tried.append(len(part_of_it.synthetic))
        if tried[-1] > room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole(part_of_it, *arguments)

    whole = step._terms
    monkeypatch.setattr(step, "_terms", limited)
    for room in (0, 1, 2):
        assert step.largest_that_fits(raw) == room
    assert max(tried) < 3


def test_errors_that_mean_too_little_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.slow
def test_a_compiled_network_takes_the_same_step(raw):
    plain, compiled = step_of(), step_of("run.compile=true")
    expected, got = (step(raw, 0, learning_rate=1e-4, part=PART) for step in (plain, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for name, weight in plain.student.named_parameters():
        torch.testing.assert_close(
            compiled.student.get_parameter(name).grad, weight.grad, rtol=1e-3, atol=1e-4, msg=name
        )


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.compile=true needs a C\+\+ compiler"):
        step_of("run.compile=true")
