"""One training step: it never waits for the device, and leaves out what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_runs import config

from samfeat.pipelines.errors import is_out_of_memory
from samfeat.pipelines.train import State, new_state, train_step
from samfeat.pipelines.training.loader import BatchPart, FromDisk, Item, item_generators, largest_that_fits, read_batch
from samfeat.pipelines.training.processes import connect
from samfeat.student.network import SAMFeatNetwork
from samfeat.teacher_cache.store import TeacherCache

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "allclose")
ITEMS = [Item(0, "real", 0), Item(0, "synthetic", 1), Item(0, "synthetic", 4)]
PART = BatchPart(0, 3, 3)


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
def store(toy_cache):
    return TeacherCache.open(toy_cache / "a.zarr")


@pytest.fixture
def raw(store):
    return read_batch(FromDisk([store]), ITEMS, config().data, item_generators(0, 0, PART))


def state_of(*overrides: str, preset: str = "default") -> State:
    chosen = config(*overrides, preset=preset)
    return new_state(chosen, connect(chosen.run))


@pytest.mark.parametrize("preset", ["default", "paper", "released"])
def test_nothing_in_a_step_waits_for_the_device(raw, preset):
    state = state_of("data.photometric_probability=1.0", "optimiser.clip_norm=1.0", preset=preset)
    train_step(state, raw, 0, rate=1e-4, part=PART)
    with HostReads() as reads:
        values = train_step(state, raw, 1, rate=1e-4, part=PART).values
        assert reads.found == []
        values[0].item()
    assert reads.found == ["_local_scalar_dense"]


@pytest.mark.parametrize(
    ("form", "terms"),
    [
        ("peaks", ("detection", "position", "descriptor", "relation", "edge", "wsc")),
        ("paper", ("detection", "descriptor", "relation", "edge", "wsc")),
    ],
)
def test_values_are_named_and_the_gradient_norm_is_that_of_the_weights(raw, form, terms):
    state = state_of("optimiser.clip_norm=0", f"losses.detection_form={form}")
    names, values = train_step(state, raw, 0, rate=0.0, part=PART, asked=True)
    named = dict(zip(names, values.tolist()))
    assert list(named) == [*terms, "total", "gradient_norm", "asked"]
    assert named["asked"] == 1
    expected = torch.cat([weight.grad.flatten().double() for weight in state.student.parameters()]).norm()
    assert named["gradient_norm"] == pytest.approx(float(expected), rel=1e-5)
    clipped = state_of(f"optimiser.clip_norm={float(expected) / 8}", f"losses.detection_form={form}")
    names, values = train_step(clipped, raw, 0, rate=0.0, part=PART)
    assert dict(zip(names, values.tolist()))["gradient_norm"] == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(clipped.student.parameters(), state.student.parameters()):
        torch.testing.assert_close(one.grad, other.grad / 8, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_gradient_that_is_not_finite_changes_no_weight(raw, decay):
    state = state_of(f"optimiser.average={decay}")
    before = [weight.detach().clone() for weight in state.student.parameters()]
    state.student.conv_des.weight.register_hook(lambda gradient: gradient * float("inf"))
    names, values = train_step(state, raw, 0, rate=1e-3, part=PART)
    assert values[: len(names) - 2].isfinite().all()
    for student in (state.student, state.average):
        assert all(torch.equal(now, then) for now, then in zip(student.parameters(), before))


def test_the_average_follows_the_weights_by_its_decay(raw):
    state = state_of("optimiser.average=0.6")
    expected = [weight.detach().double() for weight in state.student.parameters()]
    for step, decay in enumerate([1 / 10, 2 / 11, 0.25]):  # (t + 1) / (t + 10), below 0.6 to begin with
        state.step = step
        train_step(state, raw, step, rate=1e-3, part=PART)
        weights = [weight.detach().double() for weight in state.student.parameters()]
        expected = [decay * mean + (1 - decay) * weight for mean, weight in zip(expected, weights)]
    for mean, wanted in zip(state.average.parameters(), expected):
        torch.testing.assert_close(mean.detach().double(), wanted, rtol=1e-5, atol=1e-7)
    state.step = 1000
    before = state.average.conv_des.weight.detach().clone()
    train_step(state, raw, 3, rate=1e-3, part=PART)
    torch.testing.assert_close(
        state.average.conv_des.weight, 0.6 * before + 0.4 * state.student.conv_des.weight, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("room", [0, 1, 2])
def test_the_largest_batch_that_fits_is_found_by_trying(raw, room):
    tried = []

    def attempt(items):
        tried.append(len(items.synthetic))
        if tried[-1] > room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    assert largest_that_fits(raw, attempt) == room
    assert max(tried) < 3


def test_errors_that_mean_too_little_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_takes_the_same_step(raw, monkeypatch, backend):
    monkeypatch.setattr(SAMFeatNetwork, "compile", lambda network: torch.nn.Module.compile(network, backend=backend))
    plain, compiled = state_of(), state_of("run.compile=true")
    expected, got = (train_step(state, raw, 0, rate=1e-4, part=PART).values for state in (plain, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for name, weight in plain.student.named_parameters():
        torch.testing.assert_close(
            compiled.student.get_parameter(name).grad, weight.grad, rtol=1e-3, atol=1e-4, msg=name
        )


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.compile=true needs a C\+\+ compiler"):
        state_of("run.compile=true")
