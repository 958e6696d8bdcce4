"""From a command line to what is to run; nothing is started here."""

from __future__ import annotations

import argparse
import socket
import warnings
from pathlib import Path

import pytest

from vllm_pd_plugin.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend import options
    from vllm_pd_plugin.frontend.api.configuration import check_model
    from vllm_pd_plugin.frontend.commands import CommandLine, plan_up, read
    from vllm_pd_plugin.frontend.parsing import make_parser
    from vllm_pd_plugin.frontend.processes.local import ONLY_FRONTENDS
    from vllm_pd_plugin.frontend.routing.choice import Role
    from vllm_pd_plugin.net.channel import CurveKeys


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "VLLM_PD_ADMIN_KEY", "VLLM_PD_CLUSTER_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


def read_up(*words: str) -> CommandLine:
    parser, _ = make_parser("vllm-pd up", "MODEL ...", "", options.add_local_options)
    return read(parser, words)


def engine_words(*words: str, environ: dict[str, str] | None = None) -> dict[str, list[str]]:
    """Return what follows the model in the commands of the engines that would be started."""
    parser, own = make_parser("vllm-pd up", "MODEL ...", "", options.add_local_options)
    _, plan = plan_up(parser, own, words, environ or {})
    commands = {engine.name: list(engine.command) for engine in plan.engines}
    return {name: each[each.index("serve") + 1 :] for name, each in commands.items()}


def write(tmp_path: Path, content: str) -> str:
    path = tmp_path / "up.yaml"
    path.write_text(content)
    return str(path)


def test_a_file_is_sorted_between_frontend_and_engines(tmp_path: Path) -> None:
    for name in ("k.pem", "c.pem"):
        (tmp_path / name).touch()
    config = write(
        tmp_path,
        f"""
        port: 8123
        max-model-len: 2048
        prefill: 2
        decode: 1
        local-below: 64
        api-key: [in-the-file]
        root-path: /llm
        ssl-keyfile: {tmp_path}/k.pem
        ssl-certfile: {tmp_path}/c.pem
        kv-transfer-config: {{kv_load_failure_policy: recompute}}
        """,
    )
    words = engine_words("M", "--config", config)
    assert sorted(words) == ["decode-0", "prefill-0", "prefill-1"]
    for each in words.values():
        assert each[:3] == ["M", "--max-model-len", "2048"]
        said = {word for word in each if word.startswith("--")}
        assert said == {
            "--max-model-len", "--kv-transfer-config", "--host", "--port", "--middleware",
            "--disable-uvicorn-access-log", "--kv-connector", "--kv-role",
        }  # fmt: skip
        assert "8123" not in each
        assert "in-the-file" not in each
    line = read_up("M", "--config", config)
    assert (line.args.port, line.args.local_below, line.args.root_path) == (8123, 64, "/llm")
    assert (line.args.prefill, line.args.decode) == (2, 1)


def test_the_same_is_typed_and_in_a_file(tmp_path: Path) -> None:
    typed = ["--port", "8000", "--max-model-len", "2048", "--prefill", "1", "--dtype", "half"]
    config = write(tmp_path, "port: 8000\nmax-model-len: 2048\nprefill: 1\ndtype: half")

    def without_ports(words: dict[str, list[str]]) -> list[list[str]]:
        return [[word for word in each if not word.isdecimal()] for each in words.values()]

    assert without_ports(engine_words("M", *typed)) == without_ports(
        engine_words("M", "--config", config)
    )


def test_the_model_may_be_in_the_file(tmp_path: Path) -> None:
    words = engine_words("--config", write(tmp_path, "model: M\ndtype: half"))
    assert words["decode-0"][:3] == ["M", "--dtype", "half"]


def test_a_tokenizer_of_the_models_name_stays_where_it_is() -> None:
    words = engine_words("--tokenizer", "M", "--dtype", "float32", "M")["decode-0"]
    assert words[:5] == ["M", "--tokenizer", "M", "--dtype", "float32"]


def test_engines_serve_frontends_only_where_there_is_an_api_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert ONLY_FRONTENDS not in engine_words("M")["decode-0"]
    assert ONLY_FRONTENDS in engine_words("M", "--api-key", "K")["decode-0"]
    (tmp_path / "key").write_text("K\n")
    monkeypatch.setenv("VLLM_API_KEY_FILE", str(tmp_path / "key"))
    assert ONLY_FRONTENDS in engine_words("M")["decode-0"]


def test_with_an_api_key_nobody_else_reaches_the_control_channels() -> None:
    parser, own = make_parser("vllm-pd up", "MODEL ...", "", options.add_local_options)
    _, open_to_all = plan_up(parser, own, ["M"], {})
    assert open_to_all.options.keys is None
    keys = set()
    for _ in range(2):
        _, plan = plan_up(parser, own, ["M", "--api-key", "K"], {})
        made = {engine.environ["VLLM_PD_CLUSTER_KEY"] for engine in plan.engines}
        assert made == {plan.environ["VLLM_PD_CLUSTER_KEY"]}
        assert plan.options.keys == CurveKeys.derive(*made)
        keys |= made
    assert len(keys) == 2
    _, given = plan_up(parser, own, ["M", "--api-key", "K"], {"VLLM_PD_CLUSTER_KEY": "s" * 32})
    assert given.environ["VLLM_PD_CLUSTER_KEY"] == "s" * 32


def test_engines_get_no_key_that_is_the_frontends(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a" * 32)
    parser, own = make_parser("vllm-pd up", "MODEL ...", "", options.add_local_options)
    shared = {"VLLM_PD_CLUSTER_KEY": "shared" * 4, "PATH": "/bin"}
    theirs = {"VLLM_API_KEY": "secret", "VLLM_PD_ADMIN_KEY": "secret" * 3}
    in_files = {"VLLM_PD_ADMIN_KEY_FILE": str(tmp_path / "key")}
    for secrets in (theirs, in_files):
        _, plan = plan_up(parser, own, ["M"], {**secrets, **shared})
        for engine in plan.engines:
            assert not set(secrets) & set(engine.environ)
            assert engine.environ["VLLM_PD_CLUSTER_KEY"] == "shared" * 4


def test_a_worker_is_given_engines_and_no_key() -> None:
    parser, own = make_parser("vllm-pd up", "MODEL ...", "", options.add_local_options)
    words = [
        "--prefill",
        "1",
        "M",
        "--api-key",
        "K",
        "--workers",
        "2",
        "--chat-template",
        "t",
        "--decode=2",
    ]
    words[words.index("t")] = "{{ messages }}"
    _, plan = plan_up(parser, own, words, {})
    urls = [engine.url for engine in plan.engines]
    assert list(plan.worker_words) == [
        "M", "--workers", "2", "--chat-template", "{{ messages }}",
        "--prefill", urls[0], "--decode", urls[1], "--decode", urls[2],
    ]  # fmt: skip


def test_the_engines_have_ports_one_after_another() -> None:
    parser, own = make_parser("vllm-pd up", "MODEL ...", "", options.add_local_options)
    words = ["M", "--decode", "2", "--engine-port-base", "38211"]
    _, plan = plan_up(parser, own, words, {})
    assert [engine.url for engine in plan.engines] == [
        f"http://127.0.0.1:{port}" for port in (38211, 38212, 38213)
    ]
    assert [engine.role for engine in plan.engines] == [Role.PREFILL, Role.DECODE, Role.DECODE]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-modules", "a=b"], "--lora-modules needs --enable-lora, here and"),
        (["--ssl-keyfile", "/nowhere.pem"], "--ssl-keyfile /nowhere.pem: there is no such file"),
        (["--chat-template", "/nowhere.jinja"], "/nowhere.jinja"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
        (["--slo", "fast"], "--slo 'fast' is not"),
        (["--engine-hosts", "10.0.0.0/99"], "--engine-hosts '10.0.0.0/99' is no network"),
        (["--decode", "0"], "at least one engine must decode"),
        (["--port", "8001", "--engine-port-base", "8000"], "--port 8001 is one of the engines'"),
        (["--engine-port-base", "65535"], "use 1 to 65534"),
        (["--engine-port-base", "0"], "use 1 to 65534"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_words("M", *words)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_port_that_is_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--prefill", "0", "--engine-port-base", str(port)]
        with pytest.raises(ConfigError, match=f"port {port} for an engine: Address already in use"):
            engine_words("M", *words)


def test_a_model_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_up("--prefill", "1")
    assert "name the model: vllm-pd up MODEL" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere"])
def test_a_model_that_is_not_there_is_said_in_one_line(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = read_up(model)
    with pytest.raises(ConfigError, match=f"{model} cannot be served: ") as caught:
        check_model(line.args)
    assert len(str(caught.value).splitlines()) == 1


def test_the_api_key_of_a_file_is_the_frontends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("from-the-file\n")
    monkeypatch.setenv("VLLM_API_KEY_FILE", str(tmp_path / "key"))
    assert read_up("M").args.api_key == ["from-the-file"]
    assert read_up("M", "--api-key", "typed").args.api_key == ["typed"]
    args = argparse.Namespace(api_key=None)
    monkeypatch.setenv("VLLM_API_KEY_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="VLLM_API_KEY_FILE: .*nowhere cannot be read"):
        options.take_api_key(args)
