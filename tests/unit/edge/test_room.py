"""vLLM's scheduler, and requests whose KV comes from elsewhere."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        SupportsHMA,
    )
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    from vllm_pd_plugin.edge import room
    from vllm_pd_plugin.edge.connector import PdConnector
    from vllm_pd_plugin.edge.hooks import end_abandoned_requests
    from vllm_pd_plugin.simulation.shape import Shape

SAMPLED = 7


class Loading(KVConnectorBase_V1, SupportsHMA):
    """Has all KV of every request that asks for it; the next token, too, if that is asked for."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        self.failed: set[str] = set()
        self.unwanted: list[str] = []
        self.hopeless: list[str] = []
        self.loading: dict[str, Request] = {}

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None: ...

    def on_new_request(self, request: Request) -> None: ...

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        if request.request_id in self.failed:
            return 0, False
        return request.num_tokens - num_computed_tokens, True

    def update_state_after_alloc(
        self, request: Request, blocks: Any, num_external_tokens: int
    ) -> None:
        if num_external_tokens:
            self.loading[request.request_id] = request

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def update_connector_output(self, connector_output: Any) -> None:
        self.failed |= connector_output.failed_recving or set()
        for name in connector_output.finished_recving or ():
            request = self.loading.pop(name)
            assert request.kv_transfer_params is not None
            if request.kv_transfer_params.get("seed_first_token"):
                request._all_token_ids.append(SAMPLED)
                request.num_prompt_tokens += 1
                request.update_block_hashes()

    def take_abandoned(self) -> tuple[list[str], list[str]]:
        return self.unwanted, self.hopeless

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        return False, None

    def get_kv_connector_stats(self) -> None: ...

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...


class Ours(Loading, PdConnector):
    """The same, as ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.receiving: set[str] = set()  # another hook's, where that has been set up


class Engine:
    """vLLM's scheduler over a small pool; ``answers`` has the number of tokens of each request."""

    def __init__(
        self, num_blocks: int, window: int | None = None, connector: type[Loading] = Ours
    ) -> None:
        room.mend()
        end_abandoned_requests()
        shape = Shape("decode", num_blocks, window=window, recomputes=True, step_tokens=32)
        config = shape.vllm_config("engine")
        assert config.kv_transfer_config is not None
        config.kv_transfer_config.kv_connector = connector.__name__
        config.kv_transfer_config.kv_connector_module_path = __name__
        size = shape.block_tokens
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(size, sha256)
        structured = StructuredOutputManager(config)
        self.scheduler = Scheduler(config, shape.kv_cache_config(), structured, size, size)
        self.answers: dict[str, int] = {}

    def add(self, name: str, num_tokens: int, seeds: bool = False) -> None:
        params = {"do_remote_prefill": True, "seed_first_token": seeds}
        extra = {"kv_transfer_params": params}
        asked = SamplingParams(max_tokens=2, temperature=0, extra_args=extra)
        first = 100 * len(self.scheduler.requests)
        prompt = list(range(first, first + num_tokens))
        hasher = self._hasher
        request = Request(name, prompt, asked, None, arrival_time=0.0, block_hasher=hasher)
        self.scheduler.add_request(request)

    @property
    def connector(self) -> Loading:
        connector = self.scheduler.connector
        assert isinstance(connector, Loading)
        return connector

    @property
    def loading(self) -> set[str]:
        return set(self.connector.loading)

    def step(self, came: str = "", failed: str = "") -> None:
        """Do a step, in which one load has ended well, and one has failed."""
        scheduled = self.scheduler.schedule()
        names = list(scheduled.num_scheduled_tokens)
        tokens = []
        for name in names:
            request = self.scheduler.requests[name]
            is_whole = request.num_computed_tokens >= request.num_tokens
            tokens.append([SAMPLED] if is_whole else [])
            self.answers[name] = self.answers.get(name, 0) + is_whole
        ended = KVConnectorOutput(
            finished_recving={n for n in (came, failed) if n},
            failed_recving={failed} if failed else None,
        )
        index = {name: i for i, name in enumerate(names)}
        output = ModelRunnerOutput(names, index, tokens, kv_connector_output=ended)
        outputs = self.scheduler.update_from_output(scheduled, output)
        self.given_out = [
            (out.request_id, out.new_token_ids, str(out.finish_reason))
            for each in outputs.values()
            for out in each.outputs
        ]

    def run(self) -> dict[str, int]:
        for _ in range(20):
            self.step()
        return self.answers


# --- a token that comes with the KV ----------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "window", "other"), [(16, None, 17), (26, 6, 40)])
def test_a_load_is_let_in_only_if_those_before_it_have_room_for_the_token_they_go_on_after(
    num_blocks: int, window: int | None, other: int
) -> None:
    engine = Engine(num_blocks, window)
    engine.add("seeded", 40, seeds=True)
    engine.add("other", other)
    engine.step()
    assert engine.loading == {"seeded"}
    engine.step(came="seeded")
    engine.run()
    assert engine.answers == {"seeded": 2}
    assert engine.loading == {"other"}
    engine.step(came="other")
    assert engine.run() == {"seeded": 2, "other": 2}


def test_a_load_is_let_in_only_if_it_has_room_for_the_token_it_goes_on_after() -> None:
    engine = Engine(11)
    engine.add("seeded", 40, seeds=True)
    engine.step()
    assert engine.loading == set()


def test_a_load_without_such_a_token_needs_no_more_room_than_its_prompt() -> None:
    engine = Engine(16)
    engine.add("one", 40)
    engine.add("other", 17)
    engine.step()
    assert engine.loading == {"one", "other"}


# --- a load that has failed ------------------------------------------------------------------


def failed_before_one_that_came(connector: type[Loading]) -> Engine:
    """In a sliding window a load needs less room than the computation that takes its place."""
    engine = Engine(26, window=6, connector=connector)
    engine.add("failed", 31)
    engine.add("came", 40)
    engine.step()
    assert engine.loading == {"failed", "came"}
    engine.step(failed="failed")
    engine.step(came="came")
    return engine


def test_what_has_come_does_not_wait_for_one_that_failed_and_has_no_room_to_be_computed() -> None:
    engine = failed_before_one_that_came(Ours)
    assert engine.run() == {"came": 2, "failed": 2}


def test_alone_vllm_parks_both_for_ever() -> None:
    """When this fails, vLLM has mended it."""
    engine = failed_before_one_that_came(Loading)
    assert engine.run() == {}


# --- one that must not be computed here ------------------------------------------------------


def computing() -> Engine:
    engine = Engine(16)
    engine.add("r", 17)
    engine.step()
    engine.step(came="r")
    return engine


def test_nothing_is_given_out_of_a_step_that_computes_what_must_not_be_computed_here() -> None:
    engine = computing()
    engine.connector.hopeless = ["r"]
    engine.step()
    assert engine.given_out == [("r", [], "error")]


def test_what_a_step_has_sampled_is_given_out_although_nobody_wants_the_rest() -> None:
    engine = computing()
    engine.connector.unwanted = ["r"]
    engine.step()
    assert engine.given_out == [("r", [SAMPLED], "None"), ("r", [], "error")]
