"""Which of the words that were typed belong together, and what a file of options adds."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.typed_words import TypedWords


def make_typed() -> TypedWords:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_tag", nargs="?")
    for name in ("--host", "--port", "--dtype", "--max-model-len", "--tokenizer", "--config"):
        parser.add_argument(name)
    parser.add_argument("--tensor-parallel-size", "-tp")
    parser.add_argument("--kv-transfer-config")
    parser.add_argument("--optimization-level")
    parser.add_argument("--slo", action="append")
    parser.add_argument("--api-key", nargs="*")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--maybe", nargs="?")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--enable-refresh", action=argparse.BooleanOptionalAction)
    return TypedWords(parser)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("M", "M"),
        ("--tokenizer M --dtype float32 M", "--tokenizer M|--dtype float32|M"),
        ("M --tokenizer M", "M|--tokenizer M"),
        ("--tokenizer=M M", "--tokenizer=M|M"),
        ("--served-model-name a b --enforce-eager M", "--served-model-name a b|--enforce-eager|M"),
        ("--api-key --dtype x", "--api-key|--dtype x"),
        ("--maybe --dtype x", "--maybe|--dtype x"),
        ("--maybe yes M", "--maybe yes|M"),
        ("--max-model-len -1 M", "--max-model-len -1|M"),
        ("--served-model-name -1 b", "--served-model-name -1 b"),
        ("-tp 2 M", "-tp 2|M"),
        ("-tp=2 M", "-tp=2|M"),
        ("-O3 M", "-O3|M"),
        ("-O 3 M", "-O 3|M"),
        ("--max_model_len 9 M", "--max_model_len 9|M"),
        ("--max-mod 9 M", "--max-mod 9|M"),
        ("--kv-transfer-config.a.b 5 M", "--kv-transfer-config.a.b 5|M"),
        ("--kv_transfer_config.a_b=5 M", "--kv_transfer_config.a_b=5|M"),
        ("--no-enable-refresh M", "--no-enable-refresh|M"),
        ("--dtype x -- M", "--dtype x|M"),
    ],
)
def test_words_are_divided_as_argparse_does_it(line: str, expected: str) -> None:
    read = [" ".join(each.words) for each in make_typed().read(line.split())]
    assert "|".join(read) == expected


def test_the_model_is_left_out_and_not_a_value_that_is_equal() -> None:
    words = ["--tokenizer", "M", "--dtype", "float32", "M"]
    assert make_typed().without(words, ()) == ["--tokenizer", "M", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--dtype float32 --host a", "--host a"),
        ("--dtype=half --host a", "--host a"),
        ("--dty half --host a", "--host a"),
        ("--tensor-parallel-size 2 --host a", "--host a"),
        ("-tp 2 --host a", "--host a"),
        ("--no-enable-refresh --host a", "--host a"),
        ("--kv-transfer-config.x 1 --host a", "--host a"),
        ("--kv_transfer_config {} --host a", "--host a"),
    ],
)
def test_an_option_is_left_out_by_whichever_name_it_has(line: str, expected: str) -> None:
    dropped = {"--dtype", "-tp", "--enable-refresh", "--kv-transfer-config"}
    assert make_typed().without(line.split(), dropped) == expected.split()


def with_file(tmp_path: Path, content: str, line: str = "--config FILE") -> list[str]:
    path = tmp_path / "up.yaml"
    path.write_text(content)
    return make_typed().with_config_file(line.replace("FILE", str(path)).split())


@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
def test_a_file_says_the_same_as_words(tmp_path: Path, form: str) -> None:
    content = """
        model: M
        port: 8000
        max_model_len: 2048
        enforce-eager: true
        served-model-name: [a, b]
        slo: [500/50, batch=10000/200]
        kv-transfer-config: {kv_role: x}
        enable-refresh: false
        dtype: null
    """
    assert with_file(tmp_path, content, form) == [
        "M", "--port", "8000", "--max-model-len", "2048", "--enforce-eager",
        "--served-model-name", "a", "b", "--slo", "500/50", "--slo", "batch=10000/200",
        "--kv-transfer-config", '{"kv_role": "x"}', "--no-enable-refresh",
    ]  # fmt: skip


def test_a_flag_that_can_only_be_set_is_left_out_where_it_is_not(tmp_path: Path) -> None:
    assert with_file(tmp_path, "enforce-eager: false") == []


def test_what_is_typed_comes_after_the_file_and_counts_more(tmp_path: Path) -> None:
    words = with_file(tmp_path, "model: A\nport: 1", "--port 2 --config FILE B --dtype x")
    assert words == ["B", "--port", "1", "--port", "2", "--dtype", "x"]


def test_without_a_file_nothing_changes() -> None:
    assert make_typed().with_config_file(["M", "--port", "1"]) == ["M", "--port", "1"]
    assert make_typed().with_config_file(["M", "--dtype", "--config"]) == [
        "M",
        "--dtype",
        "--config",
    ]


@pytest.mark.parametrize("name", ["colour", "engine-args", "config", "no-port"])
def test_a_key_that_is_no_option_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"up\.yaml: '{name}' is no option of this command"):
        with_file(tmp_path, f"port: 1\n{name}: 2")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a: [", "is no YAML"),
        ("[a, b]", "is no list of options"),
        ("1: 2", "is no list of options"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(
    tmp_path: Path, content: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        with_file(tmp_path, content)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="--config nowhere.yaml cannot be read: No such file"):
        make_typed().with_config_file(["--config", "nowhere.yaml"])


def test_one_file_is_named_at_the_most() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        make_typed().with_config_file(["--config", "a", "--config=b"])
    with pytest.raises(ConfigError, match="--config needs a value"):
        make_typed().with_config_file(["--config"])
