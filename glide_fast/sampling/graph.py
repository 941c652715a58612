"""Graphs of sampling steps: what a function does on the device is recorded once and then replayed as a whole.

At small batches a GPU waits for the hundreds of launches of a step; a CUDA graph is one launch. A graph is
made of addresses: it reads its own input tensors, into which each call's are copied, and the weights where
they were. So it is only made of functions that name every tensor they read (:class:`Capturable`), and made
anew when weights have moved. What cannot be recorded is run as it is: the graph holds the very same function.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

Unit = Literal["step", "loop"]
Tensors = tuple[Tensor, ...]
Kept = tuple[object, ...]
Function = Callable[[Kept, Tensors, Tensors], Tensors]
Self = TypeVar("Self", bound="Capturable")
MOST_GRAPHS = 8


class CannotCaptureError(RuntimeError):
    """A graph cannot be made; the message says of what, and why."""


class Capturable(ABC):
    """A function of tensors that names everything else it depends on."""

    @property
    @abstractmethod
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks whose weights it reads."""

    @property
    @abstractmethod
    def inputs(self) -> Tensors:
        """The other tensors it reads besides its arguments, always in the same order."""

    @property
    @abstractmethod
    def recipe(self) -> Hashable:
        """What it computes of its arguments, inputs and networks: with equal recipes it is the same."""

    @abstractmethod
    def reading(self: Self, inputs: Sequence[Tensor]) -> Self:
        """The same function of other ``inputs``."""


def capturable(function: object) -> Capturable:
    """``function``, if it is capturable.

    Raises:
        CannotCaptureError: it is not; names it.
    """
    if isinstance(function, Capturable):
        return function
    name = getattr(function, "__qualname__", type(function).__qualname__)
    raise CannotCaptureError(
        f"{name} does not say which tensors it reads and may decide or differentiate at each step; "
        "use Conditioned, classifier_free and keep_known"
    )


class Recording(Protocol):
    """What was recorded; ``nbytes`` of device memory belong to it, where that is known."""

    nbytes: int | None

    def replay(self) -> None:
        """Do it again, on what the same addresses hold now."""


class Recorder(Protocol):
    """Records what a function does on the device: CUDA's graphs, or a stand-in."""

    def serves(self, device: torch.device) -> bool:
        """Whether work on the device can be recorded."""

    def place(self, device: torch.device) -> Hashable:
        """Where and in which order work on the device is done at the moment: a graph is for one such place.

        Raises:
            CannotCaptureError: nothing can be recorded there now.
        """

    def room(self, device: torch.device) -> int | None:
        """Bytes that graphs may take there; None where that is not known."""

    def warm_up(self, device: torch.device, function: Callable[[], Tensors]) -> Tensors:
        """Call the function where it would be recorded, so that all it loads, tunes and keeps is there."""

    def record(self, device: torch.device, function: Callable[[], Tensors]) -> tuple[Recording, Tensors]:
        """The recording of one call, and its results, which each replay writes anew.

        Raises:
            RuntimeError: it cannot be recorded.
        """


@dataclass(kw_only=True)
class _Graph:
    """A function's own inputs and arguments, the recording and what a replay leaves in ``outputs``.

    ``reader`` is the session whose inputs are there. The networks are not kept alive.
    """

    signature: Hashable
    networks: tuple[weakref.ref[nn.Module], ...]
    kept: Kept
    inputs: Tensors
    arguments: Tensors
    outputs: Tensors = ()
    recording: Recording | None = None
    is_warm: bool = False
    reader: object = None

    @property
    def nbytes(self) -> int:
        """Device memory, as far as it is known."""
        own = sum(tensor.nbytes for tensor in (*self.inputs, *self.arguments))
        return own + (0 if self.recording is None else self.recording.nbytes or 0)


class Graphs:
    """The graphs of a process, the latest used: at most ``most``, and at most ``most_bytes`` of memory.

    ``unit`` is what a graph holds, a "step" or the whole "loop" of a sampler, which needs all noise at once
    and one graph for each number of steps. None as ``most_bytes`` is what the recorder has room for. The
    first call of a function is made without a graph, the second records it. Several threads may share them.
    """

    def __init__(
        self,
        recorder: Recorder,
        unit: Unit = "step",
        *,
        most: int = MOST_GRAPHS,
        most_bytes: int | None = None,
    ) -> None:
        if most < 1:
            raise ValueError(f"most {most} must be at least 1; to sample without graphs, give none")
        self.recorder, self.unit = recorder, unit
        self.most, self.most_bytes = most, most_bytes
        self._failures: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Device memory of all graphs, as far as it is known."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        with self._lock:
            self._graphs.clear()

    def session(
        self, device: torch.device, parts: Sequence[object], recipe: Hashable, kept: Kept = ()
    ) -> Session:
        """For one call of a sampler: graphs of functions that read ``parts``, which must be capturable.

        ``recipe`` tells such functions apart that compute something else of the same parts; ``kept`` are
        objects that have further tensors to read, for equal recipes always of the same values. A graph keeps
        those of its first session, and its function is given them.

        Raises:
            CannotCaptureError: a part is not capturable, or a network is watched by a hook, trains, is on
                another device, or could not be recorded before.
        """
        if not self.recorder.serves(device):
            raise CannotCaptureError(f"the pictures are on {device}, where there are no graphs; move them")
        place = self.recorder.place(device)
        readers = [capturable(part) for part in parts]
        networks = tuple(network for reader in readers for network in reader.networks)
        for network in networks:
            if network in self._failures:
                raise CannotCaptureError(self._failures[network])
        inputs = tuple(tensor for reader in readers for tensor in reader.inputs)
        key = (
            place,
            recipe,
            tuple(reader.recipe for reader in readers),
            tuple(id(network) for network in networks),
            _shapes(inputs),
        )
        return Session(self, device, key, networks, inputs, kept)

    def call(self, session: Session, name: Hashable, function: Function, arguments: Tensors) -> Tensors:
        """``function(session.kept, session.inputs, arguments)``; see :meth:`Session.call`."""
        if session.failed:
            return function(session.kept, session.inputs, arguments)
        key = (session.key, name, _shapes(arguments))
        with self._lock, torch.inference_mode():
            graph = self._graph(key, session, arguments)
            _fill(graph.arguments, arguments)
            if graph.reader is not session.token:
                _fill(graph.inputs, session.inputs)
                graph.reader = session.token
            outputs = self._run(graph, session, function)
            return tuple(output.clone() for output in outputs)

    def _graph(self, key: Hashable, session: Session, arguments: Tensors) -> _Graph:
        graph = self._graphs.get(key)
        if graph is None or graph.signature != session.signature:
            graph = _Graph(
                signature=session.signature,
                networks=tuple(weakref.ref(each, self._forget(key)) for each in session.networks),
                kept=session.kept,
                inputs=_like(session.inputs, session.device),
                arguments=_like(arguments, session.device),
            )
            self._graphs[key] = graph
        graph.signature = session.signature  # one object, so that the next comparison is short
        self._graphs.move_to_end(key)
        return graph

    def _forget(self, key: Hashable) -> Callable[[object], None]:
        graphs = self._graphs

        def forget(_network: object) -> None:
            graphs.pop(key, None)

        return forget

    def _run(self, graph: _Graph, session: Session, function: Function) -> Tensors:
        def work() -> Tensors:
            return function(graph.kept, graph.inputs, graph.arguments)

        if not graph.is_warm:
            graph.is_warm = True
            results = self.recorder.warm_up(session.device, work)
            graph.signature = session.look()
            self._make_room(session.device)
            return results
        if graph.recording is None:
            try:
                graph.recording, graph.outputs = self.recorder.record(session.device, work)
            except RuntimeError as error:
                self._give_up(session, f"recording failed: {error}")
                return work()
            self._make_room(session.device)
        graph.recording.replay()
        return graph.outputs

    def _give_up(self, session: Session, reason: str) -> None:
        """Make no more graphs of the session's networks."""
        session.failed = True
        for network in session.networks:
            self._failures[network] = reason
        for key, graph in list(self._graphs.items()):
            if any(network() in self._failures for network in graph.networks):
                del self._graphs[key]
        warn_of(reason)

    def _make_room(self, device: torch.device) -> None:
        """Forget graphs, the longest unused first, until the bounds hold; the last one stays."""
        most = self.recorder.room(device) if self.most_bytes is None else self.most_bytes
        while len(self._graphs) > 1 and (
            len(self._graphs) > self.most or (most is not None and self.nbytes > most)
        ):
            self._graphs.popitem(last=False)


@dataclass(eq=False)
class Session:
    """The graphs for one call of a sampler, throughout which weights stay where the first step puts them."""

    graphs: Graphs
    device: torch.device
    key: Hashable
    networks: tuple[nn.Module, ...]
    inputs: Tensors
    kept: Kept
    token: object = field(default_factory=object)
    failed: bool = False

    def __post_init__(self) -> None:
        self.look()

    def look(self) -> Hashable:
        """Note where the weights are, and hold them, so that no callback frees what a graph reads.

        Raises:
            CannotCaptureError: a replay would not be what a network does.
        """
        seen = [_Seen.of(network, self.device) for network in self.networks]
        self._weights = [each.detach() for network in seen for each in network.tensors]
        self.signature = tuple(network.signature for network in seen)
        return self.signature

    def call(self, name: Hashable, function: Function, arguments: Tensors) -> Tensors:
        """``function(kept, inputs, arguments)``, by a replay where it was recorded; its results are copies.

        ``name`` stands for the function: with equal recipes, parts and names it computes the same. It must
        launch the same work each time, and draw no random numbers: noise is an argument.
        """
        return self.graphs.call(self, name, function, arguments)


def warn_of(reason: str) -> None:
    """Tell the user that sampling goes on without graphs."""
    warnings.warn(f"sampling goes on without a CUDA graph: {reason}", stacklevel=2)


class _Seen(NamedTuple):
    """A network's tensors, and all that must be as it is for a replay to be right."""

    tensors: list[Tensor]
    signature: Hashable

    @classmethod
    def of(cls, network: nn.Module, device: torch.device) -> _Seen:
        layers: list[object] = []
        tensors: list[Tensor] = []
        for module in network.modules():
            if module.training or module._forward_hooks or module._forward_pre_hooks:
                raise CannotCaptureError(_objection(network, module))
            layers += (id(module), type(module), module.__dict__.get("compute_dtype"))
            for own in (module._parameters, module._buffers):
                tensors += [tensor for tensor in own.values() if tensor is not None]
        for tensor in tensors:
            if tensor.device != device:
                kind = type(network).__name__
                raise CannotCaptureError(f"weights of {kind} are on {tensor.device}, not {device}; move them")
        places = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
        return cls(tensors, (tuple(layers), tuple(places)))


def _objection(network: nn.Module, module: nn.Module) -> str:
    name = next(name for name, each in network.named_modules() if each is module)
    where = f"{type(network).__name__}{'.' if name else ''}{name}"
    if module.training:
        return f"{where} is in training mode, where it may draw numbers; call eval()"
    return f"a hook watches {where}, and no replay would call it; remove it"


def _shapes(tensors: Sequence[Tensor]) -> Hashable:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _like(tensors: Sequence[Tensor], device: torch.device) -> Tensors:
    return tuple(torch.empty_like(tensor, device=device) for tensor in tensors)


def _fill(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)
