"""The connector's options: parsed once, from ``kv_connector_extra_config`` and the environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_pd_plugin.codecs.codec import AUTO, Codec
from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.net.hosts import is_host, is_loopback, is_wildcard

CLUSTER_KEY_VARIABLE = "VLLM_PD_CLUSTER_KEY"
ADMIN_KEY_VARIABLE = "VLLM_PD_ADMIN_KEY"
"""The key of a frontend's admin API; see ``frontend.api.admin``."""
API_KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's own variable for the key of the OpenAI API."""
FILE_SUFFIX = "_FILE"
"""Of a variable that names a file with the secret in it, as it is mounted from a secret store."""
MIN_CLUSTER_KEY_LENGTH = 16


@dataclasses.dataclass(frozen=True, slots=True)
class PdConfig:
    """Everything that the operator can set.

    host: address that the control channel binds; not loopback only with a cluster key.
    port: port of the control channel; 0 picks a free one.
    advertise_host: address that peers are told; the bound one unless ``host`` is a wildcard.
    lease_s: how long a producer holds KV for a consumer that is silent, and remembers a consumer
        that asks for a handoff whose request has not arrived.
    peer_timeout_s: how long a peer may take to answer one control message.
    fetch_timeout_s: how long one read may take, and the commit after the last.
    queue_timeout_s: how long a request may wait for the producer to compute its KV, and how long
        it may keep a producer's blocks while it waits for its own.
    stretch_bytes: KV of one rank that is worth an announcement while it is being computed; more
        than a prompt's KV announces whole chunks only.
    integrity: "digest" compares what was read with what the producer's memory holds, and fails the
        handoff where they differ; "none" relies on the commit alone.
    codec: how this engine asks for KV: "raw" (bit for bit), "int8", "int4", "int2", or "auto",
        which chooses for each handoff from what was measured.
    lossy_max: the narrowest codec that "auto", or a request, may choose; "none" allows raw only.
    packing: whether blocks that lie scattered are packed by the producer and read as one piece:
        "always", "never", or "auto", whichever has been faster. Empty: "auto" on a CPU, and "never"
        on a GPU, where packing has not been measured.
    staging_bytes: memory of one rank for packed pieces, in halves for what it packs and for what
        it reads; 0 packs nothing, and sends and fetches raw KV only.
    allow_fp8: whether this engine, whose KV cache is fp8, may take KV from one whose is bfloat16:
        it is rounded on the way, as this engine would round its own.
    weights_id: what the operator calls these weights, instead of what their files say; needed where
        they are not in files, or are changed in place. Equal means equal.
    probe: "always" computes a fixed prompt at the start, so that engines compare what they compute;
        "never" leaves it out, and engines of other release lines of vLLM refuse this one.
    cluster_key: shared secret of the control channel, from ``VLLM_PD_CLUSTER_KEY`` or the file that
        ``VLLM_PD_CLUSTER_KEY_FILE`` names; None without.
    """

    host: str = "127.0.0.1"
    port: int = 0
    advertise_host: str = ""
    lease_s: float = 30.0
    peer_timeout_s: float = 5.0
    fetch_timeout_s: float = 60.0
    queue_timeout_s: float = 600.0
    stretch_bytes: int = 2 * 2**20
    integrity: str = "none"
    codec: str = "raw"
    lossy_max: str = "none"
    packing: str = ""
    staging_bytes: int = 64 * 2**20
    allow_fp8: bool = False
    weights_id: str = ""
    probe: str = "always"
    cluster_key: str | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def parse(cls, options: Mapping[str, Any], environ: Mapping[str, str]) -> PdConfig:
        """Build the configuration.

        Raises:
            ConfigError: a key is unknown, or a value is of the wrong type or out of range.
        """
        allowed = [f.name for f in dataclasses.fields(cls) if f.name != "cluster_key"]
        for name in options:
            if name not in allowed:
                raise ConfigError(
                    f"kv_connector_extra_config has no option {name!r}; "
                    f"allowed are {', '.join(allowed)}"
                )
        default = cls()
        config = cls(
            host=_text(options, "host", default.host),
            port=_port(options, default.port),
            advertise_host=_text(options, "advertise_host", default.advertise_host),
            lease_s=_seconds(options, "lease_s", default.lease_s),
            peer_timeout_s=_seconds(options, "peer_timeout_s", default.peer_timeout_s),
            fetch_timeout_s=_seconds(options, "fetch_timeout_s", default.fetch_timeout_s),
            queue_timeout_s=_seconds(options, "queue_timeout_s", default.queue_timeout_s),
            stretch_bytes=_bytes(options, "stretch_bytes", default.stretch_bytes),
            integrity=_one_of(options, "integrity", default.integrity, ("none", "digest")),
            codec=_one_of(options, "codec", default.codec, (*Codec, AUTO)),
            lossy_max=_one_of(options, "lossy_max", default.lossy_max, ("none", *_LOSSY)),
            packing=_one_of(options, "packing", default.packing, ("auto", "always", "never")),
            staging_bytes=_bytes(options, "staging_bytes", default.staging_bytes, least=0),
            allow_fp8=_yes_or_no(options, "allow_fp8", default.allow_fp8),
            weights_id=_name(options, "weights_id", default.weights_id),
            probe=_one_of(options, "probe", default.probe, ("always", "never")),
            cluster_key=_cluster_key(environ),
        )
        if config.narrowest is not Codec.RAW and not config.staging_bytes:
            raise ConfigError(
                f"staging_bytes=0 leaves no room for codec={config.codec}, "
                f"lossy_max={config.lossy_max}; set it to some megabytes, or use codec=raw"
            )
        return config._with_reachable_address()

    @property
    def narrowest(self) -> Codec:
        """The narrowest codec that the operator has allowed, by naming it."""
        named = [Codec(name) for name in (self.codec, self.lossy_max) if name in _LOSSY]
        return max(named, key=lambda codec: codec.rank, default=Codec.RAW)

    def _with_reachable_address(self) -> PdConfig:
        for name in ("host", "advertise_host"):
            value = getattr(self, name)
            if self.cluster_key is None and value and not is_loopback(value):
                raise ConfigError(
                    f"{name}={value!r} is not a loopback address, and no cluster key is set; "
                    f"set {CLUSTER_KEY_VARIABLE} to the same secret on every engine, "
                    f"or use {name}=127.0.0.1"
                )
        if self.advertise_host:
            return self
        if is_wildcard(self.host):
            raise ConfigError(
                f"host={self.host!r} binds every address, so peers cannot be told which to use; "
                "set advertise_host to the address that they reach this engine by"
            )
        return dataclasses.replace(self, advertise_host=self.host)


_LOSSY = [codec for codec in Codec if codec is not Codec.RAW]


def _text(options: Mapping[str, Any], name: str, default: str) -> str:
    value = options.get(name, default)
    if value == default or (isinstance(value, str) and (is_host(value) or is_wildcard(value))):
        return str(value)
    raise ConfigError(f"{name}={value!r} is not an address; give a host name or an IP address")


def _yes_or_no(options: Mapping[str, Any], name: str, default: bool) -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is neither true nor false")
    return value


def _name(options: Mapping[str, Any], name: str, default: str) -> str:
    value = options.get(name, default)
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise ConfigError(f"{name}={value!r} is not a name of at most 200 printable characters")
    return value


def _port(options: Mapping[str, Any], default: int) -> int:
    value = options.get("port", default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        raise ConfigError(f"port={value!r} is not a port; allowed are 0 (any free one) to 65535")
    return value


def _seconds(options: Mapping[str, Any], name: str, default: float) -> float:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.05 <= value <= 86_400:
        raise ConfigError(f"{name}={value!r} is not a time; allowed are 0.05 to 86400 seconds")
    return float(value)


def _bytes(options: Mapping[str, Any], name: str, default: int, least: int = 1) -> int:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**50:
        raise ConfigError(f"{name}={value!r} is not a size; allowed are {least} to 2**50 bytes")
    return value


def _one_of(options: Mapping[str, Any], name: str, default: str, allowed: Sequence[str]) -> str:
    if name not in options:
        return default
    value = options[name]
    if value not in allowed:
        *others, last = allowed
        raise ConfigError(
            f"{name}={value!r} is not known; allowed are {', '.join(others)} and {last}"
        )
    return str(value)


def read_secret(environ: Mapping[str, str], variable: str) -> str | None:
    """Return the secret that a variable holds, or the file that ``VARIABLE_FILE`` names.

    None without either; a variable that is empty counts as not set. Line breaks at the end of the
    file are no part of the secret.

    Raises:
        ConfigError: both are set, or the file cannot be read, is empty, or has several lines.
    """
    secret, path = environ.get(variable) or None, environ.get(variable + FILE_SUFFIX)
    if not path:
        return secret
    name = variable + FILE_SUFFIX
    if secret is not None:
        raise ConfigError(f"{variable} and {name} are both set; give the secret in one place only")
    try:
        text = Path(path).read_text("utf-8").rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: {path} is no text; write the secret as characters") from error
    if not text.strip():
        raise ConfigError(f"{name}: {path} is empty; write the secret into it")
    if len(text.splitlines()) > 1:
        raise ConfigError(f"{name}: {path} has several lines; the secret is one")
    return text


def _cluster_key(environ: Mapping[str, str]) -> str | None:
    key = read_secret(environ, CLUSTER_KEY_VARIABLE)
    if key is None:
        return None
    if len(key) < MIN_CLUSTER_KEY_LENGTH:
        raise ConfigError(
            f"{CLUSTER_KEY_VARIABLE} has {len(key)} characters; at least {MIN_CLUSTER_KEY_LENGTH} "
            "are needed, for example the output of: openssl rand -hex 32"
        )
    return key
