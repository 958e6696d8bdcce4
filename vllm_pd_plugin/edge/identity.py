"""What this engine's KV is, from vLLM's configuration and the files that its weights are in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_pd_plugin.compat import minor_of
from vllm_pd_plugin.errors import PdError
from vllm_pd_plugin.ids import Incarnation
from vllm_pd_plugin.memory.identity import UNKNOWN, KvIdentity, Weights
from vllm_pd_plugin.memory.probe import Sums, together
from vllm_pd_plugin.memory.weights import (
    StoredTensor,
    full_fingerprint,
    hub_fingerprint,
    sampled_fingerprint,
    stored_tensors,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_FROM_FILES = ("auto", "hf", "safetensors", "fastsafetensors", "mistral", "pt", "npcache")
"""Load formats of which vLLM's default loader says which files it reads."""
_NOT_MEANING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_LLAMA4_TUNED_ABOVE = 32_768
"""Tokens; see ``vllm.model_executor.models.llama4``."""
_WORK_SHARE = 0.5
"""Of a core, that hashing all weights takes at the most."""
_STOP_TIMEOUT_S = 5.0
_SMALL_ADAPTER_BYTES = 64 * 2**20
"""One larger is told by some of its bytes: no step is to wait for more."""


class LocalIdentity:
    """What this engine's KV is: at first from some bytes of its weights, later from all of them,
    and another once they were changed in place.

    Owned by the control thread, once it runs.
    """

    def __init__(self, vllm_config: VllmConfig, weights_id: str, boot_id: Incarnation) -> None:
        self._weights_id = weights_id
        self._boot_id = boot_id
        self._updates = 0
        self._tensors: Sequence[StoredTensor] = ()
        self._stopping = threading.Event()
        self._hashing: threading.Thread | None = None
        weights = Weights(f"named:{weights_id}") if weights_id else self._read(vllm_config)
        self.kv = describe(vllm_config, weights)

    def _read(self, vllm_config: VllmConfig) -> Weights:
        try:
            files = checkpoint_files(vllm_config)
            self._tensors = stored_tensors(files)
            if self._tensors:
                return Weights(sampled_fingerprint(self._tensors), hub_fingerprint(files))
            why = f"they are not in files (--load-format {vllm_config.load_config.load_format})"
        except (PdError, OSError, ValueError, RuntimeError) as error:
            why = str(error)
        self._tensors = ()
        logger.warning(
            "pdplugin: it is not known which weights these are: %s. No other engine's KV is taken "
            "for equal; name them with the option weights_id where they are the same",
            why,
        )
        return Weights(f"{UNKNOWN}{self._boot_id}")

    def changing(self) -> KvIdentity:
        """The weights are being changed in place; return what KV is meanwhile: nobody else's."""
        return self._become(f"{UNKNOWN}{self._boot_id}, being changed")

    def changed(self) -> KvIdentity:
        """The weights were changed in place; return what KV is from now on."""
        self._updates += 1
        name = f"named:{self._weights_id}" if self._weights_id else f"{UNKNOWN}{self._boot_id}"
        return self._become(f"{name}, changed {self._updates} times")

    def _become(self, weights: str) -> KvIdentity:
        self._tensors = ()
        self.kv = msgspec.structs.replace(self.kv, weights=Weights(weights), probe=None)
        return self.kv

    def probed(self, ranks: Sequence[Mapping[str, Sums] | None]) -> None:
        """Take what each rank computes for the probe prompt, before the engine serves; nothing is
        known of it where one has not computed it."""
        known = [rank for rank in ranks if rank is not None]
        if len(known) == len(ranks):
            self.kv = msgspec.structs.replace(self.kv, probe=together(known))

    def hash_fully(self, on_done: Callable[[str], None]) -> None:
        """Hash all bytes of the weights, on a thread of its own that takes half a core at the
        most; ``on_done`` is called on it."""
        tensors = self._tensors
        if not tensors:
            return

        def pause(seconds: float) -> bool:
            return not self._stopping.wait(seconds * (1 / _WORK_SHARE - 1))

        def run() -> None:
            try:
                found = full_fingerprint(tensors, pause)
            except (PdError, OSError) as error:
                logger.warning("pdplugin: the weights cannot be read as a whole: %s", error)
                return
            if found is not None:
                on_done(found)

        self._hashing = threading.Thread(target=run, name="pd-weights", daemon=True)
        self._hashing.start()

    def hashed(self, full: str) -> KvIdentity | None:
        """All weights are hashed; return what KV is, or None if they are others by now."""
        if not self._tensors:
            return None
        weights = msgspec.structs.replace(self.kv.weights, full=full)
        self.kv = msgspec.structs.replace(self.kv, weights=weights)
        return self.kv

    def close(self) -> None:
        self._stopping.set()
        if self._hashing is not None:
            self._hashing.join(_STOP_TIMEOUT_S)


def checkpoint_files(vllm_config: VllmConfig) -> list[Path]:
    """Return the files that vLLM has loaded the weights from; none where they are not in files.

    Raises whatever vLLM's loader raises.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load, model = vllm_config.load_config, vllm_config.model_config
    if load.load_format not in _FROM_FILES:
        return []
    loader = DefaultModelLoader(load)
    source = model.model_weights or model.model
    _, files, *_ = loader._prepare_weights(source, None, model.revision, True, None)
    return [Path(file) for file in files]


def describe(vllm_config: VllmConfig, weights: Weights) -> KvIdentity:
    """Return what the KV of this configuration is, with these weights."""
    from vllm.version import __version__

    model = vllm_config.model_config
    config, text = model.hf_config, model.hf_text_config
    facts = {k: v for k, v in config.to_dict().items() if k not in _NOT_MEANING}
    return KvIdentity(
        architecture=" ".join(model.architectures),
        config=_digest(facts),
        weights=weights,
        dtype=_name(model.dtype),
        kv_cache_dtype=_kv_cache_dtype(vllm_config),
        quantization=str(model.quantization or "none"),
        rope=_rope(text, model.max_model_len),
        windows=_windows(model, text),
        vllm=".".join(map(str, minor_of(__version__) or ())),
    )


def _kv_cache_dtype(vllm_config: VllmConfig) -> str:
    name = str(vllm_config.cache_config.cache_dtype)
    if name == "auto":
        return _name(vllm_config.model_config.dtype)
    return "fp8_e4m3" if name == "fp8" else name  # as vLLM takes it


def _rope(text: Any, max_model_len: int) -> str:
    """Return how positions count. Some models choose by the longest prompt that they are to take:
    of two sets of factors (``longrope``), or whether queries are scaled (Llama 4)."""
    fields = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
    found = {name: value for name in fields if (value := getattr(text, name, None)) is not None}
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    original = getattr(text, "original_max_position_embeddings", None) or scaling.get(
        "original_max_position_embeddings"
    )
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "longrope" and original:
        found["long"] = max_model_len > original
    if hasattr(text, "attn_temperature_tuning"):
        found["tuned"] = max_model_len > _LLAMA4_TUNED_ABOVE
    return _json(found)


def _windows(model: Any, text: Any) -> str:
    if getattr(model, "disable_sliding_window", False):
        return "disabled"
    window = getattr(text, "sliding_window", None)
    layers = getattr(text, "layer_types", None)
    return str(window or "none") + (f", layers {_digest(layers)[:8]}" if layers else "")


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _digest(value: object) -> str:
    return hashlib.blake2b(_json(value).encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class _Adapter:
    """key: which adapter was looked at."""

    path: str
    int_id: int


class AdapterFingerprints:
    """What LoRA adapters contain, whatever they are called and wherever they lie.

    An adapter is looked at when a request first names it, as vLLM loads it then; owned by the
    engine's own thread.
    """

    def __init__(self, boot_id: Incarnation) -> None:
        self._boot_id = boot_id
        self._known: dict[_Adapter, str] = {}

    def of(self, lora: Any) -> str:
        """Return an adapter's fingerprint; one that is equal to no other engine's where it is not
        in files."""
        key = _Adapter(str(lora.lora_path), int(lora.lora_int_id))
        if key not in self._known:
            self._known[key] = self._look(key)
        return self._known[key]

    def reloaded(self, int_id: int) -> None:
        """Another adapter may have been loaded in the place of one."""
        self._known = {key: known for key, known in self._known.items() if key.int_id != int_id}

    def _look(self, adapter: _Adapter) -> str:
        from vllm.lora.utils import get_adapter_absolute_path

        try:
            folder = Path(get_adapter_absolute_path(adapter.path))
            config = _digest(json.loads((folder / "adapter_config.json").read_text()))
            if tensors := stored_tensors(sorted(folder.glob("adapter_model.*"))):
                is_small = sum(tensor.num_bytes for tensor in tensors) <= _SMALL_ADAPTER_BYTES
                digest = full_fingerprint if is_small else sampled_fingerprint
                return f"{config} {digest(tensors)}"
        except (PdError, OSError, ValueError) as error:
            logger.warning("pdplugin: the adapter at %s cannot be read: %s", adapter.path, error)
        return f"{UNKNOWN}{self._boot_id} {adapter.path}"
