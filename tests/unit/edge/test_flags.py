"""The flags, with vLLM's own parser and configuration."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_pd_plugin import CONNECTOR
from vllm_pd_plugin.edge.flags import add_flags, merge_flags
from vllm_pd_plugin.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

Parse = Callable[..., KVTransferConfig | None]


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    """A parser with all of vLLM's options and our flags."""
    parser = FlexibleArgumentParser(prog="vllm serve")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's, not ours
        EngineArgs.add_cli_args(parser)
    add_flags(parser)
    return parser


@pytest.fixture
def parse(parser: FlexibleArgumentParser) -> Parse:
    """Parse a command line; return the connector's configuration."""

    def run(*arguments: str) -> KVTransferConfig | None:
        config = parser.parse_args([*arguments]).kv_transfer_config
        assert config is None or isinstance(config, KVTransferConfig)
        return config

    return run


@pytest.fixture
def refusal(parse: Parse, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Parse what is to be refused; return what is said about it."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parse(*arguments)
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def as_json(**config: Any) -> str:
    return json.dumps(config)


@pytest.mark.parametrize(
    ("role", "expected"),
    [("prefill", "kv_producer"), ("decode", "kv_consumer"), ("both", "kv_both")],
)
def test_the_flags_alone_are_enough(parse: Parse, role: str, expected: str) -> None:
    config = parse("--kv-connector", "pdplugin", "--kv-role", role)
    assert config is not None
    assert (config.kv_connector, config.kv_role) == (CONNECTOR, expected)
    assert config.kv_connector_extra_config == {}


def test_the_role_is_both_unless_given(parse: Parse) -> None:
    config = parse("--kv-connector", "pdplugin")
    assert config is not None
    assert config.kv_role == "kv_both"


def test_an_engine_id_is_made_up_unless_given(parse: Parse) -> None:
    config = parse("--kv-connector", "pdplugin")
    assert config is not None
    assert config.engine_id


def test_without_the_flags_nothing_is_configured(parse: Parse) -> None:
    assert parse() is None


def test_underscores_do_as_well(parse: Parse) -> None:
    config = parse("--kv_connector", "pdplugin", "--kv_role=decode")
    assert config is not None
    assert config.kv_role == "kv_consumer"


def test_a_role_without_the_connector_is_refused(refusal: Callable[..., str]) -> None:
    message = refusal("--kv-role", "prefill")
    assert "--kv-role prefill needs --kv-connector pdplugin" in message


def test_a_role_for_another_connector_is_refused(refusal: Callable[..., str]) -> None:
    other = as_json(kv_connector="NixlConnector", kv_role="kv_both")
    message = refusal("--kv-role", "prefill", "--kv-transfer-config", other)
    assert "--kv-role prefill needs --kv-connector pdplugin" in message


@pytest.mark.parametrize("role", ["kv_producer", "Prefill", "", "encode"])
def test_a_wrong_role_is_refused_with_those_allowed(refusal: Callable[..., str], role: str) -> None:
    message = refusal("--kv-connector", "pdplugin", "--kv-role", role)
    assert f"invalid choice: {role!r}" in message
    assert all(allowed in message for allowed in ("prefill", "decode", "both"))


def test_another_connector_s_name_is_refused(refusal: Callable[..., str]) -> None:
    message = refusal("--kv-connector", "NixlConnector")
    assert "invalid choice: 'NixlConnector'" in message
    assert "pdplugin" in message


def test_a_role_that_contradicts_the_json_is_refused(refusal: Callable[..., str]) -> None:
    given = as_json(kv_connector="pdplugin", kv_role="kv_consumer")
    message = refusal(
        "--kv-connector", "pdplugin", "--kv-role", "prefill", "--kv-transfer-config", given
    )
    assert "--kv-role says 'kv_producer'" in message
    assert "--kv-transfer-config says 'kv_consumer'" in message
    assert "one place only" in message


def test_a_connector_that_contradicts_the_json_is_refused(refusal: Callable[..., str]) -> None:
    given = as_json(kv_connector="NixlConnector", kv_role="kv_both")
    message = refusal("--kv-connector", "pdplugin", "--kv-transfer-config", given)
    assert "--kv-connector says 'pdplugin'" in message
    assert "--kv-transfer-config says 'NixlConnector'" in message


def test_flags_that_agree_with_the_json_are_allowed(parse: Parse) -> None:
    given = as_json(
        kv_connector="pdplugin",
        kv_role="kv_producer",
        engine_id="mine",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"lease_s": 7},
    )
    config = parse(
        "--kv-connector", "pdplugin", "--kv-role", "prefill", "--kv-transfer-config", given
    )
    assert config is not None
    assert (config.engine_id, config.kv_load_failure_policy) == ("mine", "recompute")
    assert config.kv_connector_extra_config == {"lease_s": 7}


def test_the_json_alone_is_enough(parse: Parse) -> None:
    given = as_json(kv_connector="pdplugin", kv_role="kv_producer")
    config = parse("--kv-transfer-config", given)
    assert config is not None
    assert (config.kv_connector, config.kv_role) == (CONNECTOR, "kv_producer")


def test_a_role_may_be_added_to_the_json(parse: Parse) -> None:
    given = as_json(kv_connector_extra_config={"port": 7000})
    config = parse(
        "--kv-connector", "pdplugin", "--kv-role", "decode", "--kv-transfer-config", given
    )
    assert config is not None
    assert (config.kv_connector, config.kv_role) == (CONNECTOR, "kv_consumer")
    assert config.kv_connector_extra_config == {"port": 7000}


def test_options_can_be_given_in_dotted_form(parse: Parse) -> None:
    config = parse(
        "--kv-connector", "pdplugin",
        "--kv-role", "decode",
        "--kv-transfer-config.kv_connector_extra_config.lease_s", "7.5",
        "--kv-transfer-config.kv_connector_extra_config.host", "127.0.0.1",
        "--kv-transfer-config.kv_load_failure_policy", "recompute",
    )  # fmt: skip
    assert config is not None
    assert (config.kv_connector, config.kv_role) == (CONNECTOR, "kv_consumer")
    assert config.kv_connector_extra_config == {"lease_s": 7.5, "host": "127.0.0.1"}
    assert config.kv_load_failure_policy == "recompute"


def test_an_unknown_option_is_refused_with_those_allowed(refusal: Callable[..., str]) -> None:
    message = refusal(
        "--kv-connector", "pdplugin",
        "--kv-transfer-config.kv_connector_extra_config.leese_s", "7",
    )  # fmt: skip
    assert "kv_connector_extra_config has no option 'leese_s'" in message
    assert "lease_s" in message


def test_an_option_out_of_range_is_refused(refusal: Callable[..., str]) -> None:
    extra = {"port": 70000}
    given = as_json(kv_connector="pdplugin", kv_role="kv_both", kv_connector_extra_config=extra)
    assert "port=70000" in refusal("--kv-transfer-config", given)


def test_a_host_that_needs_a_key_is_refused(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PD_CLUSTER_KEY", raising=False)
    message = refusal(
        "--kv-connector", "pdplugin",
        "--kv-transfer-config.kv_connector_extra_config.host", "10.0.0.1",
    )  # fmt: skip
    assert "VLLM_PD_CLUSTER_KEY" in message


def test_another_connector_s_configuration_is_left_alone(parse: Parse) -> None:
    given = as_json(
        kv_connector="NixlConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"backends": ["UCX"]},
    )
    config = parse("--kv-transfer-config", given)
    assert config is not None
    assert config.kv_connector == "NixlConnector"
    assert config.kv_connector_extra_config == {"backends": ["UCX"]}


def test_another_connector_s_configuration_is_not_even_copied(
    parser: FlexibleArgumentParser,
) -> None:
    given = as_json(kv_connector="NixlConnector", kv_role="kv_both")
    namespace = parser.parse_args(["--kv-transfer-config", given])
    before = namespace.kv_transfer_config
    merge_flags(namespace)
    assert namespace.kv_transfer_config is before


def test_merging_twice_changes_nothing(parser: FlexibleArgumentParser) -> None:
    namespace = parser.parse_args(["--kv-connector", "pdplugin", "--kv-role", "decode"])
    before = namespace.kv_transfer_config
    merge_flags(namespace)
    assert namespace.kv_transfer_config == before
    assert namespace.kv_transfer_config.engine_id == before.engine_id


def test_adding_the_flags_twice_changes_nothing(parser: FlexibleArgumentParser) -> None:
    add_flags(parser)
    namespace = parser.parse_args(["--kv-connector", "pdplugin"])
    assert namespace.kv_transfer_config.kv_role == "kv_both"


def test_a_namespace_of_another_program_is_left_alone() -> None:
    namespace = FlexibleArgumentParser().parse_args([])
    merge_flags(namespace)
    assert not hasattr(namespace, "kv_transfer_config")


def test_the_parsed_configuration_makes_engine_arguments(
    parser: FlexibleArgumentParser, tmp_path: Path
) -> None:
    # A folder: vLLM looks a model's name up when HF_HUB_OFFLINE is set, as `make` sets it.
    model = ["--model", str(tmp_path)]
    namespace = parser.parse_args([*model, "--kv-connector", "pdplugin", "--kv-role", "prefill"])
    arguments = EngineArgs.from_cli_args(namespace)
    assert arguments.kv_transfer_config is not None
    assert arguments.kv_transfer_config.kv_role == "kv_producer"


def test_a_key_that_vllm_does_not_know_is_refused_in_our_words() -> None:
    namespace = FlexibleArgumentParser().parse_args([])
    namespace.kv_transfer_config = {"kv_connector": "pdplugin", "kv_roll": "kv_both"}
    with pytest.raises(ConfigError, match=r"--kv-transfer-config is refused: (?s:.*)kv_roll"):
        merge_flags(namespace)


def test_json_as_text_is_understood_too() -> None:
    namespace = FlexibleArgumentParser().parse_args([])
    namespace.kv_transfer_config = as_json(kv_connector="pdplugin", kv_role="kv_consumer")
    merge_flags(namespace)
    assert namespace.kv_transfer_config.kv_role == "kv_consumer"
