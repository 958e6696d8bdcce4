"""What one engine alone answers: the measure of every handoff.

The same question is asked by many tests. Its answer is kept on disk, by all that it depends on, and
an engine is started only for what is not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.engine import Completion, Engine, start
from tests.model_files import MODELS_DIR
from vllm_pd_plugin.memory.weights import sampled_fingerprint, stored_tensors


class Alone:
    """One engine, without a connector. arguments: its own."""

    def __init__(self, model: Path, arguments: Sequence[str], logs: Path) -> None:
        self._path, self._arguments, self._logs = model, tuple(arguments), logs
        self._engine: Engine | None = None
        self._folder = MODELS_DIR / "answers"
        files = sorted(model.glob("*.safetensors"))
        self._about = [
            sampled_fingerprint(stored_tensors(files)),
            metadata.version("vllm"),
            _processor(),
            list(self._arguments),
        ]

    @property
    def engine(self) -> Engine:
        """The engine itself, started when it is needed first."""
        if self._engine is None:
            self._engine = start("alone", self._path, self._arguments, cores="0", folder=self._logs)
            self._engine.wait_until_ready()
        return self._engine

    @property
    def model(self) -> str:
        return self._path.name

    @property
    def url(self) -> str:
        return self.engine.url

    def complete(
        self, prompt: str | Sequence[int], max_tokens: int = 16, **sampling: Any
    ) -> Completion:
        """Answer as ``Engine.complete`` does."""
        question = [prompt if isinstance(prompt, str) else list(prompt), max_tokens, sampling]
        return _completion(
            self._kept(
                question,
                lambda: dataclasses.asdict(self.engine.complete(prompt, max_tokens, **sampling)),
            )
        )

    def tokens(self, prompt: Sequence[int], num_tokens: int, **sampling: Any) -> list[Any]:
        """Return the tokens of an answer of that length, and its finish reason."""
        answer = self.complete(prompt, num_tokens, ignore_eos=True, **sampling)
        return [*answer.token_ids, answer.finish_reason]

    def keep(self, question: str, ask: Callable[[Engine], Any]) -> Any:
        """Return what ``ask`` makes of the engine's answer to a question of any kind, as JSON."""
        return self._kept(["other", question], lambda: ask(self.engine))

    def _kept(self, question: list[Any], answer: Callable[[], Any]) -> Any:
        text = json.dumps([self._about, question], sort_keys=True)
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        kept = self._folder / f"{name}.json"
        with suppress(FileNotFoundError):
            return json.loads(kept.read_text())
        self._folder.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(answer()))
        os.replace(part, kept)
        return json.loads(kept.read_text())

    def wait_until_at_rest(self) -> None:
        if self._engine is not None:
            self._engine.wait_until_at_rest()

    def stop(self) -> None:
        """Stop the engine; another one is started when it is needed again."""
        if self._engine is not None:
            self._engine.stop()
            self._engine = None


def _completion(fields: dict[str, Any]) -> Completion:
    return Completion(
        fields["text"],
        tuple(fields["token_ids"]),
        tuple(fields["token_logprobs"]),
        tuple(fields["logprobs"]),
        fields["finish_reason"],
        fields["kv_transfer_params"],
    )


def _processor() -> str:
    """What decides which kernels are used: sums in another order differ a little."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return hashlib.blake2b(line.encode(), digest_size=8).hexdigest()
    return "unknown"
