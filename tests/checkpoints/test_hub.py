"""What comes over the network, from stand-ins on the loopback: the hub, and the published sets."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

import jax_refusal as jr
from jax_refusal.checkpoints.sources import SourceError, locate
from jax_refusal.config import DataConfig
from jax_refusal.data import prompts
from jax_refusal.data.prompts import KINDS, SPLITS, PromptError, load_prompts
from tests import runs

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def served(handler) -> Iterator[str]:
    """The address of an HTTP server on the loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False  # closing waits for them
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def closed_port() -> int:
    """A port of the loopback on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# Models


@pytest.fixture
def hub_cache(tiny_dir: Path, tmp_path: Path, monkeypatch) -> Path:
    """The hub's cache folder on this machine, with org/tiny in it, and no network."""
    folder = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_dir, folder / "snapshots" / SHA)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(SHA)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize("source", ["org/tiny", "org/tiny@main", f"org/tiny@{SHA}"])
def test_a_model_in_the_hub_cache_loads_without_a_network(source: str, hub_cache: Path, model):
    assert locate(source).directory == hub_cache / "snapshots" / SHA
    assert jr.load_chat(source).encode(["Hi"])
    loaded = jr.load_model(source)
    assert loaded.arch == model.arch
    assert all((loaded.leaves()[path] == leaf).all() for path, leaf in model.leaves().items())


@pytest.mark.parametrize("source", ["org/other", "org/tiny@v2"])
def test_a_model_that_is_not_in_the_cache_needs_a_network(source: str, hub_cache: Path):
    with pytest.raises(SourceError) as error:
        locate(source)
    text = str(error.value)
    assert f"model.source={source!r}" in text and "could not be reached" in text
    assert "a local directory in Hugging Face layout" in text


@pytest.mark.parametrize("source", ["org/na me", "-org/name", "org/name..x"])
def test_what_cannot_be_a_hub_id_is_refused(source: str, hub_cache: Path):
    with pytest.raises(SourceError, match="is no hub id"):
        locate(source)


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "original/model.safetensors": b"the weights again",
    "pytorch_model.bin": b"a pickle",
    "modeling_tiny.py": b"raise SystemExit('executed')",
    "README.md": b"# Tiny",
}


def identity(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks of it."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path == f"/api/models/org/tiny/tree/{SHA}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": identity(content)}
                for name, content in FILES.items()
            ]
            self.reply(json.dumps(tree).encode(), "application/json")
        elif path == "/api/models/org/tiny/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            info = {"_id": "1", "id": "org/tiny", "sha": SHA, "siblings": siblings}
            self.reply(json.dumps(info).encode(), "application/json")
        elif path == f"/org/tiny/resolve/{SHA}/{name}" and name in FILES:
            self.reply(FILES[name], "application/octet-stream")
        else:
            missing = "RevisionNotFound" if "/org/tiny/revision/" in path else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", missing)
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def reply(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{identity(content)}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


LOCATE = """
import sys
from jax_refusal.checkpoints.sources import SourceError, locate
for source in sys.argv[1:]:
    try:
        print(locate(source).directory)
    except SourceError as error:
        print(error)
"""


def located(home: Path, endpoint: str, *sources: str) -> list[str]:
    """What a process with this hub finds for each source: a directory, or the error."""
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", "no_proxy": "*"}
    result = subprocess.run(
        [sys.executable, "-c", LOCATE, *sources],
        env=runs.environment(home) | settings,
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_download_takes_weights_and_texts_and_no_code(tmp_path: Path):
    with served(Hub) as address:
        found, revision, other = located(tmp_path, address, "org/tiny", "org/tiny@v2", "org/other")
    names = {path.name: path.read_bytes() for path in Path(found).iterdir()}
    wanted = "config.json model.safetensors tokenizer.json chat_template.jinja".split()
    assert names == {name: FILES[name] for name in wanted}
    assert revision == "model.source='org/tiny@v2': no revision 'v2' there."
    assert other.startswith("model.source='org/other': the hub has no such model, or it is gated")

    # Once it is here, it is found without the network; what is not here is not.
    unreachable = f"http://127.0.0.1:{closed_port()}"
    again, other = located(tmp_path, unreachable, "org/tiny", "org/other")
    assert again == found
    assert "neither a local path nor in the hub cache, and the hub could not be reached" in other


# Instruction sets


def write_published(root: Path) -> None:
    """The authors' layout below a commit: ten instructions a set."""
    names = [f"splits/{kind}_{split}" for kind in KINDS for split in SPLITS]
    for name in [*names, "processed/jailbreakbench"]:
        path = root / "c0ffee" / "dataset" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"instruction": f"{name} {i}"} for i in range(10)]))


class Files(http.server.SimpleHTTPRequestHandler):
    """A folder; a file whose name ends in .cut breaks off in the middle."""

    def copyfile(self, source, outputfile) -> None:
        content = source.read()
        outputfile.write(content[: len(content) // 2] if b'"cut"' in content else content)

    def log_message(self, *_) -> None:
        pass


SMALL = DataConfig(source="paper", n_train=4, n_val=3, n_test=10)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """The user's cache folder, empty; and no proxies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


def home_at(address: str, monkeypatch) -> None:
    monkeypatch.setattr(prompts, "PUBLISHED", f"{address}/c0ffee/dataset")


def test_published_sets_are_fetched_once_and_kept(tmp_path: Path, cache: Path, monkeypatch):
    write_published(tmp_path)
    with served(functools.partial(Files, directory=str(tmp_path))) as address:
        home_at(address, monkeypatch)
        first = load_prompts(SMALL)
    assert first.texts("harmful", "test") == [f"processed/jailbreakbench {i}" for i in range(10)]
    assert all(text.startswith("splits/harmless_val ") for text in first.texts("harmless", "val"))
    kept = {path.name for path in (cache / "jax_refusal/published/c0ffee").iterdir()}
    names = {f"{k}_{s}.json" for k in KINDS for s in SPLITS if (k, s) != ("harmful", "test")}
    assert kept == names | {"jailbreakbench.json"}
    assert load_prompts(SMALL) == first  # the server is gone


@pytest.mark.parametrize(
    "content",
    [
        None,
        "<html>Log in to this network</html>",
        "[]",
        '[{"instruction": "a", "category": "cut"}]',
    ],
    ids=["missing", "a web page", "an empty list", "broken off"],
)
def test_what_is_not_the_set_is_refused_and_not_kept(content, tmp_path, cache, monkeypatch):
    write_published(tmp_path)
    path = tmp_path / "c0ffee/dataset/splits/harmless_val.json"
    path.unlink() if content is None else path.write_text(content)
    with served(functools.partial(Files, directory=str(tmp_path))) as address:
        home_at(address, monkeypatch)
        with pytest.raises(PromptError) as error:
            load_prompts(SMALL)
    text = str(error.value)
    assert "harmless_val could not be fetched from http://127.0.0.1" in text
    assert "data.paper_dir" in text and 'data.source="builtin"' in text
    left = {path.name for path in cache.rglob("*.*")}
    assert "harmless_val.json" not in left and not any(name.endswith(".tmp") for name in left)


DATASET = f"hub:org/sets@{SHA}"


def test_published_sets_from_a_dataset_in_the_hub_cache(tmp_path: Path, monkeypatch):
    write_published(tmp_path)
    snapshot = tmp_path / "hub/datasets--org--sets/snapshots" / SHA
    shutil.copytree(tmp_path / "c0ffee/dataset", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = load_prompts(dataclasses.replace(SMALL, paper_dir=DATASET))
    local = load_prompts(dataclasses.replace(SMALL, paper_dir=str(snapshot)))
    assert found == local
    for given, said in (
        ("hub:org/sets", "names no revision; give hub:OWNER/NAME@REVISION"),
        (f"hub:org/others@{SHA}", "splits/harmful_train.json is not in the hub cache"),
        (f"hub:org/na me@{SHA}", "is no hub id"),
    ):
        with pytest.raises(PromptError) as error:
            load_prompts(dataclasses.replace(SMALL, paper_dir=given))
        assert f"data.paper_dir={given!r}" in str(error.value) and said in str(error.value)


def test_no_network(cache: Path, monkeypatch):
    home_at(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    with pytest.raises(PromptError, match=r"harmful_train could not be fetched.*refused"):
        load_prompts(SMALL)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path, monkeypatch):
    write_published(tmp_path)
    cache.write_text("a file where the folder should be")
    with served(functools.partial(Files, directory=str(tmp_path))) as address:
        home_at(address, monkeypatch)
        with pytest.raises(PromptError, match=r"harmful_train\.json cannot be written"):
            load_prompts(SMALL)
