"""A collector for the tests: takes traces by OTLP over HTTP, and prints one line of JSON per span.

Usage: receive_traces.py. The first line is the port. Identifiers are in hexadecimal; attributes are a flat object.
"""

import http.server
import json

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


def plain(attributes):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}


class Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            for span in (span for scope in group.scope_spans for span in scope.spans):
                line = {
                    "path": self.path,
                    "key": self.headers.get("api-key"),
                    "resource": plain(group.resource.attributes),
                    "name": span.name,
                    "kind": span.kind,
                    "status": span.status.code,
                    "trace": span.trace_id.hex(),
                    "id": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "ms": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6,
                    "events": len(span.events),
                    "attributes": plain(span.attributes),
                }
                print(json.dumps(line), flush=True)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
print(server.server_port, flush=True)
server.serve_forever()
