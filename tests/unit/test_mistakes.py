"""Mistakes that users of ``vllm-pd`` make: each is one line that says what to do, and a status."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
NOBODY = "http://127.0.0.1:1"
"""Where nothing listens."""
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 1, "vocab_size": 1000, "max_position_embeddings": 512,
    "torch_dtype": "float32",
}  # fmt: skip

_ALL_S = 840
"""So long may all command lines together take, on a busy machine."""

# What is typed, with {places} of the fixture; and what the line has to say.
MISTAKES: dict[str, tuple[str, str]] = {
    "up: port in use": ("vllm-pd up {model} --port {port}", "cannot listen at 127.0.0.1:{port}"),
    "up: port in use, several workers": (
        "vllm-pd up {model} --port {port} --workers 2", "cannot listen at 127.0.0.1:{port}"),
    "serve: port in use": (
        "vllm-pd serve {model} --port {port} --decode {nobody}", "cannot listen at"),
    "serve: port in use, on IPv6": (
        "vllm-pd serve {model} --host ::1 --port {port6} --decode {nobody}",
        "cannot listen at [::1]:{port6}"),
    "up: engines' port in use": (
        "vllm-pd up {model} --prefill 0 --engine-port-base {port}", "port {port} for an engine"),
    "serve: host that is not here": (
        "vllm-pd serve {model} --host 192.0.2.1 --decode {nobody}", "cannot listen at 192.0.2.1"),
    "serve: host that is none": (
        "vllm-pd serve {model} --host no.such.invalid --decode {nobody}",
        "cannot listen at no.such.invalid"),
    "serve: port that is none": (
        "vllm-pd serve {model} --port 99999 --decode {nobody}", "99999"),
    "serve: port that is no number": (
        "vllm-pd serve {model} --port http --decode {nobody}", "--port"),
    "serve: socket in no folder": (
        "vllm-pd serve {model} --uds /nowhere/socket --decode {nobody}", "/nowhere/socket"),
    "up: cluster key's file": (
        "VLLM_PD_CLUSTER_KEY_FILE=/nowhere vllm-pd up {model}", "/nowhere cannot be read"),
    "up: cluster key's file is a folder": (
        "VLLM_PD_CLUSTER_KEY_FILE={folder} vllm-pd up {model}", "{folder} cannot be read"),
    "up: short cluster key": (
        "VLLM_PD_CLUSTER_KEY=short vllm-pd up {model}", "at least 16"),
    "up: admin key's file": (
        "VLLM_PD_ADMIN_KEY_FILE=/nowhere vllm-pd up {model}", "/nowhere cannot be read"),
    "up: empty admin key's file": (
        "VLLM_PD_ADMIN_KEY_FILE={empty} vllm-pd up {model}", "{empty} is empty"),
    "serve: API key's file": (
        "VLLM_API_KEY_FILE=/nowhere vllm-pd serve {model} --decode {nobody}",
        "/nowhere cannot be read"),
    "engines: admin key's file": (
        "VLLM_PD_ADMIN_KEY_FILE=/nowhere vllm-pd engines list", "/nowhere cannot be read"),
    "top: admin key's file": (
        "VLLM_PD_ADMIN_KEY_FILE=/nowhere vllm-pd top", "/nowhere cannot be read"),
    "doctor: cluster key's file": (
        "VLLM_PD_CLUSTER_KEY_FILE=/nowhere vllm-pd doctor a:1 b:2", "/nowhere cannot be read"),
    "up: no such model": ("vllm-pd up /no/model", "/no/model cannot be served"),
    "up: no such model on the hub": ("vllm-pd up no/such-model", "no/such-model cannot be served"),
    "serve: no such model": (
        "vllm-pd serve /no/model --decode {nobody}", "/no/model cannot be served"),
    "up: model without a configuration": ("vllm-pd up {folder}", "{folder} cannot be served"),
    "up: model whose configuration is no JSON": (
        "vllm-pd up {broken}", "{broken} cannot be served"),
    "up: no model": ("vllm-pd up", "name the model"),
    "up: no such file": ("vllm-pd up {model} --config /no.yaml", "/no.yaml cannot be read"),
    "serve: no such file": (
        "vllm-pd serve {model} --decode {nobody} --config /no.yaml", "/no.yaml cannot be read"),
    "up: file that is a folder": ("vllm-pd up {model} --config {folder}", "cannot be read"),
    "up: file that is no YAML": ("vllm-pd up {model} --config {bad}", "{bad} is no YAML"),
    "up: no such deployment": ("vllm-pd up --deployment /no.yaml", "/no.yaml cannot be read"),
    "up: deployment that is no YAML": ("vllm-pd up --deployment {bad}", "{bad} is no YAML"),
    "up: deployment that is no text": (
        "vllm-pd up --deployment {binary}", "{binary} is no YAML"),
    "up: file that is no text": (
        "vllm-pd up {model} --config {binary}", "{binary} is no YAML"),
    "up: key's file that is no text": (
        "VLLM_PD_ADMIN_KEY_FILE={binary} vllm-pd up {model}", "{binary} is no text"),
    "up: model that is a file": ("vllm-pd up {empty}", "{empty} cannot be served"),
    "up: empty deployment": ("vllm-pd up --deployment {empty}", "{empty} is no deployment"),
    "up: log folder that is a file": ("vllm-pd up {model} --log-dir {empty}", "--log-dir {empty}"),
    "up: log folder nowhere": ("vllm-pd up {model} --log-dir /proc/x", "--log-dir /proc/x"),
    "up: chat template nowhere": (
        "vllm-pd up {model} --chat-template /no.jinja", "/no.jinja"),
    "serve: no tool parser": (
        "vllm-pd serve {model} --decode {nobody} --enable-auto-tool-choice",
        "--tool-call-parser"),
    "serve: certificate nowhere": (
        "vllm-pd serve {model} --decode {nobody} --ssl-certfile /no.pem", "--ssl-certfile /no.pem"),
    "up: unknown option": ("vllm-pd up {model} --flyy", "--flyy"),
    "serve: unknown option": ("vllm-pd serve {model} --decode {nobody} --flyy", "--flyy"),
    "engines: unknown option": ("vllm-pd engines list --flyy", "--flyy"),
    "top: unknown option": ("vllm-pd top --flyy", "--flyy"),
    "doctor: unknown option": ("vllm-pd doctor a:1 b:2 --flyy", "--flyy"),
    "check: unknown option": ("vllm-pd check --flyy", "--flyy"),
    "engines: unknown command": ("vllm-pd engines fly", "fly"),
    "engines: no command": ("vllm-pd engines", "command"),
    "unknown command": ("vllm-pd fly", "fly"),
    "up: fewer than no engines": ("vllm-pd up {model} --prefill -1", "--prefill -1"),
    "up: nobody decodes": ("vllm-pd up {model} --decode 0", "at least one engine must decode"),
    "serve: nobody decodes": ("vllm-pd serve {model} --prefill {nobody}", "that decodes"),
    "up: tensor parallel size 0": ("vllm-pd up {model} -tp 0", "--tensor-parallel-size 0"),
    "up: time that is none": ("vllm-pd up {model} --request-timeout nan", "'nan' is no time"),
    "up: time before now": ("vllm-pd up {model} --wait-for-engines -5", "'-5' is no time"),
    "top: no time between looks": ("vllm-pd top --interval 0", "'0' is no time"),
    "top: time before now": ("vllm-pd top --interval -1", "'-1' is no time"),
    "engines: time that is none": ("vllm-pd engines drain {nobody} --timeout x", "'x' is no time"),
    "doctor: no time": ("vllm-pd doctor a:1 b:2 --timeout 0", "'0' is no time"),
    "doctor: one engine": ("vllm-pd doctor a:1", "D"),
    "doctor: one engine twice": ("vllm-pd doctor a:1 http://a:1", "http://a:1 is named twice"),
    "serve: one engine twice": (
        "vllm-pd serve {model} --prefill {nobody} --decode {nobody}", "name it once"),
    "engines: nobody there": ("vllm-pd engines list --frontend {nobody}", "no frontend answers"),
    "engines: nobody there, on IPv6": (
        "vllm-pd engines list --frontend http://[::1]:1", "no frontend answers at http://[::1]:1"),
    "engines: no such host": (
        "vllm-pd engines list --frontend no.such.invalid:1", "no frontend answers"),
    "top: nobody there": ("vllm-pd top --frontend {nobody}", "no frontend answers"),
    "engines: add at nobody": (
        "vllm-pd engines add http://d:1 --role decode --frontend {nobody}", "no frontend answers"),
}  # fmt: skip
BAD_URLS = (
    "ftp://a:1", "http://", "http://[::1", "::1", "http://a:99999", "http://a:b", "http://a_-:1",
    "http://a:1/v1", "http://key@a:1", "http://[fe80::1%25eth0]:1", "http://a:0",
)  # fmt: skip
for url in BAD_URLS:
    said = f"{url!r} is not an engine's address"
    MISTAKES[f"serve: {url}"] = (f"vllm-pd serve {{model}} --decode {url}", said)
    MISTAKES[f"doctor: {url}"] = (f"vllm-pd doctor a:1 {url}", said)
for url in ("http://[::1", "http://a:99999", "ftp://a:1", "http://"):
    MISTAKES[f"engines: {url}"] = (
        f"vllm-pd engines list --frontend {url}",
        f"no frontend answers at {url}".rstrip("/"),
    )


def places(folder: Path) -> dict[str, str]:
    """Make what mistakes are made with; by the names that are in them."""
    model, broken, nothing = (folder / name for name in ("model", "broken", "nothing"))
    for each in (model, broken, nothing):
        each.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    (broken / "config.json").write_text("{")
    bad, empty, binary = (folder / name for name in ("bad.yaml", "empty.yaml", "binary"))
    binary.write_bytes(b"\xff\xfe\x00")
    bad.write_text("port: [1\n- :")
    empty.touch()
    names = {"model": model, "broken": broken, "folder": nothing, "bad": bad, "empty": empty}
    names["binary"] = binary
    return {"nobody": NOBODY, **{name: str(path) for name, path in names.items()}}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """The status of each, all that it has printed, and what it was to say."""
    folder = tmp_path_factory.mktemp("mistakes")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as taken6,
    ):
        there = places(folder)
        there |= {"port": str(taken.getsockname()[1]), "port6": str(taken6.getsockname()[1])}
        typed = [words.format(**there).split() for words, _ in MISTAKES.values()]
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith("VLLM_")
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.command_lines"],
            input=json.dumps(typed),
            capture_output=True,
            text=True,
            timeout=_ALL_S,
            env={**environ, "HF_HUB_OFFLINE": "1", "XDG_RUNTIME_DIR": str(folder)},
            cwd=REPO,
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    return {
        name: (status, text, said.format(**there))
        for (name, (_, said)), (status, text) in zip(MISTAKES.items(), told, strict=True)
    }


@pytest.mark.timeout(_ALL_S + 60)  # whichever comes first waits for all
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_a_status(
    outcomes: dict[str, tuple[int, str, str]], name: str
) -> None:
    status, text, said = outcomes[name]
    assert status != 0, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("vllm-pd")]
    assert len(lines) == 1, text
    assert said in lines[0]
    assert text.rstrip().endswith(lines[0])
    # Before it there is how the command is used, and at the most what vLLM has logged.
    assert len(text.splitlines()) < 15, text
