"""The same with Python's `LLM()`: one process prefills, another decodes.

    python examples/offline_llm.py MODEL

Each process owns one engine; what passes between them is the small dictionary
`kv_transfer_params`. The KV itself goes from engine to engine. Exit status 0 only if the answer
equals what the first engine gives alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

PROMPTS = [
    "The capital of France is",
    "The three primary colours are",
    "Water boils at a temperature of",
]


def make_engine(model: str, role: str, core: int) -> Any:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    return LLM(
        model,
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_transfer_config={"kv_connector": "pdplugin", "kv_role": role},
    )


def prefill(model: str, core: int, pipe: Connection) -> None:
    """Prefill every prompt, pass the handoffs on, then answer alone for comparison."""
    from vllm import SamplingParams

    engine = make_engine(model, "kv_producer", core)
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        extra_args={"kv_transfer_params": {"do_remote_decode": True}},
    )
    pipe.send([output.kv_transfer_params for output in engine.generate(PROMPTS, params)])
    pipe.recv()  # the blocks are held until the other side has them: the engine must keep running
    alone = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16))
    pipe.send([output.outputs[0].text for output in alone])
    engine.llm_engine.engine_core.shutdown()


def decode(model: str, core: int, pipe: Connection) -> None:
    """Fetch each prompt's KV and go on from there."""
    from vllm import SamplingParams

    engine = make_engine(model, "kv_consumer", core)
    pipe.send("ready")
    params = [
        SamplingParams(temperature=0, max_tokens=16, extra_args={"kv_transfer_params": handoff})
        for handoff in pipe.recv()
    ]
    pipe.send([output.outputs[0].text for output in engine.generate(PROMPTS, params)])
    engine.llm_engine.engine_core.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model folder or name")
    model = parser.parse_args().model
    cores = sorted(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    to_prefill, prefill_end = spawn.Pipe()
    to_decode, decode_end = spawn.Pipe()
    workers = [
        spawn.Process(target=prefill, args=(model, cores[0], prefill_end)),
        spawn.Process(target=decode, args=(model, cores[-1], decode_end)),
    ]
    for worker in workers:
        worker.start()
    prefill_end.close()  # so that a worker's death ends the wait for it
    decode_end.close()
    try:
        to_decode.recv()  # ready: only now let the prefill engine's handoffs wait for it
        to_decode.send(to_prefill.recv())
        together = to_decode.recv()
        to_prefill.send("done")
        alone = to_prefill.recv()
    finally:
        for worker in workers:
            worker.join(60)
            if worker.is_alive():
                worker.terminate()
    for prompt, ours, theirs in zip(PROMPTS, together, alone, strict=True):
        print(f"{prompt}{ours}   [{'same' if ours == theirs else f'alone: {theirs}'}]")
    print(f"identical: {'yes' if together == alone else 'no'}")
    return 0 if together == alone else 1


if __name__ == "__main__":
    sys.exit(main())
