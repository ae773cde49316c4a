"""A server whose engine computes nothing: words come at a fixed rate. Prints its port."""

import socket
import sys
import threading
import time
from typing import Any

from checkpoints import chat_tokenizer

from ahn_mlx.reading.session import Session
from ahn_mlx.serve.answers import Done, Piece, Request, Token
from ahn_mlx.serve.app import Server, make_app
from ahn_mlx.serve.metrics import Metrics
from ahn_mlx.serve.service import Service
from ahn_mlx.serve.shelf import Shelf

ROWS, PAUSE = 200, 0.1


class Read(Session):
    """Where a conversation stands that nobody has read."""

    def __init__(self) -> None:
        pass

    tokens = nbytes = 0  # type: ignore[assignment]


class Words:
    """An engine in all that a service asks of it."""

    def __init__(self) -> None:
        self.tokenizer, self.metrics, self.rows = chat_tokenizer(), Metrics(), ROWS
        self.model: Any = type("Model", (), {"args": type("Args", (), {"vocab_size": 256})})
        self.free, self.reading, self.stuck, self.beat = ROWS, 0, False, time.monotonic()
        self.over = False
        self.running: list[tuple[Request, list[int]]] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.turn, daemon=True).start()

    def check_free(self, n: int) -> None:
        pass

    def reserve(self, n: int) -> None:
        with self.lock:
            self.free -= n

    def submit(self, request: Request) -> None:
        with self.lock:
            self.running.append((request, [0]))

    def wake(self) -> None:
        pass

    def drain(self, seconds: float) -> None:
        pass

    def turn(self) -> None:
        session = Read()
        while True:
            time.sleep(PAUSE)
            with self.lock:
                for request, said in list(self.running):
                    said[0] += 1
                    request.tell(Piece(0, "word ", Token(1)))
                    if request.cancelled or said[0] == request.wish.sampling.max_tokens:
                        self.running.remove((request, said))
                        self.free += 1
                        request.tell(Done(0, "length", said[0], session, 1, "", None))


def main() -> None:
    engine: Any = Words()
    service = Service("stub", engine, Read(), Shelf(0), engine.metrics, None, 0, 0)
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    port = listening.getsockname()[1]
    print(port, flush=True)
    Server(make_app(service), service, "127.0.0.1", port).run(sockets=[listening])


if __name__ == "__main__":
    sys.exit(main())
