"""Graphs of functions of tensors, by a stand-in: static inputs, kept references, moved weights, refusals."""

from __future__ import annotations

import gc
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glide_fast.sampling.graph import CannotCaptureError, Capturable, Graphs, Session
from tests.sampling.standin import StandIn

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Scaled(Capturable):
    """network(x) * scale."""

    network: nn.Module
    scale: Tensor

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.network,)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.scale,)

    @property
    def recipe(self) -> Hashable:
        return type(self)

    def reading(self, inputs: Sequence[Tensor]) -> Scaled:
        return replace(self, scale=inputs[0])


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4).eval().requires_grad_(False)


def numbers(seed: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def open_session(graphs: Graphs, part: Scaled, recipe: Hashable = "scaled") -> Session:
    return graphs.session(CPU, [part], recipe)


def call(session: Session, part: Scaled, x: Tensor, name: Hashable = "forward") -> Tensor:
    def function(_kept: Any, inputs: tuple[Tensor, ...], arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        bound = part.reading(inputs)
        return (bound.network(arguments[0]) * bound.scale,)

    return session.call(name, function, (x,))[0]


def expect(part: Scaled, x: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, part.network(x) * part.scale, rtol=0, atol=0)


def test_the_first_call_warms_up_the_second_records_and_all_are_right() -> None:
    recorder = StandIn()
    graphs, part = Graphs(recorder), Scaled(layer(), torch.tensor(3.0))
    session = open_session(graphs, part)
    for seed, counts in enumerate([(1, 0, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3)]):
        x = numbers(seed)
        expect(part, x, call(session, part, x))
        assert (recorder.warm_ups, recorder.records, recorder.replays) == counts


def test_results_are_not_overwritten_by_later_replays() -> None:
    graphs, part = Graphs(StandIn()), Scaled(layer(), torch.tensor(3.0))
    session = open_session(graphs, part)
    pairs = [(numbers(seed), call(session, part, numbers(seed))) for seed in range(5)]
    for x, found in pairs:
        expect(part, x, found)


def test_arguments_and_inputs_may_die_and_change_between_calls() -> None:
    recorder = StandIn()
    graphs, network = Graphs(recorder), layer()
    for scale in (3.0, 3.0, 1.25, 0.0, 7.5):
        part = Scaled(network, torch.tensor(scale))
        session = open_session(graphs, part)
        x = numbers(int(scale))
        expect(part, x, call(session, part, x.clone()))
        del session
    assert recorder.records == 1


def test_inputs_are_copied_once_a_session_and_again_after_another_sessions() -> None:
    graphs, network = Graphs(StandIn()), layer()
    parts = [Scaled(network, torch.tensor(scale)) for scale in (2.0, 5.0)]
    sessions = [open_session(graphs, part) for part in parts]
    for turn in (0, 0, 0, 1, 0, 1, 1):
        x = numbers(turn)
        expect(parts[turn], x, call(sessions[turn], parts[turn], x))


def test_the_stand_in_notices_what_a_gpu_would_suffer() -> None:
    """Each of the three mistakes that the graphs must not make is seen by it."""
    recorder, weight = StandIn(), numbers(0)
    x = numbers(1)
    tape, results = recorder.record(CPU, lambda: (x * weight,))
    assert results[0].isnan().all()  # a recording alone computes nothing
    tape.replay()
    torch.testing.assert_close(results[0], numbers(1) * numbers(0))
    other = numbers(2)  # no copy to the static input: the old one is read
    tape.replay()
    assert not torch.equal(results[0], other * weight)
    x.copy_(other)
    tape.replay()
    torch.testing.assert_close(results[0], other * weight)
    weight = weight.clone()  # the address is gone
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tape.replay()


@pytest.mark.parametrize("look", [lambda x: x * float(x.sum()), lambda x: x if (x > 0).all() else -x])
def test_the_stand_in_refuses_looks_into_tensors(look: Any) -> None:
    x = numbers(0)
    with pytest.raises(RuntimeError, match="not permitted while a stream is captured"):
        StandIn().record(CPU, lambda: (look(x),))
    with pytest.raises(RuntimeError, match="draws a random number"):
        StandIn().record(CPU, lambda: (torch.randn_like(x),))


def test_weights_changed_in_place_are_read_by_the_same_recording() -> None:
    recorder = StandIn()
    graphs, part = Graphs(recorder), Scaled(layer(), torch.tensor(3.0))
    for step in range(4):
        with torch.no_grad():
            part.network.weight.add_(step)  # type: ignore[operator]
        session = open_session(graphs, part)
        expect(part, numbers(step), call(session, part, numbers(step)))
    assert recorder.records == 1


def replaced(network: nn.Module) -> None:
    network.weight = nn.Parameter(network.weight * 2, requires_grad=False)  # type: ignore[operator]


def moved(network: nn.Module) -> None:
    network.weight.data = network.weight.data.clone() + 1


def loaded(network: nn.Module) -> None:
    network.load_state_dict({name: 2 * each for name, each in network.state_dict().items()}, assign=True)


def with_a_new_buffer(network: nn.Module) -> None:
    network.register_buffer("unused", torch.zeros(3))


@pytest.mark.parametrize("change", [replaced, moved, loaded, with_a_new_buffer])
def test_weights_at_another_address_are_recorded_anew(change: Any) -> None:
    recorder = StandIn()
    graphs, part = Graphs(recorder), Scaled(layer(), torch.tensor(3.0))
    for seed in range(3):
        expect(part, numbers(seed), call(open_session(graphs, part), part, numbers(seed)))
    old = part.network.weight  # stays alive, so that a new one is elsewhere
    change(part.network)
    for seed in range(3):
        expect(part, numbers(seed), call(open_session(graphs, part), part, numbers(seed)))
    assert (recorder.warm_ups, recorder.records, len(graphs)) == (2, 2, 1)
    assert old is not None


class Settling(nn.Linear):
    """Lays its weights elsewhere when it is first called, as a U-Net does on a GPU."""

    settled = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.settled:
            self.before, self.settled = self.weight.data, True
            self.weight.data = self.weight.data.clone()
        return super().forward(x)


def test_weights_that_settle_in_the_first_call_are_recorded_once() -> None:
    recorder = StandIn()
    network = Settling(4, 4).eval().requires_grad_(False)
    graphs, part = Graphs(recorder), Scaled(network, torch.tensor(3.0))
    for seed in range(4):
        session = open_session(graphs, part)
        for _ in range(2):
            expect(part, numbers(seed), call(session, part, numbers(seed)))
    assert (recorder.warm_ups, recorder.records) == (1, 1)


def test_weights_of_another_dtype_are_recorded_anew() -> None:
    recorder = StandIn()
    graphs, part = Graphs(recorder), Scaled(layer(), torch.tensor(3.0))
    for dtype in (torch.float32, torch.float64, torch.float64):
        part.network.to(dtype)
        for seed in range(2):
            x = numbers(seed).to(dtype)
            expect(part, x, call(open_session(graphs, part), part, x))
    assert recorder.records == 2


def test_shapes_dtypes_names_recipes_networks_and_streams_have_graphs_of_their_own() -> None:
    recorder = StandIn()
    graphs, part = Graphs(recorder, most=20), Scaled(layer(), torch.tensor(3.0))
    other = Scaled(layer(), torch.tensor(3.0))
    for _ in range(3):
        call(open_session(graphs, part), part, numbers(0))
        call(open_session(graphs, part), part, numbers(0, rows=3))
        call(open_session(graphs, part), part, numbers(0), name="backward")
        call(open_session(graphs, part, recipe="other"), part, numbers(0))
        call(open_session(graphs, other), other, numbers(0))
        vector = replace(part, scale=torch.ones(4))
        call(open_session(graphs, vector), vector, numbers(0))
        recorder.stream = 1
        call(open_session(graphs, part), part, numbers(0))
        recorder.stream = 0
    assert len(graphs) == recorder.records == 7


def test_the_longest_unused_graph_is_forgotten_first() -> None:
    recorder = StandIn()
    graphs, part = Graphs(recorder, most=2), Scaled(layer(), torch.tensor(3.0))
    session = open_session(graphs, part)
    for rows in (1, 1, 2, 2, 1, 3, 3):
        expect(part, numbers(0, rows), call(session, part, numbers(0, rows)))
    assert len(graphs) == 2
    assert recorder.records == 3
    call(session, part, numbers(0, 1))  # still there
    assert recorder.warm_ups == 3
    call(session, part, numbers(0, 2))
    assert recorder.warm_ups == 4
    gc.collect()
    assert sum(tape() is not None for tape in recorder.tapes) == 1  # the others' memory is free


@pytest.mark.parametrize("given", [True, False])
def test_memory_is_bounded_but_the_graph_in_use_stays(given: bool) -> None:
    recorder = StandIn(bytes=None if given else 300)
    graphs = Graphs(recorder, most=20, most_bytes=300 if given else None)
    part = Scaled(layer(), torch.tensor(3.0))
    session = open_session(graphs, part)
    for rows in (1, 2, 3, 4, 5):
        for _ in range(2):
            call(session, part, numbers(0, rows))
        assert graphs.nbytes <= 300
    assert 1 <= len(graphs) < 5
    for _ in range(2):
        expect(part, numbers(0, 100), call(session, part, numbers(0, 100)))
    assert len(graphs) == 1
    assert graphs.nbytes > 300
    graphs.clear()
    assert (len(graphs), graphs.nbytes) == (0, 0)


def test_graphs_end_with_their_network() -> None:
    recorder = StandIn()
    graphs, part = Graphs(recorder), Scaled(layer(), torch.tensor(3.0))
    call(open_session(graphs, part), part, numbers(0))  # a graph of CUDA keeps no Python alive, the tape does
    assert len(graphs) == 1
    del part
    gc.collect()
    assert len(graphs) == 0


def test_weights_live_as_long_as_the_session_that_reads_them() -> None:
    graphs, part = Graphs(StandIn()), Scaled(layer(), torch.tensor(3.0))
    session = open_session(graphs, part)
    before = part.network.weight.clone()
    for seed in range(2):
        call(session, part, numbers(seed))
    part.network.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    found = call(session, part, numbers(5))  # by the weights that the session began with
    torch.testing.assert_close(found, (numbers(5) @ before.T + part.network.bias) * 3)
    expect(part, numbers(5), call(open_session(graphs, part), part, numbers(5)))


def test_tables_that_are_not_inputs_are_kept() -> None:
    @dataclass
    class Table:
        values: Tensor

    recorder, graphs = StandIn(), Graphs(StandIn())
    graphs.recorder = recorder
    for seed in range(4):
        table = Table(numbers(7))  # another of the same values at each call
        session = graphs.session(CPU, [], "table", kept=(table,))
        found = session.call("add", lambda kept, _, given: (given[0] + kept[0].values,), (numbers(seed),))
        torch.testing.assert_close(found[0], numbers(seed) + numbers(7))
        del table, session, found
        gc.collect()
    assert recorder.records == 1


def plain(x: Tensor) -> Tensor:
    return x


def test_what_cannot_be_captured_is_named() -> None:
    graphs = Graphs(StandIn())
    with pytest.raises(CannotCaptureError, match="plain does not say which tensors it reads"):
        graphs.session(CPU, [plain], "")
    part = Scaled(nn.Sequential(layer(), nn.Dropout()), torch.tensor(1.0))
    with pytest.raises(CannotCaptureError, match=r"Sequential.* is in training mode.*call eval\(\)"):
        open_session(graphs, part)
    part.network.eval()
    open_session(graphs, part)
    handle = part.network[0].register_forward_hook(lambda *_: None)  # type: ignore[index]
    with pytest.raises(CannotCaptureError, match=r"a hook watches Sequential\.0, .*remove it"):
        open_session(graphs, part)
    handle.remove()
    with pytest.raises(CannotCaptureError, match="weights of Sequential are on cpu, not meta"):
        graphs.session(torch.device("meta"), [part], "")
    with pytest.raises(ValueError, match="most 0 must be at least 1"):
        Graphs(StandIn(), most=0)


def test_after_a_failed_recording_the_same_function_runs_without_graphs() -> None:
    graphs, part = Graphs(StandIn()), Scaled(layer(), torch.tensor(3.0))
    session = open_session(graphs, part)

    def function(_kept: Any, inputs: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0] * inputs[0] * float(given[0].sum()),)

    def run(seed: int) -> None:
        x = numbers(seed)
        found = session.call("looks", function, (x,))[0]
        torch.testing.assert_close(found, x * 3 * float(x.sum()))

    run(0)
    with pytest.warns(UserWarning, match="without a CUDA graph: recording failed: .*not permitted"):
        run(1)
    run(2)
    assert len(graphs) == 0
    with pytest.raises(CannotCaptureError, match="recording failed"):
        open_session(graphs, part)
    other = Scaled(layer(), torch.tensor(2.0))  # a network that is not to blame
    for seed in range(3):
        expect(other, numbers(seed), call(open_session(graphs, other), other, numbers(seed)))
    assert len(graphs) == 1


def test_threads_do_not_disturb_one_another() -> None:
    graphs, network = Graphs(StandIn()), layer()
    wrong: list[int] = []

    def work(number: int) -> None:
        part = Scaled(network, torch.tensor(float(number)))
        session = open_session(graphs, part)
        for seed in range(20):
            x = numbers(seed)
            if not torch.equal(call(session, part, x), network(x) * number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
