"""A server that answers as vLLM's would, out of a table: `python fake.py --config FILE`, or in a thread.

The file of options names a table beside it, `fake.json`: of each recipe (None is "") the ids by prompt.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def handler(table, *, counts=True, key=None):
    fired = {name: 0 for name in table if name}

    class Fake(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            rows = {name: [{"tokens": n}] if n else [] for name, n in fired.items()}
            self.tell({"recipes": rows} if self.path == "/thinksteer/fired" else {}, guarded=self.path != "/health")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (body["temperature"], body["repetition_penalty"], body["ignore_eos"]) == (0.0, 1.0, True)
            name = body.get("vllm_xargs", {}).get("thinksteer", "")
            if name in fired:
                fired[name] += counts
            if name not in table:
                sys.stderr.write(
                    "(W pid=1) RuntimeError: This head_dim is not done\n"
                    "X.EngineDeadError: EngineCore encountered an issue."
                )
                sys.stderr.flush()
                os._exit(1)
            ids = table[name][" ".join(map(str, body["prompt"]))]
            self.tell({"choices": [{"token_ids": ids[: body["max_tokens"]]}]})

        def tell(self, fields, *, guarded=True):
            good = not guarded or key is None or self.headers.get("Authorization") == f"Bearer {key}"
            text = json.dumps(fields if good else {"error": "Unauthorized"}).encode()
            self.send_response(200 if good else 401)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return Fake


def table_of(expected):
    return {
        name or "": {" ".join(map(str, ids)): list(row.ids) for ids, row in zip(expected.prompts, rows, strict=True)}
        for name, rows in expected.written.items()
    }


if __name__ == "__main__":
    config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    sys.stdout.write("a fake begins\n")
    sys.stdout.flush()
    table = json.loads(Path(config["model"]).with_name("fake.json").read_text())
    ThreadingHTTPServer((config["host"], config["port"]), handler(table)).serve_forever()
