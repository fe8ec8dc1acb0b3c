"""A stand-in for NDIF on this machine: it takes a trace over HTTP, runs it in a process that knows neither `steer` nor
`probes`, and gives back what was saved."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SERVER = """
import io, json, sys
import torch, zstandard

class Stranger:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("steer", "probes"):
            raise ModuleNotFoundError(f"the server has no {name}")

sys.meta_path.insert(0, Stranger())
from nnsight import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import inc
from transformers import AutoTokenizer

blob, out, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = TransformersModel(folder, task="text-generation", dispatch=True, dtype=torch.float32, tokenizer=tokenizer)
with open(blob, "rb") as file:
    tracer = RequestModel.deserialize(file.read(), model._remoteable_persistent_objects(), compress=True)
inc()  # within a trace, where things can be saved
with torch.no_grad():
    tracer.execute(tracer.info.code)
saved = {name: value for name, value in tracer.info.frame.f_locals.items() if isinstance(value, torch.Tensor)}
held = io.BytesIO()
torch.save(saved, held)
with open(out, "wb") as file:
    file.write(zstandard.ZstdCompressor().compress(held.getvalue()))
"""


@contextmanager
def ndif(folder: Path, work: Path) -> Iterator[str]:
    """Its address. `folder` is the model that it serves, `work` where it keeps its files."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            boundary = re.search("boundary=(.+)", self.headers["Content-Type"])[1].encode()
            parts = [part for part in body.split(b"--" + boundary) if b'name="blob"' in part]
            (work / "blob").write_bytes(parts[0].partition(b"\r\n\r\n")[2].removesuffix(b"\r\n"))
            ran = subprocess.run(
                [sys.executable, "-c", SERVER, work / "blob", work / "saved", folder],
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            (work / "error").write_text("" if ran.returncode == 0 else ran.stderr)
            self.answer({"id": "one", "status": "RECEIVED"})

        def do_GET(self) -> None:
            if self.path == "/saved":
                self.send(200, (work / "saved").read_bytes())
                return
            error = (work / "error").read_text()
            done = {"status": "COMPLETED", "data": f"{address}/saved"}
            self.answer({"id": "one", **({"status": "ERROR", "description": error} if error else done)})

        def answer(self, fields: dict[str, str]) -> None:
            self.send(200, json.dumps(fields).encode())

        def send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        thread.join()
