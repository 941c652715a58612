"""What all suites share: options, the record of the run, and the comparison of a case with a peer."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.machine import facts
from bench.networks import Case
from bench.parity import PEER_FACTOR, ParityError
from bench.peers.runtimes import Unavailable, forget, prepare
from bench.place import DEVICES, Place
from bench.rows import Labels, Record, SpeedRow
from bench.subject import Subject
from bench.timing import Call, fight

RECORD = pytest.StashKey[Record]()
SECONDS, OPS_SECONDS, QUICK_SECONDS = 6.0, 2.0, 0.5


@dataclass(frozen=True)
class Contest:
    """A case and its networks."""

    name: str
    subject: Subject

    @functools.cached_property
    def our_error(self) -> float:
        """Ours as a part of what is allowed, for the inputs that everybody gets.

        Raises:
            ParityError: it is more than that.
        """
        return self.subject.gate(self.name, "ours", self.subject.ours())


Measure = Callable[[Labels, Call, Call, tuple[float, float]], None]
Compare = Callable[[Contest, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suites' options."""
    group = parser.getgroup("glide_fast")
    group.addoption("--quick", action="store_true", help="reduced shapes, about a minute in all")
    group.addoption("--device", choices=DEVICES, default="cpu", help="rehearsal: as on a GPU, on the CPU")
    group.addoption("--seconds", type=float, help="for the pairs of one case and peer")
    group.addoption("--rows", type=Path, help="write the rows to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the record."""
    config.stash[RECORD] = Record(quick=config.getoption("--quick"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Write the record after every case, so that a run that is stopped keeps what it measured."""
    _save(item.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record, also of a run without cases."""
    _save(session.config)


def _save(config: pytest.Config) -> None:
    path = config.getoption("--rows")
    if path is not None:
        config.stash[RECORD].save(path)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of a module's ``cases(quick=...)`` and each of its peers."""
    if "contest" not in metafunc.fixturenames:
        return
    place = Place.of(metafunc.config.getoption("--device"))
    cases: list[Case] = metafunc.module.cases(quick=metafunc.config.getoption("--quick"), place=place)
    pairs = [(case, peer) for case in cases for peer in case.peers]
    names = [f"{case.name} | {peer}" for case, peer in pairs]
    metafunc.parametrize(("contest", "peer"), pairs, indirect=["contest"], ids=names, scope="module")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """The record of the run, with the facts about this machine."""
    record: Record = request.config.stash[RECORD]
    place = Place.of(request.config.getoption("--device"))
    record.facts = record.facts or dict(facts(place.device))
    return record


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Place:
    """Where the run is made."""
    return Place.of(request.config.getoption("--device"))


@pytest.fixture(scope="module")
def contest(request: pytest.FixtureRequest) -> Iterator[Contest]:
    """A case's networks, in memory while it is compared with its peers."""
    case: Case = request.param
    yield Contest(case.name, case.build())
    gc.collect()


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> str:
    """The name of the suite: models, of bench_models.py."""
    return request.path.stem.removeprefix("bench_").replace("_", " ")


@pytest.fixture
def measure(request: pytest.FixtureRequest, record: Record, suite: str, place: Place) -> Measure:
    """Time two calls in pairs and keep the row, in the record and in pytest-benchmark's."""
    quick = request.config.getoption("--quick")
    usual = QUICK_SECONDS if quick else OPS_SECONDS if suite == "ops" else SECONDS
    seconds = request.config.getoption("--seconds") or usual

    def run(labels: Labels, ours: Call, theirs: Call, errors: tuple[float, float]) -> None:
        benchmark: BenchmarkFixture = request.getfixturevalue("benchmark")
        duel = fight(benchmark, ours, theirs, seconds=seconds, place=place)
        row = SpeedRow.of(labels, duel, errors, record.facts)
        record.speed.append(row)
        benchmark.group = labels.case
        benchmark.extra_info |= {**asdict(row), **record.facts}

    return run


@pytest.fixture
def compare(record: Record, suite: str, measure: Measure) -> Iterator[Compare]:
    """Prepare a peer, hold both sides to the truth, then time them.

    Ours being wrong fails the test; a peer that cannot do the case, or not to float32's precision, is noted.
    """

    def run(contest: Contest, peer: str) -> None:
        name, subject = contest.name, contest.subject
        plain = subject.plain if peer == "upstream" else subject.needed
        try:
            error = contest.our_error
        except ParityError as red:
            record.red.append(str(red))
            raise
        try:
            theirs = partial(prepare(peer, plain), *plain.inputs)
            peer_error = subject.gate(name, peer, theirs(), factor=PEER_FACTOR)
        except (Unavailable, ParityError) as reason:
            record.absent.append((name, peer, str(reason)))
            pytest.skip(str(reason))
        labels = Labels(suite=suite, case=name, peer=peer, work=subject.flops, intensity=subject.intensity)
        measure(labels, subject.ours, theirs, (error, peer_error))

    yield run
    forget()
    gc.collect()
