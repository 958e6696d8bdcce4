"""What engines give out while vLLM's output handler is busy with what they gave out before."""

from __future__ import annotations

import asyncio
import warnings

from tests.fakes.series import newly_registered

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm import envs

    from tests.fakes.links import SkippingLoop
    from tests.fakes.streaming_server import Client
    from vllm_pd_plugin.frontend.lag import Lag


def test_outputs_that_wait_for_the_output_handler_are_kept_and_count_as_lag() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SkippingLoop)
        client = Client()
        engine = client.engine()
        num_requests = envs.VLLM_V1_OUTPUT_PROC_CHUNK_SIZE + 1  # others have their turn within
        collectors = [await client.begin(f"r{number}") for number in range(num_requests)]
        for token in (50, 51, 52):
            client.give(engine, token)
        lags: list[float] = []
        for _ in range(12):
            await asyncio.sleep(0)
            loop.now += 2.0
            lag = Lag(client.dispatch.lag.worst_s)
            lag.for_client(loop.now - 60.0)
            lag.note(loop.now - 60.0, 60.0, loop.now)
            lags.append(lag.seconds)
        assert max(lags) >= 1.9
        assert lags[-1] == 0.0, "all is done"
        given = [collector.get_nowait() for collector in collectors]
        assert all(each is not None for each in given)
        tokens = [each.outputs[0].token_ids for each in given if each is not None]  # type: ignore[union-attr]
        assert tokens == [[50, 51, 52]] * num_requests
        await client.close()

    with newly_registered(), asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(story())
