"""What is pushed is what lies in the folder: the hub's real client speaks to a hub of ours on this machine."""

import base64
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from families import build
from huggingface_hub.errors import HfHubHTTPError

import steer.folding._export
import steer.folding.export_lora
from probes.model.sites import Site
from steer.checkpoints.hub import push
from steer.folding._export import export
from steer.folding.draft import NotFoldable
from steer.folding.export_lora import export_adapter
from steer.interventions.activation import Ablate, Clamp
from steer.recipes.recipe import Recipe

HEAD = Site(1, "result", 2)
EXPORTS = [export, export_adapter]


@dataclass
class Hub:
    """What was sent to it, in order, and what it holds: repository, visibility, files."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    repositories: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    refuses: str = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        self.asked.append(path)
        if self.refuses and self.refuses in path:
            return 403, {"error": "You may not write here."}
        if path == "/api/repos/create":
            return self.create(**json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repository, verb = "/".join(path.split("/")[3:5]), path.split("/")[5]
        assert repository in self.repositories
        if verb == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        assert verb == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.url}/{repository}/commit/{'0' * 40}"
        return 200, {"commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""}

    def create(self, name, organization, visibility):
        repository = f"{organization or 'me'}/{name}"
        known = repository in self.repositories
        self.repositories.setdefault(repository, visibility)
        return (409 if known else 200), {"url": f"{self.url}/{repository}"}


@pytest.fixture
def hub(monkeypatch):
    """The client believes that this is huggingface.co; it ends with the test."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.tokens.add(self.headers.get("Authorization"))
            status, words = hub.answer(self.path.split("?")[0], body)
            answer = json.dumps(words).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_GET(self):  # the client looks up who it runs under; it sends nothing
            self.send_error(404)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture
def recipe(model):
    return Recipe.of(model, [Ablate(HEAD, torch.arange(32.0))], method="a test")


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", EXPORTS)
def test_every_file_of_the_whole_folder_is_in_one_commit_of_a_private_repository(write, hub, model, recipe, tmp_path):
    write(model, recipe, tmp_path / "edited", push_to="lab/edited")
    assert hub.files == files_in(tmp_path / "edited")
    assert {"README.md", "recipe/recipe.yaml"} < hub.files.keys()
    assert hub.repositories == {"lab/edited": "private"}
    assert [path for path in hub.asked if "commit" in path] == ["/api/models/lab/edited/commit/main"]
    assert hub.asked[0] == "/api/repos/create"
    assert hub.tokens == {"Bearer hf_test"}
    assert [path.name for path in tmp_path.iterdir()] == ["edited"]


@pytest.mark.parametrize("write", EXPORTS)
def test_it_is_public_where_that_is_asked_and_a_bare_name_is_of_the_account(write, hub, model, recipe, tmp_path):
    write(model, recipe, tmp_path / "edited", push_to="edited", private=False)
    assert hub.repositories == {"me/edited": "public"}
    assert hub.files == files_in(tmp_path / "edited")


def test_a_repository_that_is_there_is_pushed_to_and_keeps_its_visibility(hub, model, recipe, tmp_path):
    hub.repositories["lab/edited"] = "public"
    export(model, recipe, tmp_path / "edited", push_to="lab/edited")
    assert hub.repositories == {"lab/edited": "public"}
    assert hub.files == files_in(tmp_path / "edited")


@pytest.mark.parametrize("write", EXPORTS)
def test_nothing_is_sent_where_nothing_is_asked(write, hub, model, recipe, tmp_path):
    write(model, recipe, tmp_path / "edited")
    assert (hub.asked, hub.files) == ([], {})


@pytest.mark.parametrize("write", EXPORTS)
def test_nothing_is_sent_of_an_export_that_fails(write, hub, model, recipe, monkeypatch, tmp_path):
    bent = Recipe.of(model, [Clamp(HEAD, torch.ones(32), low=0.0)])
    with pytest.raises(NotFoldable):
        write(model, bent, tmp_path / "edited", push_to="lab/edited")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError):
        write(model, recipe, tmp_path / "taken", push_to="lab/edited")

    def fail(*_, **__):
        raise OSError("the disk is full")

    for module in (steer.folding._export, steer.folding.export_lora):
        monkeypatch.setattr(module, "write_card", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write(model, recipe, tmp_path / "edited", push_to="lab/edited")
    assert (hub.asked, hub.repositories, hub.files) == ([], {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("write", EXPORTS)
def test_a_name_that_no_repository_can_have_is_refused_before_any_work(write, hub, model, recipe, tmp_path):
    with pytest.raises(ValueError, match="Repo id must be in the form"):
        write(model, recipe, tmp_path / "edited", push_to="a/b/c")
    assert hub.asked == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refused", ["create", "preupload", "commit"])
def test_a_push_that_is_refused_leaves_the_whole_folder_to_push_again(refused, hub, model, recipe, tmp_path):
    hub.refuses = refused
    with pytest.raises(HfHubHTTPError, match="403"):
        export(model, recipe, tmp_path / "edited", push_to="lab/edited")
    assert hub.files == {}
    export(model, recipe, tmp_path / "whole")
    assert files_in(tmp_path / "edited") == files_in(tmp_path / "whole")

    hub.refuses = ""
    push(tmp_path / "edited", "lab/edited")
    assert hub.files == files_in(tmp_path / "edited")


def test_only_a_folder_is_pushed(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="edited is not a folder, so there is nothing to push"):
        push(tmp_path / "edited", "lab/edited")
    assert hub.asked == []
