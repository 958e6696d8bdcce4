"""Taking an address, and leaving the key."""

from __future__ import annotations

import argparse
import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from vllm_pd_plugin.errors import ConfigError
from vllm_pd_plugin.frontend.admin_keys import AdminKey, find

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's, not ours
    from vllm_pd_plugin.frontend.options import add_engine_options
    from vllm_pd_plugin.frontend.parsing import make_parser
    from vllm_pd_plugin.frontend.processes.listening import UNSENT_BYTES, findable, listen


pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # vLLM's


def parse(*words: str) -> argparse.Namespace:
    parser, _ = make_parser("this", "", "", add_engine_options)
    return parser.parse_args(["M", *words])


def test_a_port_in_use_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            listen(parse("--port", str(port)), reuse_port=False)
    assert str(caught.value) == (
        f"cannot listen at 127.0.0.1:{port}: Address already in use; "
        "say where with --host and --port"
    )


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--host", "192.0.2.1"], "192.0.2.1:8000: Cannot assign"),
        (["--host", "2001:db8::1"], r"\[2001:db8::1\]:8000: "),
        (["--port", "65536"], "127.0.0.1:65536: "),
        (["--uds", "/no/such/folder/socket"], "/no/such/folder/socket: No such file"),
        (["--enable-auto-tool-choice", "--tool-call-parser", "none"], None),
    ],
)
def test_an_address_that_cannot_be_had_is_named(words: list[str], where: str | None) -> None:
    pattern = f"cannot listen at {where}" if where else "invalid tool call parser: none"
    with pytest.raises(ConfigError, match=pattern) as caught:
        listen(parse(*words), reuse_port=False)
    assert len(str(caught.value).splitlines()) == 1


def test_little_is_kept_in_the_kernel_for_a_client_that_does_not_read() -> None:
    with listen(parse("--port", "0"), reuse_port=False) as sock, socket.socket() as client:
        sock.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNSENT_BYTES)
        client.connect(sock.getsockname())
        connection, _ = sock.accept()
        with connection:
            connection.settimeout(0.1)
            num_taken = 0
            with suppress(TimeoutError):
                while num_taken <= 4 * UNSENT_BYTES:
                    num_taken += connection.send(bytes(4096))
    assert UNSENT_BYTES <= num_taken <= 4 * UNSENT_BYTES


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_a_key_that_was_made_is_found_by_the_port_that_was_bound(runtime: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        with findable(AdminKey("made", is_made=True), sock):
            assert find(port, os.environ) == "made"
        assert find(port, os.environ) is None


def test_a_key_that_was_given_is_written_nowhere(runtime: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        findable(AdminKey("given", is_made=False), sock),
    ):
        assert list(runtime.iterdir()) == []


def test_behind_a_unix_socket_there_is_no_port_to_find_it_by(runtime: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX) as sock,
        findable(AdminKey("made", is_made=True), sock),
    ):
        assert list(runtime.iterdir()) == []


def test_a_frontend_serves_also_where_its_key_cannot_be_left(
    runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (runtime / "vllm-pd").symlink_to("/tmp")
    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        findable(AdminKey("made", is_made=True), sock),
    ):
        assert "the admin API cannot be used" in caplog.text
        assert "VLLM_PD_ADMIN_KEY" in caplog.text
