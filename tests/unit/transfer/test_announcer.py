from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.coder import FakeCoder
from tests.fakes.engines import make_layout
from tests.fakes.memory import FakeMemory
from tests.fakes.network import FakeNetwork
from vllm_pd_plugin.codecs.codec import Codec
from vllm_pd_plugin.ids import Address, Incarnation, new_handoff_id, new_incarnation
from vllm_pd_plugin.memory.layout import BlockTables
from vllm_pd_plugin.packing.packer import Packer
from vllm_pd_plugin.packing.pieces import Pieces
from vllm_pd_plugin.packing.staging import ALIGNMENT, Staging
from vllm_pd_plugin.protocol import framing, wire
from vllm_pd_plugin.transfer.announcer import (
    POLL_INTERVAL_S,
    Announcement,
    Announcer,
    Mark,
    layers_worth_a_message,
)

CONTROL: Address = ("127.0.0.1", 7001)
ENGINE, WORKER = new_incarnation(), new_incarnation()
RANK = 3


def digest_of(tables: BlockTables, first_token: int, num_tokens: int) -> bytes:
    return repr((tables, first_token, num_tokens)).encode()


@dataclasses.dataclass
class Stream:
    """Where a GPU's stream has got to."""

    reached: bool = False

    def __call__(self) -> bool:
        return self.reached


class Control:
    """An engine's control plane, and what its worker has told it."""

    def __init__(self, network: FakeNetwork) -> None:
        self.heard: list[wire.Message] = []
        self.worker = b""
        network.listen(CONTROL, self._receive)

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        header, message = framing.decode(frames)
        assert (header.sender, header.target) == (WORKER, ENGINE)
        self.heard.append(message)
        self.worker = identity


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork()


@pytest.fixture
def control(network: FakeNetwork) -> Control:
    return Control(network)


@pytest.fixture
def announcer(network: FakeNetwork, control: Control) -> Announcer:
    announcer = Announcer(WORKER, RANK, digest_of, None, network.connect)
    connect(announcer, network, control)
    return announcer


def connect(announcer: Announcer, network: FakeNetwork, control: Control) -> None:
    """Connect it; the greeting, of a step that is none, tells the control plane where it is."""
    announcer.connect(CONTROL, ENGINE)
    network.deliver()
    assert control.heard == [wire.Announce(0, RANK, 0)]
    control.heard.clear()


def mark(step: int, num_layers: int, stream: Stream) -> Mark:
    return Mark(Announcement(step, ((2, 4),)), num_layers, stream)


def test_a_mark_is_announced_once_it_is_reached_and_not_before(
    announcer: Announcer, network: FakeNetwork, control: Control
) -> None:
    stream = Stream()
    announcer.add(mark(7, 2, stream))
    assert announcer.turn() == POLL_INTERVAL_S
    assert network.deliver() == 0
    stream.reached = True
    assert announcer.turn() is None
    network.deliver()
    assert control.heard == [wire.Announce(7, RANK, 2)]
    assert announcer.turn() is None
    assert network.deliver() == 0


def test_marks_are_announced_in_order(
    announcer: Announcer, network: FakeNetwork, control: Control
) -> None:
    streams = [Stream() for _ in range(4)]
    places = [(7, 2), (7, 4), (8, 2), (8, 4)]
    for (step, layers), stream in zip(places, streams, strict=True):
        announcer.add(mark(step, layers, stream))
    streams[1].reached = streams[2].reached = True  # behind one that is not
    assert announcer.turn() == POLL_INTERVAL_S
    assert network.deliver() == 0
    streams[0].reached = True
    assert announcer.turn() == POLL_INTERVAL_S
    network.deliver()
    assert control.heard == [wire.Announce(*m) for m in [(7, RANK, 2), (7, RANK, 4), (8, RANK, 2)]]
    streams[3].reached = True
    assert announcer.turn() is None
    network.deliver()
    assert control.heard[-1] == wire.Announce(8, RANK, 4)
    assert len(control.heard) == 4


def test_an_announcer_without_marks_lets_the_thread_sleep(announcer: Announcer) -> None:
    assert announcer.turn() is None


def test_all_announcements_share_one_link(
    announcer: Announcer, network: FakeNetwork, control: Control
) -> None:
    for step in range(5):
        announcer.add(mark(step, 4, Stream(reached=True)))
        announcer.turn()
    assert network.open_links(CONTROL) == 1
    announcer.close()
    assert network.open_links(CONTROL) == 0


def test_an_announcer_that_never_spoke_has_nothing_to_close(network: FakeNetwork) -> None:
    Announcer(WORKER, RANK, digest_of, None, network.connect).close()
    assert network.links == {}


def test_an_engine_that_only_waits_is_woken(
    announcer: Announcer, network: FakeNetwork, control: Control
) -> None:
    announcer.nudge()
    network.deliver()
    assert control.heard == [wire.Nudge()]


# --- packing ---------------------------------------------------------------------------------

HANDOFF = new_handoff_id()
RUNS = (wire.LayerRun(2, 0, 2),)


def stage_of(number: int) -> wire.Stage:
    pack = wire.Pack(HANDOFF, 0, RANK, RANK, number, Codec.RAW, 8, RUNS, False)
    return wire.Stage(pack, ((3, 4),), Incarnation("consumer"))


@pytest.fixture
def staging() -> Staging:
    return Staging(4 * ALIGNMENT)


@pytest.fixture
def packing(network: FakeNetwork, control: Control, staging: Staging) -> Announcer:
    """An announcer with a packer."""
    memory = FakeMemory(make_layout())
    pieces = Pieces(memory.layout, memory.regions)
    packer = Packer(pieces, staging, FakeCoder(memory, 4 * ALIGNMENT))
    announcer = Announcer(WORKER, RANK, digest_of, packer, network.connect)
    connect(announcer, network, control)
    return announcer


def say(network: FakeNetwork, control: Control, message: wire.ToWorker) -> None:
    network.answer(control.worker, framing.encode(message, ENGINE, WORKER))
    network.deliver()


def packed_numbers(control: Control) -> list[int]:
    numbers = []
    for message in control.heard:
        assert isinstance(message, wire.Staged)
        assert message.packed is not None
        numbers.append(message.packed.number)
    return numbers


def test_a_piece_is_packed_in_a_turn_and_the_next_at_once(
    packing: Announcer, network: FakeNetwork, control: Control
) -> None:
    for number in (1, 2):
        say(network, control, stage_of(number))
    assert packing.turn() == 0.0
    network.deliver()
    assert packed_numbers(control) == [1]
    assert packing.turn() == 0.0
    assert packing.turn() is None
    network.deliver()
    assert packed_numbers(control) == [1, 2]


def test_what_is_reached_is_announced_before_a_piece_is_packed(
    packing: Announcer, network: FakeNetwork, control: Control
) -> None:
    say(network, control, stage_of(1))
    packing.add(mark(7, 4, Stream(reached=True)))
    packing.turn()
    network.deliver()
    assert [type(message) for message in control.heard] == [wire.Announce, wire.Staged]


def test_marks_are_waited_for_while_a_piece_waits_for_room(
    packing: Announcer, network: FakeNetwork, control: Control, staging: Staging
) -> None:
    staging.take(4 * ALIGNMENT)
    say(network, control, stage_of(1))
    assert packing.turn() is None
    packing.add(mark(7, 4, Stream()))
    assert packing.turn() == POLL_INTERVAL_S


@pytest.mark.parametrize("number", [1, None])
def test_a_piece_is_given_back_when_the_control_plane_says_so(
    packing: Announcer,
    network: FakeNetwork,
    control: Control,
    staging: Staging,
    number: int | None,
) -> None:
    say(network, control, stage_of(1))
    packing.turn()
    assert staging.taken_bytes == ALIGNMENT
    whose = () if number is None else (Incarnation("consumer"), RANK, number)
    say(network, control, wire.Unstage(HANDOFF, *whose))
    assert staging.taken_bytes == 0


def test_everything_is_given_back_when_the_engine_hands_nothing_off_any_more(
    packing: Announcer, network: FakeNetwork, control: Control, staging: Staging
) -> None:
    for number in (1, 2):
        say(network, control, stage_of(number))
    packing.turn()
    packing.set_lending(True)
    assert staging.taken_bytes == ALIGNMENT
    packing.set_lending(False)
    assert staging.taken_bytes == 0
    assert packing.turn() is None


def test_without_staging_memory_nothing_is_packed(
    announcer: Announcer, network: FakeNetwork, control: Control
) -> None:
    say(network, control, stage_of(1))
    say(network, control, wire.Unstage(HANDOFF))
    announcer.set_lending(False)
    assert announcer.turn() is None
    assert network.deliver() == 0


# --- how often -------------------------------------------------------------------------------

LAYERS = st.integers(1, 200)
BYTES = st.integers(1, 2**40)


@given(LAYERS, st.integers(0, 2**40), BYTES)
def test_the_last_announcement_is_that_of_all_layers(
    num_layers: int, layer_bytes: int, stretch_bytes: int
) -> None:
    after = layers_worth_a_message(num_layers, layer_bytes, stretch_bytes)
    assert after[-1] == num_layers


@given(LAYERS, st.integers(0, 2**40), BYTES)
def test_announcements_ascend_and_none_is_of_no_layer(
    num_layers: int, layer_bytes: int, stretch_bytes: int
) -> None:
    after = (0, *layers_worth_a_message(num_layers, layer_bytes, stretch_bytes))
    assert all(a < b for a, b in zip(after, after[1:], strict=False))


@given(LAYERS, BYTES, BYTES)
def test_each_stretch_is_of_the_wanted_size_at_least_when_the_whole_is(
    num_layers: int, layer_bytes: int, stretch_bytes: int
) -> None:
    after = (0, *layers_worth_a_message(num_layers, layer_bytes, stretch_bytes))
    sizes = [(b - a) * layer_bytes for a, b in zip(after, after[1:], strict=False)]
    assert len(sizes) == 1 or min(sizes) >= stretch_bytes


@given(LAYERS, BYTES, BYTES)
def test_no_stretch_is_more_than_twice_what_it_need_be(
    num_layers: int, layer_bytes: int, stretch_bytes: int
) -> None:
    after = (0, *layers_worth_a_message(num_layers, layer_bytes, stretch_bytes))
    enough = -(-stretch_bytes // layer_bytes)
    assert max(b - a for a, b in zip(after, after[1:], strict=False)) < 2 * enough


@pytest.mark.parametrize(
    ("num_layers", "layer_bytes", "stretch_bytes", "expected"),
    [
        (4, 10, 1, (1, 2, 3, 4)),
        (4, 10, 10, (1, 2, 3, 4)),
        (4, 10, 20, (2, 4)),
        (5, 10, 20, (2, 5)),
        (4, 10, 40, (4,)),
        (4, 10, 41, (4,)),
        (4, 0, 1, (4,)),
    ],
)
def test_what_remains_at_the_end_is_no_stretch_of_its_own(
    num_layers: int, layer_bytes: int, stretch_bytes: int, expected: tuple[int, ...]
) -> None:
    assert layers_worth_a_message(num_layers, layer_bytes, stretch_bytes) == expected


def test_blocks_are_examined_when_the_control_plane_asks(
    announcer: Announcer, network: FakeNetwork, control: Control
) -> None:
    check = wire.Check(new_handoff_id(), 0, RANK, RANK, 4, 16)
    network.answer(control.worker, framing.encode(wire.Examine(check, ((1, 2),)), ENGINE, WORKER))
    network.deliver()
    assert control.heard == [wire.Examined(check, digest_of(((1, 2),), 4, 16))]
