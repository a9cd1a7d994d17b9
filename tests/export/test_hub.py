"""Checkpoints come from a folder, or from a stand-in for the hub that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edge_llm.errors import ArgumentError, CheckpointError
from edge_llm_export.checkpoint.hub import Checkpoint, resolve

MAIN, OLDER = "a" * 40, "b" * 40
TOKEN = "hf_standin"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
INDEX = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
SMALL = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "additional_chat_templates/rag.jinja": b"rag",
    "README.md": b"---\nlicense: apache-2.0\n---\n# A model\n",
    "LICENSE.txt": b"terms",
}
# What must never be fetched.
UNWANTED = {
    ".gitattributes": b"",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.00.pth": b"pickle",
    "original/model.safetensors": b"copy",
    "consolidated.safetensors": b"copy",
    "model.fp16.safetensors": b"copy",
    "onnx/model.onnx": b"graph",
    "training_args.bin": b"pickle",
}
SHARDS = {
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-1-of-2.safetensors": b"first",
    "model-2-of-2.safetensors": b"second",
}
WHOLE = SMALL | UNWANTED | {"model.safetensors": WEIGHTS}
REPOS: dict[str, dict[str, dict[str, bytes]]] = {
    "lab/whole": {MAIN: WHOLE, OLDER: SMALL | {"model.safetensors": b"older"}},
    "lab/sharded": {MAIN: SMALL | UNWANTED | SHARDS | {"model-3-of-2.safetensors": b"stray"}},
    "lab/both": {MAIN: WHOLE | SHARDS},
    # Longer than the 10 MiB that huggingface_hub writes at a time.
    "lab/long": {MAIN: {"config.json": b"{}", "model.safetensors": WEIGHTS * 24}},
    "lab/gated": {MAIN: SMALL | {"model.safetensors": b"gated"}},
    "lab/pickled": {MAIN: SMALL | UNWANTED},
    "lab/no-config": {MAIN: {"model.safetensors": b"weights"}},
    "lab/broken-server": {},
    "legacy": {MAIN: {"config.json": b"{}", "model.safetensors": b"legacy"}},
}
REFS = {"main": MAIN, "v1": OLDER, "refs/pr/1": OLDER}


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that fetching a snapshot needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.cut_once: set[str] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """Files whose content was asked for."""
        found = (re.match(r"GET /(?!api/).*/\w{40}/(\S+)", line) for line in self.requests)
        return {match[1] for match in found if match}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""


class Handler(BaseHTTPRequestHandler):
    """Model information, trees, and files: large ones through a redirect, as from the hub."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        span = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {self.path} {span}".strip())
        path = self.path.partition("?")[0].replace("%2F", "/")
        if match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
            self.answer_api(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
            self.answer_file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/(.+)/(\w{40})/(.+)", path):
            self.send_content(REPOS[match[1]][match[2]][match[3]], {}, cut=match[3])
        else:
            self.refuse(404, "")

    def commit(self, repo: str, revision: str) -> str | None:
        """The revision's commit; None where an error was sent."""
        if repo == "lab/broken-server":
            self.refuse(500, "")
        elif repo not in REPOS:
            self.refuse(401, "RepoNotFound")
        elif (commit := REFS.get(revision, revision)) not in REPOS[repo]:
            self.refuse(404, "RevisionNotFound")
        else:
            return commit
        return None

    def answer_api(self, repo: str, what: str | None, revision: str) -> None:
        if (commit := self.commit(repo, revision)) is None:
            return
        files = REPOS[repo][commit]
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
            for name, data in files.items()
        ]
        siblings = [{"rfilename": name} for name in files]
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}
        body = json.dumps(entries if what == "tree" else info).encode()
        self.send_content(body, {"Content-Type": "application/json"})

    def answer_file(self, repo: str, revision: str, name: str) -> None:
        if (commit := self.commit(repo, revision)) is None:
            return
        if repo == "lab/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(403, "GatedRepo")
        elif name not in REPOS[repo][commit]:
            self.refuse(404, "EntryNotFound")
        elif name.endswith(".safetensors"):
            data = REPOS[repo][commit][name]
            # Another host, as the hub's store is: huggingface_hub must not follow it with a HEAD.
            location = f"http://localhost:{self.server.server_port}/cdn/{repo}/{commit}/{name}"
            linked = {"X-Linked-Etag": f'"{oid(data)}"', "X-Linked-Size": str(len(data))}
            self.send(302, b"", {"Location": location, "X-Repo-Commit": commit, **linked})
        else:
            data = REPOS[repo][commit][name]
            self.send_content(data, {"X-Repo-Commit": commit, "ETag": f'"{oid(data)}"'})

    def send_content(self, data: bytes, headers: dict[str, str], cut: str = "") -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self.send(200, data, headers, cut=cut)
            return
        start, stop = int(span[1]), int(span[2] or len(data) - 1) + 1
        headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self.send(206, data[start:stop], headers, cut=cut)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: str = "") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut in self.server.cut_once:
            self.server.cut_once.remove(cut)
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(body)


def oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.requests.clear()
    server.cut_once.clear()
    return server


CLIENT = """
import json, sys
from edge_llm_export.checkpoint.hub import resolve
from edge_llm.errors import EdgeLLMError
answers = []
for call in json.loads(sys.argv[1]):
    try:
        found = resolve(call.pop("source"), **call)
    except EdgeLLMError as error:
        answers.append({"error": type(error).__name__, "text": str(error)})
    else:
        answers.append({"path": str(found.path), "repo": found.repo, "revision": found.revision,
                        "license": found.license})
print(json.dumps(answers))
"""


@dataclass
class Machine:
    """Runs ``resolve`` in fresh processes that share one cache, for their environment is theirs."""

    home: Path
    endpoint: str

    def run(self, *calls: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("HF_")
        }
        own = {
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }
        ran = subprocess.run(
            [sys.executable, "-c", CLIENT, json.dumps(calls)],
            env=inherited | own | environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        answers: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
        return answers


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub.endpoint)


def files_under(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_fetches_what_an_export_needs_and_works_offline_afterwards(
    machine: Machine, hub: Hub
) -> None:
    (found,) = machine.run({"source": "lab/whole"})
    assert Path(found["path"]).is_relative_to(machine.home)
    assert (found["repo"], found["revision"]) == ("lab/whole", MAIN)
    assert found["license"] == "apache-2.0"
    assert files_under(found["path"]) == SMALL | {"model.safetensors": WEIGHTS}
    assert hub.fetched() == SMALL.keys() | {"model.safetensors"}
    hub.requests.clear()
    assert machine.run({"source": "lab/whole"}, HF_HUB_OFFLINE="1") == [found]
    assert machine.run({"source": "lab/whole", "revision": MAIN}, HF_HUB_OFFLINE="1") == [found]
    assert hub.requests == []
    # Without a network the cache answers too, and nothing is fetched twice.
    assert Machine(machine.home, closed_port()).run({"source": "lab/whole"}) == [found]
    assert machine.run({"source": "lab/whole"}) == [found]
    assert hub.fetched() == set()


def test_revisions_resolve_to_commits(machine: Machine) -> None:
    revisions = ("v1", "refs/pr/1", OLDER, MAIN, "main")
    answers = machine.run(*({"source": "lab/whole", "revision": name} for name in revisions))
    assert [answer["revision"] for answer in answers] == [OLDER, OLDER, OLDER, MAIN, MAIN]
    older = files_under(answers[0]["path"])
    assert older["model.safetensors"] == b"older"


def test_shards_are_those_that_the_index_names(machine: Machine, hub: Hub) -> None:
    (found,) = machine.run({"source": "lab/sharded"})
    assert files_under(found["path"]) == SMALL | SHARDS
    assert hub.fetched() == SMALL.keys() | SHARDS.keys()
    assert machine.run({"source": "lab/sharded"}, HF_HUB_OFFLINE="1") == [found]
    (Path(found["path"]) / "model-2-of-2.safetensors").unlink()
    (answer,) = machine.run({"source": "lab/sharded"}, HF_HUB_OFFLINE="1")
    assert answer["error"] == "CheckpointError"
    assert re.search(r"(lacks model-2-of-2|not wholly in the cache)", answer["text"])


def test_of_two_copies_of_the_weights_one_is_fetched(machine: Machine, hub: Hub) -> None:
    machine.run({"source": "lab/both"})
    assert hub.fetched() == SMALL.keys() | {"model.safetensors", "model.safetensors.index.json"}


def test_an_id_without_owner(machine: Machine) -> None:
    (found,) = machine.run({"source": "legacy"})
    assert (found["repo"], found["license"]) == ("legacy", None)


def test_a_cut_transfer_goes_on_where_it_stopped(machine: Machine, hub: Hub) -> None:
    hub.cut_once.add("model.safetensors")
    (found,) = machine.run({"source": "lab/long"})
    # Some versions of huggingface_hub go on by themselves, others when they are called again.
    if "error" in found:
        assert found["error"] == "CheckpointError"
        assert "Fetching lab/long from" in found["text"]
        assert "what was fetched is kept" in found["text"]
        (found,) = machine.run({"source": "lab/long"})
    assert files_under(found["path"])["model.safetensors"] == WEIGHTS * 24
    assert hub.cut_once == set()
    spans = [line for line in hub.requests if re.search(r"model.safetensors bytes=[1-9]", line)]
    assert len(spans) == 1


@pytest.mark.parametrize("way", ["HF_TOKEN", "token"])
def test_a_gated_model_needs_a_token(machine: Machine, way: str) -> None:
    (refused,) = machine.run({"source": "lab/gated"})
    assert refused["error"] == "CheckpointError"
    assert "lab/gated is gated" in refused["text"]
    assert f"terms on {machine.endpoint}/lab/gated, then set HF_TOKEN" in refused["text"]
    if way == "HF_TOKEN":
        (found,) = machine.run({"source": "lab/gated"}, HF_TOKEN=TOKEN)
    else:
        (found,) = machine.run({"source": "lab/gated", "token": TOKEN})
    assert found["revision"] == MAIN


def test_what_is_not_on_the_hub_is_named(machine: Machine, hub: Hub) -> None:
    calls = {
        "lab/absent": "There is no model lab/absent on http://127.0.0.1",
        "not an id": "'not an id' is neither a folder that exists nor a hub id. Write owner/name",
        "lab/pickled": f"lab/pickled at {MAIN} has neither model.safetensors nor",
        "lab/no-config": "lacks config.json",
        "lab/broken-server": "500",
    }
    answers = machine.run(
        *({"source": source} for source in calls),
        {"source": "lab/whole", "revision": "v9"},
        {"source": "lab/whole", "revision": "c" * 40},
    )
    expected = [*calls.values(), "no revision 'v9'", f"no revision '{'c' * 40}'"]
    for answer, message in zip(answers, expected, strict=True):
        assert answer["error"] == "CheckpointError"
        assert message in answer["text"]
    assert "save_pretrained(folder, safe_serialization=True)" in answers[2]["text"]
    assert not any(".bin" in line or ".pth" in line for line in hub.requests)


def test_no_network_and_no_cache(machine: Machine, hub: Hub) -> None:
    (offline,) = machine.run({"source": "lab/whole"}, HF_HUB_OFFLINE="1")
    assert offline["error"] == "CheckpointError"
    assert "HF_HUB_OFFLINE forbids" in offline["text"]
    assert hub.requests == []
    machine.endpoint = closed_port()
    (cut_off,) = machine.run({"source": "lab/whole"})
    assert cut_off["error"] == "CheckpointError"
    assert f"{machine.endpoint} could not be reached" in cut_off["text"]
    assert "Check the network" in cut_off["text"]


def test_a_disk_that_takes_no_files_is_named(machine: Machine) -> None:
    (machine.home / "hub").write_text("a file in the cache's place")
    (answer,) = machine.run({"source": "lab/whole"})
    assert answer["error"] == "CheckpointError"
    assert "Fetching lab/whole from http://127.0.0.1" in answer["text"]


def closed_port() -> str:
    """An endpoint where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    for source in (tmp_path, str(tmp_path)):
        assert resolve(source) == Checkpoint(tmp_path, None, None, None)
    with pytest.raises(ArgumentError) as caught:
        resolve(tmp_path, revision="main")
    assert caught.value.argument == "revision"


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab" / "whole").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("lab/whole") == Checkpoint(Path("lab/whole"), None, None, None)


@pytest.mark.parametrize(
    "source", ["./model", "../model", "/no/model", "~/model", "a/b/c", "model/", "a\\b", ".", "/"]
)
def test_paths_that_do_not_exist_are_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    if source in (".", "/"):
        source += "absent"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder that exists"):
        resolve(source)


def test_a_path_object_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    for source in (Path("lab/whole"), Path("model.gguf")):
        with pytest.raises(CheckpointError, match="is not a folder that exists"):
            resolve(source)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ArgumentError, match="source must be a folder or a hub id"):
        resolve("")


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("\ufeff---\r\ntags:\r\n- x\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ('---\nlicense: "cc-by-4.0" # see below\n---\n', "cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: llama3.2\n---\n", "llama3.2"),
        ("---\nlicense: other\nlicense_name: Tongyi Qianwen\n---\n", "Tongyi Qianwen"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n- apache-2.0\nlanguage: en\n---\n", "mit, apache-2.0"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense:\nlanguage: en\n---\n", None),
        ("---\nmodel:\n  license: mit\n---\n", None),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("# A model\nlicense: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_is_that_of_the_front_matter(
    tmp_path: Path, readme: str, licence: str | None
) -> None:
    (tmp_path / "README.md").write_bytes(readme.encode())
    assert resolve(tmp_path).license == licence
