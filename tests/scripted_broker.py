"""A broker whose answers a test writes."""

from __future__ import annotations

import socket
import struct
import threading
import time


class ScriptedBroker:
    """Answers each request with the next of ``bodies``; None: hangs up. ``requests``: what came.

    ``delay_s``: before each answer.
    """

    def __init__(self, *bodies, delay_s=0.0):
        self._delay_s = delay_s
        self.requests = []
        self._bodies = bodies
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        connection = None
        for body in self._bodies:
            while connection is None or not (head := connection.recv(4, socket.MSG_WAITALL)):
                connection, _ = self._listener.accept()  # also where the client hung up
            request = connection.recv(struct.unpack(">i", head)[0], socket.MSG_WAITALL)
            self.requests.append(request)
            if body is None:
                connection.close()
                connection = None
                continue
            time.sleep(self._delay_s)
            answer = request[4:8] + body
            for byte in struct.pack(">i", len(answer)) + answer:  # in the smallest pieces
                connection.sendall(bytes((byte,)))
        self._listener.close()

    def join(self):
        self._thread.join(10)
