"""The part of the Hugging Face hub that a folder is sent to, on this machine: who is logged in,
repositories made, and commits, of which all files are kept."""

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator


class Hub:
    """What it was told.

    Attributes:
        role: of the token; None knows no token.
        repositories: by name the files that were sent, by their names there.
        fails: a part of an address for which it answers that it was asked wrongly.
    """

    def __init__(self):
        self.role: str | None = "write"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.fails = ""
        self.endpoint = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        if self.fails and self.fails in path:
            return 400, {"error": "out of order"}
        if path == "/api/whoami-v2":
            known = {"name": "me", "type": "user", "auth": {"accessToken": {"role": self.role}}}
            return (200, known) if self.role else (401, {"error": "Invalid user token."})
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return 200, {"url": f"{self.endpoint}/{name}"}
        parts = path.split("/")[3:]
        if len(parts) < 3:  # the client asks for more than a push needs
            return 404, {"error": path}
        user, name, *what = parts
        if what == ["preupload", "main"]:
            files = [f["path"] for f in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": path} | regular for path in files]}
        if what == ["commit", "main"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[f"{user}/{name}"][line["value"]["path"]] = content
            address = f"{self.endpoint}/{user}/{name}/commit/{'0' * 40}"
            return 200, {"commitUrl": address, "commitOid": "0" * 40, "hookOutput": ""}
        return 404, {"error": path}


@contextlib.contextmanager
def fake_hub(monkeypatch) -> Iterator[Hub]:
    """A hub that huggingface_hub finds in place of its own, with a token."""
    import huggingface_hub

    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = hub.answer(self.path.partition("?")[0], body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        hub.endpoint = f"http://localhost:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
