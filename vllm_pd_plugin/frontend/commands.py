"""``vllm-pd serve`` and ``vllm-pd up``: from a command line to a frontend that runs.

What is wrong with the command line is said in one line, before anything starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import uvloop
from vllm.exceptions import VLLMError
from vllm.logger import configure_logging_from_args

from vllm_pd_plugin.compat import moved
from vllm_pd_plugin.config import CLUSTER_KEY_VARIABLE, read_secret
from vllm_pd_plugin.errors import ConfigError, PdError
from vllm_pd_plugin.frontend import options
from vllm_pd_plugin.frontend.api.app import serve as serve_frontend
from vllm_pd_plugin.frontend.api.configuration import check_model
from vllm_pd_plugin.frontend.deployment import take_deployment
from vllm_pd_plugin.frontend.options import FrontendOptions
from vllm_pd_plugin.frontend.parsing import FrontendParser, make_parser
from vllm_pd_plugin.frontend.processes import local
from vllm_pd_plugin.frontend.processes.supervisor import LocalEngine
from vllm_pd_plugin.frontend.processes.workers import ENGINES_FILE_VARIABLE
from vllm_pd_plugin.frontend.typed_words import TypedWords

_UP = """\
Start prefill and decode engines on this machine, and serve one OpenAI endpoint over them.

examples:
  vllm-pd up MODEL
  vllm-pd up MODEL --prefill 1 --decode 2 --port 8080 --max-model-len 8192
  vllm-pd up --deployment examples/ray_serve.yaml

The machine's cores or GPUs are divided among the engines. One that dies is started again; Ctrl-C
ends all. Options of `vllm serve` go to the engines and to the frontend.
"""
_SERVE = """\
One OpenAI endpoint over prefill and decode engines: vLLM servers with --kv-connector pdplugin.

examples:
  vllm-pd serve MODEL --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
  vllm-pd serve MODEL --prefill http://p1:8000 http://p2:8000 --decode http://d1:8000 --port 8080
  vllm-pd serve MODEL --both http://127.0.0.1:8100 http://127.0.0.1:8200 --local-below 256

Of the options of `vllm serve`, what concerns the API counts (chat template, tool parser, API keys,
TLS), what concerns an engine does not.
"""
_NOT_FOR_WORKERS = {"--model", "--api-key"}
"""The model comes first, and the API key does not belong where others can read it."""
_FILES = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What is to run: a frontend, the engines that are started for it, and the words after
    ``vllm-pd serve`` that start one of its workers, with these surroundings."""

    options: FrontendOptions
    engines: Sequence[LocalEngine]
    worker_words: Sequence[str]
    environ: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class CommandLine:
    """A command line that was read. words: with what files say in their place."""

    args: argparse.Namespace
    words: Sequence[str]
    typed: TypedWords

    def worker_words(self, *dropped: str) -> list[str]:
        return [self.args.model, *self.typed.without(self.words, {*_NOT_FOR_WORKERS, *dropped})]


def serve(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Serve over engines that run; returns the exit status. environ: as the process was given."""
    parser, _ = make_parser("vllm-pd serve", "MODEL ...", _SERVE, options.add_engine_options)

    def plan() -> tuple[CommandLine, Plan]:
        line = read(parser, arguments)
        if not (line.args.decode or line.args.both):
            parser.error("name at least one engine that decodes: --decode URL, or --both URL")
        parsed = options.parse_options(line.args, options.parse_engines(line.args), environ)
        return line, Plan(parsed, (), line.worker_words(), environ)

    return _run(plan, environ, "serve")


def up(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Start engines here and serve them; returns the exit status. environ: see ``serve``."""
    parser, own = make_parser("vllm-pd up", "MODEL ...", _UP, options.add_local_options)
    return _run(lambda: plan_up(parser, own, arguments, environ), environ, "up")


def plan_up(
    parser: FrontendParser, own: set[str], arguments: Sequence[str], environ: Mapping[str, str]
) -> tuple[CommandLine, Plan]:
    """Decide what ``vllm-pd up`` starts. own: the options that vLLM does not have.

    Raises:
        ConfigError: something in what was typed cannot work.
    """
    typed = TypedWords(parser)
    deployment, words = take_deployment(typed.with_config_file(arguments))
    said = [deployment.model, *deployment.up_words()] if deployment else []
    line = read(parser, [*said, *words])
    args = line.args
    counts = local.parse_counts(args)
    if args.api_key and read_secret(environ, CLUSTER_KEY_VARIABLE) is None:
        # Else whoever is on this machine could be served by way of the engines' control channels.
        environ = {**environ, CLUSTER_KEY_VARIABLE: secrets.token_hex(32)}
    local.refuse_shared_port(args.port, sum(counts.values()), args.engine_port_base)
    engines = local.plan_engines(
        counts,
        args.model,
        local.engine_settings(deployment, local.engine_arguments(typed, words, own)),
        local.log_folder(args.log_dir),
        args.tensor_parallel_size,
        environ,
        bool(args.api_key),
        args.engine_port_base,
    )
    pool = [(engine.url, engine.role) for engine in engines]
    urls = [word for url, role in pool for word in (f"--{role.value}", url)]
    parsed = options.parse_options(args, pool, environ)
    words = [*line.worker_words(*options.LOCAL_OPTIONS), *urls]
    return line, Plan(parsed, engines, words, environ)


def read(parser: FrontendParser, arguments: Sequence[str]) -> CommandLine:
    """Read a command line. Raises ConfigError where something in it cannot work."""
    typed = TypedWords(parser)
    words = typed.with_config_file(arguments)
    args = parser.parse_args(list(words))
    args.model = args.model_tag or args.model
    if not args.model:
        parser.error(f"name the model: {parser.prog} MODEL")
    configure_logging_from_args(args)
    options.take_api_key(args)
    if args.lora_modules and not args.enable_lora:
        raise ConfigError("--lora-modules needs --enable-lora, here and on the engines")
    for name in _FILES:
        if (path := getattr(args, name)) and not Path(path).is_file():
            raise ConfigError(f"--{name.replace('_', '-')} {path}: there is no such file")
    try:
        moved("validate_parsed_serve_args")(args)
    except (TypeError, ValueError, VLLMError) as error:  # all of them vLLM's, of options
        raise ConfigError(" ".join(str(error).split())) from error
    return CommandLine(args, words, typed)


def _run(
    make_plan: Callable[[], tuple[CommandLine, Plan]], environ: Mapping[str, str], name: str
) -> int:
    """Run a frontend until it is told to stop."""
    moved("cli_env_setup")()
    status = 0
    try:
        line, plan = make_plan()
        if ENGINES_FILE_VARIABLE not in environ:  # a worker's was looked at before
            check_model(line.args)
        worker = [sys.executable, "-m", "vllm_pd_plugin.cli", "serve", *plan.worker_words]
        uvloop.run(serve_frontend(line.args, plan.options, plan.engines, worker, plan.environ))
    except PdError as error:
        print(f"vllm-pd {name}: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        pass
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed. What libraries complain of at exit would hide the last words.
    os._exit(status)
