"""As much of Neutron as Nova needs for instances without a network: it has nothing.

`python -m services.networks PORT`
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Nothing(BaseHTTPRequestHandler):
    """Answers every request with an empty collection of its kind."""

    protocol_version = 'HTTP/1.1'

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = self.path.partition('?')[0].split('/')[2:]
        kind = parts[0].removesuffix('.json').replace('-', '_') if parts else ''
        content: Any = {kind: []}
        if not kind:
            content = {'versions': [{'id': 'v2.0', 'status': 'CURRENT', 'links': []}]}
        elif kind == 'extensions':
            content = {kind: [{'alias': name, 'name': name} for name in _EXTENSIONS]}
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *_: Any) -> None:
        pass


_EXTENSIONS = ['binding', 'external-net']


if __name__ == '__main__':
    ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Nothing).serve_forever()
