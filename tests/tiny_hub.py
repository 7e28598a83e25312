"""As much of the Hugging Face hub's API as fetching a model asks for, served from a folder on this
machine.
"""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "org/tiny-model"
COMMITS = ("1" * 40, "2" * 40)


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as the repository `NAME`; `asked` is what was fetched or asked,
    in order.

    `refuse(path)` may give a status and headers to answer with instead; for `seconds` weights stop
    half way.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.commit, self.asked, self.seconds = folder, COMMITS[0], [], 0.0
        self.refuse: Callable[[str], tuple[int, dict[str, str]] | None] = lambda path: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def fetched(self) -> list[str]:
        return [
            path.rsplit("/", 1)[1]
            for method, path in self.asked
            if method == "GET" and "/resolve/" in path
        ]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> object:
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path))
        if refusal := hub.refuse(path):
            return self.send(*refusal, b"", body)
        files = [file for file in sorted(hub.folder.rglob("*")) if file.is_file()]
        names = [file.relative_to(hub.folder).as_posix() for file in files]
        if path == f"/api/models/{NAME}/revision/main" or path == f"/api/models/{NAME}":
            siblings = [{"rfilename": name} for name in names]
            return self.send_json({"id": NAME, "sha": hub.commit, "siblings": siblings}, body)
        if path == f"/api/models/{NAME}/tree/{hub.commit}":
            tree = []
            for file, name in zip(files, names, strict=True):
                size, oid = file.stat().st_size, f"{hub.commit[:8]}-{file.name}"
                tree.append({"type": "file", "path": name, "size": size, "oid": oid})
            return self.send_json(tree, body)
        for revision in ("main", hub.commit):
            file = hub.folder / path.removeprefix(f"/{NAME}/resolve/{revision}/")
            if path.startswith(f"/{NAME}/resolve/{revision}/") and file.is_file():
                headers = {
                    "X-Repo-Commit": hub.commit,
                    "ETag": f'"{hub.commit[:8]}-{path.rsplit("/", 1)[1]}"',
                }
                return self.send(200, headers, file.read_bytes(), body)
        known = path.startswith(f"/{NAME}/")
        return self.send(
            404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"}, b"", body
        )

    def send_json(self, value: object, body: bool) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode(), body)

    def send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        half = len(content) // 2 if body else 0
        self.wfile.write(content[:half])
        if self.server.seconds and self.path.endswith(".safetensors"):
            self.wfile.flush()
            time.sleep(self.server.seconds)
        self.wfile.write(content[half:] if body else b"")

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""
