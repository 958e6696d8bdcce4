"""A deployment as one file says it: the model, the pools of engines, the frontend before them.

``vllm-pd up --deployment FILE`` runs it on this machine, ``vllm_pd_plugin.ray_serve`` on a cluster.
Nothing here needs vLLM or Ray.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.option_words import Options, dashed, words_of
from vllm_pd_plugin.frontend.routing.choice import NoPrefill, Role, Strategy

_NOT_OF_A_FRONTEND = {"host", "port", "uds", "workers", "wait-for-engines"}
_OURS = {"kv-connector", "kv-role", "host", "port", "model", "config"}
"""Options that a deployment sets by itself."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Autoscaling(_Model):
    """How a pool grows and shrinks by itself."""

    min_replicas: int = Field(default=1, ge=0, description="Prefill engines may go down to 0.")
    max_replicas: int = Field(ge=1)
    initial_replicas: int | None = Field(default=None, ge=0, description="Default: min_replicas.")
    upscale_delay_s: float = Field(
        default=10.0, ge=0, description="How long more must be needed before an engine is added."
    )
    downscale_delay_s: float = Field(
        default=300.0, ge=0, description="How long fewer must be enough before one is drained."
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> Autoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is less than min_replicas")
        initial = self.initial_replicas
        if initial is not None and not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError("initial_replicas is not between min_replicas and max_replicas")
        return self


class EnginePool(_Model):
    """Engines of one role. A number alone is how many there are."""

    replicas: int = Field(
        default=1, ge=0, description="How many engines, where nothing scales them."
    )
    autoscaling: Autoscaling | None = None
    engine_args: Options = Field(
        default={},
        description="Options of `vllm serve` for these engines, on top of those for all.",
    )
    env: dict[str, str] = Field(default={}, description="Environment of these engines.")
    num_cpus: float = Field(
        default=1, ge=0, description="CPUs that Ray sets aside for each engine."
    )
    num_gpus: float | None = Field(
        default=None,
        ge=0,
        description="GPUs of each engine, all on one node. Default: its tensor parallel size where "
        "vLLM is not its CPU build, else 0.",
    )
    resources: dict[str, float] = Field(
        default={},
        description="Custom resources of Ray that each engine needs: they choose its nodes.",
    )
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    surge_percent: int = Field(
        default=100,
        ge=0,
        le=100,
        description="How many engines more there may be while an update replaces them; 0 stops an "
        "old one before a new one starts, where there is no room for both.",
    )
    drain_timeout_s: float = Field(
        default=60.0,
        ge=0,
        description="What is left on an engine that is to end after so long goes on elsewhere.",
    )
    start_timeout_s: float = Field(
        default=1800.0, gt=0, description="How long an engine may take to load."
    )
    role_change: bool = Field(
        default=False,
        description="Only of the pool `both`: each of its engines works for one of the other two "
        "pools, and moves, without a restart, to the one that needs it more.",
    )

    @property
    def may_be_empty(self) -> bool:
        return (self.autoscaling.min_replicas if self.autoscaling else self.replicas) == 0

    @property
    def is_wanted(self) -> bool:
        return self.autoscaling is not None or self.replicas > 0


class FrontendPool(_Model):
    """The frontends, which are alike: behind Ray Serve's ingress any of them gets a request."""

    replicas: int = Field(default=1, ge=1)
    args: Options = Field(
        default={},
        description="Options of `vllm serve` that concern the API (chat-template, ...), "
        "and of `vllm-pd serve`.",
    )
    env: dict[str, str] = {}
    num_cpus: float = Field(default=1, ge=0)
    resources: dict[str, float] = {}
    max_ongoing_requests: int = Field(
        default=1000,
        ge=1,
        description="Requests that one frontend works on; more wait at the ingress.",
    )
    shutdown_timeout_s: float = Field(
        default=300.0,
        ge=0,
        description="How long a frontend that is to end lets its streams go on.",
    )
    wait_for_engines_s: float = Field(default=1800.0, ge=0)

    @field_validator("args")
    @classmethod
    def _leaves_the_rest_alone(cls, value: Options) -> Options:
        if taken := _NOT_OF_A_FRONTEND.intersection(dashed(value)):
            raise ValueError(f"{', '.join(sorted(taken))} cannot be set here")
        return _without_secrets(value)


class Slo(_Model):
    """What requests of a class are promised; see ``--slo``."""

    ttft_ms: float = Field(gt=0)
    tpot_ms: float = Field(gt=0)


class Routing(_Model):
    """How engines are chosen; see ``vllm-pd serve --help``."""

    prefill_strategy: Strategy = Strategy.BEST
    decode_strategy: Strategy = Strategy.BEST
    no_prefill: NoPrefill = NoPrefill.LOCAL
    local_below: int | None = Field(default=None, ge=0)


class Kv(_Model):
    """How KV goes from engine to engine; see docs/configuration.md for what else there is."""

    codec: Literal["raw", "int8", "int4", "int2", "auto"] = "raw"
    lossy_max: Literal["none", "int8", "int4", "int2"] = "none"
    load_failure_policy: Literal["fail", "recompute"] = Field(
        default="fail",
        description="What an engine does with a request whose KV did not come; `fail` lets the "
        "frontend try other engines.",
    )
    options: dict[str, Any] = Field(default={}, description="kv_connector_extra_config.")


class Deployment(_Model):
    """Everything that is said of a deployment; unknown keys are refused.

    Raises ValidationError, whose message names the key.
    """

    model: Annotated[str, Field(min_length=1, description="Folder or name of the model.")]
    served_model_name: str | None = Field(default=None, description="As clients call it.")
    engine_args: Options = Field(default={}, description="Options of `vllm serve` for all engines.")
    env: dict[str, str] = Field(default={}, description="Environment of all engines.")
    prefill: EnginePool = EnginePool()
    decode: EnginePool = EnginePool()
    both: EnginePool = EnginePool(replicas=0)
    frontend: FrontendPool = FrontendPool()
    slo: dict[str, Slo] = Field(
        default={},
        description="Objectives by class of requests; `default` is that of the others. Pools are "
        "sized for those of `default`.",
    )
    routing: Routing = Routing()
    kv: Kv = Kv()

    @field_validator("prefill", "decode", "both", "frontend", mode="before")
    @classmethod
    def _number_of_replicas(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"replicas": value}
        if isinstance(value, str) and value.isdecimal():
            return {"replicas": int(value)}  # from a command line
        return value

    @field_validator("engine_args")
    @classmethod
    def _leaves_ours_alone(cls, value: Options) -> Options:
        return _checked(value)

    @model_validator(mode="after")
    def _can_serve(self) -> Deployment:
        for pool in self.pools.values():
            _checked(pool.engine_args)
        if not (self.decode.is_wanted or self.both.is_wanted):
            raise ValueError("at least one engine must decode: set decode or both")
        if self.decode.may_be_empty and self.decode.autoscaling:
            raise ValueError("decode.autoscaling.min_replicas must be 1 at least")
        never_back = self.prefill.autoscaling and self.prefill.may_be_empty
        if never_back and self.routing.no_prefill is NoPrefill.FAIL:
            raise ValueError(
                "prefill.autoscaling.min_replicas is 0 and routing.no_prefill is fail: no request "
                "would ever bring an engine back"
            )
        if self.both.is_wanted and (self.prefill.autoscaling or self.decode.autoscaling):
            raise ValueError("both: beside it prefill and decode have a fixed number of replicas")
        if self.prefill.role_change or self.decode.role_change:
            raise ValueError("role_change is for the pool `both` only")
        if self.both.autoscaling:
            raise ValueError("both: only prefill and decode scale by themselves; set replicas")
        return self

    @property
    def pools(self) -> dict[Role, EnginePool]:
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.BOTH: self.both}

    @property
    def generation(self) -> str:
        """Return what tells engines apart whose KV may differ: the model, and what is said of all
        engines."""
        content = json.dumps([self.model, self.engine_args], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def engine_options(self, role: Role) -> Options:
        """Return what is said of the engines of a role, by the options' names with dashes."""
        return {**dashed(self.engine_args), **dashed(self.pools[role].engine_args)}

    def engine_words(self, role: Role, **connector: Any) -> list[str]:
        """Return the options of ``vllm serve`` for engines of a role, without the connector's name.

        connector: options of it, where the deployment says nothing else.
        """
        options = self.engine_options(role)
        if self.served_model_name:
            options["served-model-name"] = self.served_model_name
        codecs = {"codec": self.kv.codec, "lossy_max": self.kv.lossy_max}
        transfer = {
            "kv_load_failure_policy": self.kv.load_failure_policy,
            "kv_connector_extra_config": {**connector, **codecs, **self.kv.options},
        }
        return words_of({**options, "kv-transfer-config": transfer})

    def frontend_words(self) -> list[str]:
        """Return the options of ``vllm-pd serve`` for a frontend, without its engines."""
        routing = self.routing.model_dump(mode="json", exclude_none=True)
        options = {
            # What a frontend must know of the model is said to the engines.
            **{k: v for k, v in dashed(self.engine_args).items() if _is_shared(k)},
            **dashed(routing),
            **dashed(self.frontend.args),
        }
        if self.served_model_name:
            options["served-model-name"] = self.served_model_name
        slos = [f"{k}={v.ttft_ms:g}/{v.tpot_ms:g}" for k, v in self.slo.items()]
        return [*words_of(options), *(word for text in slos for word in ("--slo", text))]

    def up_words(self) -> list[str]:
        """Return the options of ``vllm-pd up``, beside those of the engines.

        Raises:
            ConfigError: it says something that only Ray Serve can do.
        """
        counts: dict[str, int] = {}
        for role, pool in self.pools.items():
            if pool.autoscaling is not None or pool.role_change:
                raise ConfigError(
                    f"{role.value} scales or changes its role, which needs Ray Serve: set replicas"
                )
            counts[role.value] = pool.replicas
        return [*words_of(counts), *self.frontend_words()]

    def engine_environ(self, role: Role) -> dict[str, str]:
        return {**self.env, **self.pools[role].env}


_SHARED = {
    "tokenizer", "tokenizer-mode", "trust-remote-code", "revision", "tokenizer-revision", "dtype",
    "max-model-len", "hf-config-path", "hf-overrides", "generation-config", "seed",
    "tensor-parallel-size",
    # What answers are sampled by, see ``served_options``; and how much may be asked for.
    "reasoning-parser", "reasoning-parser-plugin", "reasoning-config", "logits-processors",
    "logprobs-mode", "watermark-config", "structured-outputs-config", "max-logprobs", "enable-lora",
}  # fmt: skip
"""Options of engines that a frontend over them needs, too."""


def _is_shared(option: str) -> bool:
    """Say it of an option, or of a part of one (``structured-outputs-config.backend``)."""
    return option.partition(".")[0] in _SHARED


def read_deployment(path: Path) -> Deployment:
    """Read a deployment from a YAML file; from one of Ray Serve, its application's ``args``.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and isinstance(content.get("applications"), list):
        applications = content["applications"]
        if len(applications) != 1:
            raise ConfigError(f"{path} has {len(applications)} applications; one is needed")
        content = applications[0].get("args")
    return parse_deployment(content, str(path))


def take_deployment(arguments: Sequence[str]) -> tuple[Deployment | None, list[str]]:
    """Return the deployment that ``--deployment FILE`` names, and the other arguments.

    Raises:
        ConfigError: it is no deployment.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deployment", type=Path)
    known, rest = parser.parse_known_args(arguments)
    return read_deployment(known.deployment) if known.deployment else None, rest


def parse_deployment(content: Any, source: str) -> Deployment:
    """Check a deployment; source: what messages call it. Raises ConfigError."""
    try:
        return Deployment.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors()
        )
        raise ConfigError(f"{source} is no deployment: {problems}") from error


def _checked(options: Options) -> Options:
    if taken := _OURS.intersection(dashed(options)):
        raise ValueError(f"{', '.join(sorted(taken))} cannot be set here: the deployment does that")
    if "kv-transfer-config" in dashed(options):
        raise ValueError("kv-transfer-config cannot be set here: use `kv`")
    return _without_secrets(options)


def _without_secrets(options: Options) -> Options:
    if "api-key" in dashed(options):
        raise ValueError(
            "api-key cannot be set here, where others can read it: set VLLM_API_KEY in the "
            "environment"
        )
    return options
