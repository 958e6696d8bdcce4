"""How far an engine is that starts, read from the lines of its log; pure.

vLLM says nothing else of it before its HTTP server is there. The texts are those of vLLM 0.32.
"""

from __future__ import annotations

import dataclasses
import enum
import re


class Stage(enum.IntEnum):
    """In the order in which they come."""

    STARTING = 0
    CONFIGURING = 1
    CORE = 2
    WEIGHTS = 3
    KV_CACHE = 4
    SERVER = 5
    READY = 6

    @property
    def text(self) -> str:
        """Return what a person is told."""
        return _TEXTS[self]


_TEXTS = {
    Stage.STARTING: "starts, imports",
    Stage.CONFIGURING: "reads the model's configuration",
    Stage.CORE: "starts its core, imports",
    Stage.WEIGHTS: "loads weights",
    Stage.KV_CACHE: "compiles, makes its KV cache",
    Stage.SERVER: "starts its server",
    Stage.READY: "ready",
}
MARKS = {
    "non-default args: ": Stage.CONFIGURING,
    "Initializing a V1 LLM engine (v": Stage.CORE,
    "Starting to load model ": Stage.WEIGHTS,
    "Loading weights took ": Stage.KV_CACHE,
    "init engine (profile, create kv cache, warmup model) took ": Stage.SERVER,
    "Application startup complete.": Stage.READY,
}
"""What a line has in it with which a stage begins."""
SHARDS = "checkpoint shards"
_SHARDS = re.compile(rf"{SHARDS}: +(\d+)% Completed")


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """percent: of the weights' files that are loaded; None while that is not known."""

    stage: Stage = Stage.STARTING
    percent: int | None = None

    def after(self, line: str) -> Progress:
        """Return how far it is after another line of its log."""
        for mark, stage in MARKS.items():
            if mark in line:
                return Progress(stage) if stage > self.stage else self
        if self.stage is Stage.WEIGHTS and (found := _SHARDS.search(line)):
            return Progress(self.stage, int(found[1]))
        return self

    def __str__(self) -> str:
        known = "" if self.percent is None else f", {self.percent}%"
        return f"{self.stage.text}{known}"
