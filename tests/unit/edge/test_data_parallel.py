"""Several engine cores behind one server: to peers and frontends each is an engine of its own."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_pd_plugin.edge import hooks
from vllm_pd_plugin.engine_port.messages import DESCRIPTION_PATH
from vllm_pd_plugin.errors import UnsupportedError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.config import ParallelConfig
    from vllm.entrypoints.launchers import app as launcher
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core_client import AsyncMPClient, DPAsyncMPClient, DPLBAsyncMPClient
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from vllm_pd_plugin.edge.geometry import control_port

UTILITY = EngineCoreRequestType.UTILITY.value


def connected_to(cls: type[AsyncMPClient], num_cores: int) -> Any:
    """Return vLLM's client of so many engine cores, which answer with their rank."""
    client: Any = cls.__new__(cls)
    cores = [rank.to_bytes(2, "little") for rank in range(num_cores)]

    async def send(message: tuple[Any, ...], core: bytes) -> None:
        kind, *frames = message
        assert kind == UTILITY
        _, call_id, method, arguments = MsgpackDecoder().decode(frames)
        assert (method, arguments) == ("pd_describe_engine", [])
        answer = {"data_parallel_rank": int.from_bytes(core, "little")}
        # The last of them answers first.
        client.utility_results.pop(call_id)
        future = futures[call_id]
        asyncio.get_running_loop().call_later(
            0.01 * (num_cores - cores.index(core)), future.set_result, answer
        )

    futures: dict[int, asyncio.Future[Any]] = {}

    class Results(dict[int, asyncio.Future[Any]]):
        def __setitem__(self, call_id: int, future: asyncio.Future[Any]) -> None:
            futures[call_id] = future
            super().__setitem__(call_id, future)

    vars(client).update(
        core_engines=cores,
        client_index=0,
        encoder=MsgpackEncoder(),
        utility_results=Results(),
        _send_input_message=send,
        _ensure_output_queue_task=lambda: None,
        resources=SimpleNamespace(),
        _finalizer=lambda: None,
    )
    return client


async def page_of(client: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what an API server with this client answers."""
    routes: dict[str, Any] = {}
    app = SimpleNamespace(
        state=SimpleNamespace(engine_client=SimpleNamespace(engine_core=client)),
        add_api_route=lambda path, endpoint, methods: routes.update({path: endpoint}),
    )
    monkeypatch.setattr(launcher, "register_api_routers", lambda *args, **kwargs: None)
    monkeypatch.delattr(launcher, hooks._MARK, raising=False)
    hooks.add_description_route()
    launcher.register_api_routers(None, app)
    monkeypatch.delattr(launcher, hooks._MARK)
    return await routes[DESCRIPTION_PATH]()


@pytest.mark.parametrize(
    ("cls", "num_cores"),
    [(AsyncMPClient, 1), (DPAsyncMPClient, 1), (DPLBAsyncMPClient, 2), (DPLBAsyncMPClient, 4)],
    ids=["one", "outer balancer", "two", "four"],
)
def test_the_page_has_every_engine_core_of_vllm_s_client(
    cls: type[AsyncMPClient], num_cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = asyncio.run(page_of(connected_to(cls, num_cores), monkeypatch))
    assert page == [{"data_parallel_rank": rank} for rank in range(num_cores)]


def of_rank(rank: int, size: int, is_moe: bool) -> Any:
    """Return the configuration that an engine core has, as ``run_engine_core`` makes it."""
    parallel = ParallelConfig(data_parallel_size=size)
    parallel.data_parallel_index = rank
    if is_moe:
        parallel.data_parallel_rank = rank
    else:
        parallel.reconfigure_for_independent_dp_rank()
    return SimpleNamespace(parallel_config=parallel)


@pytest.mark.parametrize("is_moe", [False, True], ids=["dense", "MoE"])
def test_each_rank_s_control_channel_has_a_port_of_its_own(is_moe: bool) -> None:
    """Ranks of a dense model are told that they are alone, but for their number."""
    ports = [control_port(of_rank(rank, 4, is_moe), 5700) for rank in range(4)]
    assert ports == [5700, 5701, 5702, 5703]
    assert [control_port(of_rank(rank, 4, is_moe), 0) for rank in range(4)] == [0] * 4


def test_there_must_be_a_port_for_each() -> None:
    everything = SimpleNamespace(parallel_config=ParallelConfig(data_parallel_size=4))
    vllm_config: Any = everything
    assert control_port(vllm_config, 65532) == 65532
    with pytest.raises(UnsupportedError, match="use 65532 or less"):
        control_port(vllm_config, 65533)
