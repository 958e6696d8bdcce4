"""LoRA adapters of frontends' requests: loaded before the first request that names one.

vLLM's worker would load an adapter in the step that computes its first request, and a step that
fails ends the engine. As a call to the core, which vLLM's own API server makes, a load that fails
is an answer. One that was loaded is not asked for again: what vLLM has dropped since, beyond
``--max-cpu-loras``, its worker loads in a step after all.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import UtilityOutput

Then = Callable[[str], None]
"""Takes why an adapter cannot be had; empty if it can."""


class Adapters:
    """Which adapters the engine has loaded for frontends; owned by the control thread.

    load: has the core load one; takes the number of the call, which ``answered`` hears.
    most: how many the engine keeps, of those that were used last.
    """

    def __init__(self, load: Callable[[int, LoRARequest], None], most: int) -> None:
        self._load = load
        self._most = most
        self._calls = itertools.count(1)
        self._loaded: OrderedDict[int, str] = OrderedDict()
        """Paths, by the numbers that adapters have in requests; those used last are at the end."""
        self._waiting: dict[int, tuple[LoRARequest, list[Then]]] = {}

    def need(self, lora: LoRARequest, then: Then) -> None:
        """Call ``then`` when an adapter is there, or cannot be."""
        number, path = lora.lora_int_id, lora.lora_path
        asked = next((w for w in self._waiting.values() if w[0].lora_int_id == number), None)
        there = asked[0].lora_path if asked is not None else self._loaded.get(number, path)
        if there != path:
            then(f"its number is that of the adapter at {there}")
        elif asked is not None:
            asked[1].append(then)
        elif number in self._loaded:
            self._loaded.move_to_end(number)
            then("")
        else:
            call = next(self._calls)
            self._waiting[call] = (lora, [then])
            self._load(call, lora)

    def answered(self, output: UtilityOutput) -> None:
        """The core has loaded an adapter, or says why not."""
        lora, thens = self._waiting.pop(output.call_id)
        if output.failure_message is None:
            self._loaded[lora.lora_int_id] = lora.lora_path
            while len(self._loaded) > self._most:
                self._loaded.popitem(last=False)
        for then in thens:
            then(output.failure_message or "")
