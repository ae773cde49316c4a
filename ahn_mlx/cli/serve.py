"""ahn-mlx serve: OpenAI's and Anthropic's APIs, in memory that does not grow."""

import ipaddress
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..errors import AHNError
from ..outputs.files import check_writable
from .options import check_numbers, load_model, loading_options, needs_memory, window_bits_options
from .ranks import OnRanks, here, is_first, share
from .terminal import say, warn_slow

LONGEST_KEY = 1 << 12  # characters
LATE = 30.0  # seconds in which what is being done with other ranks comes to its end


@click.command(cls=OnRanks)
@loading_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8080, show_default=True, help="0 takes any that is free.")
@click.option("--rows", default=4, show_default=True, help="Answers at a time.")
@window_bits_options
@click.option(
    "--memories",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of digested texts, each a model name MODEL@NAME. Default: a place of yours.",
)
@click.option(
    "--api-key-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the key that clients must bring.",
)
@click.option("--allow-origin", multiple=True, help="Web page that may ask, http://HOST:PORT.")
@needs_memory
def serve(**options: Any) -> None:
    """Serve a model to many clients: OpenAI's and Anthropic's APIs.

    Every conversation has a row of fixed size; rows are all there is, however long clients
    talk. Ctrl-C ends: answers that run are finished or cut, and what is being digested is
    kept.

    mlx.launch may start it on several machines; clients talk to the first.

    \b
    ahn-mlx serve
    ahn-mlx serve --model ahn-gdn-3b --rows 8 --memories books
    ahn-mlx serve --host 0.0.0.0 --api-key-file key.txt
    """
    check_numbers(options)
    _check(options)
    with ExitStack() as opened:
        door: list[Any] = []

        def open_door() -> None:
            door.append(_key(options["api_key_file"]))
            door.append(opened.enter_context(_open(options)))

        share(open_door)
        warn_slow()
        model, tokenizer = load_model(options)
        if is_first():
            key, listening = door
            _run(options, key, listening, model, tokenizer)
        else:
            _follow(options, model, tokenizer)


def _open(options: dict[str, Any]) -> socket.socket:
    """What must be there before a model is loaded for nothing."""
    memories = options["memories"] = options["memories"] or _own_memories()
    check_writable(memories)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise AHNError(f"{e.name} is missing: pip install 'ahn-mlx[serve]'") from None
    return _listen(options["host"], options["port"])


def _check(options: dict[str, Any]) -> None:
    if options["rows"] < 1:
        raise AHNError(f"--rows must be at least 1, not {options['rows']}")
    if not 0 <= options["port"] <= 65535:
        raise AHNError(f"--port must be from 0 to 65535, not {options['port']}")
    for origin in options["allow_origin"]:
        scheme, _, host = origin.partition("://")
        if scheme not in ("http", "https") or not host or set(host) & set("/*@ "):
            raise AHNError(
                f"--allow-origin must be as http://localhost:3000, without a path, not {origin!r}"
            )
    if not _is_loopback(options["host"]) and options["api_key_file"] is None:
        raise AHNError(
            f"--host {options['host']} can be reached from other machines; give --api-key-file"
        )


def _own_memories() -> Path:
    """Where memories are kept if nobody says where: they are data, not a cache."""
    data = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    place = data / "ahn-mlx" / "memories"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise AHNError(f"{place}: {e.strerror}; give a directory as --memories") from None
    return place


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key(file: Path | None) -> str | None:
    """The key in a file."""
    if file is None:
        return None
    try:
        with file.open() as f:
            key = f.read(LONGEST_KEY).strip()  # a device has no end
    except (OSError, UnicodeDecodeError) as e:
        raise AHNError(f"{file}: {getattr(e, 'strerror', None) or 'is not text'}") from None
    if not 16 <= len(key) < LONGEST_KEY or not key.isascii() or any(c.isspace() for c in key):
        raise AHNError(f"{file}: a key is one line of 16 ASCII characters or more without spaces")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """A socket at this address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise AHNError(f"cannot listen at {host} port {port} ({reason}); give another") from None


def _run(
    options: dict[str, Any],
    key: str | None,
    listening: socket.socket,
    model: Any,
    tokenizer: Any,
) -> None:
    from ..serve.app import Server, end, make_app
    from ..serve.build import build
    from ..serve.guard import LOOPBACK

    loopback = _is_loopback(options["host"])
    service, digests, fit = build(
        model,
        tokenizer,
        name=options["name"],
        rows=options["rows"],
        kv_bits=int(options["kv_bits"]) if options["kv_bits"] else None,
        kv_group_size=int(options["kv_group_size"]),
        memories=options["memories"],
    )
    hosts = (*LOOPBACK, options["host"].lower()) if loopback else None
    app = make_app(service, digests, key, hosts, frozenset(options["allow_origin"]))
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"http://{shown}:{port}/v1 serves {service.name}")
    rows = f"{options['rows']} rows of {service.row_bytes / 1e6:.1f} MB"
    click.echo(f"{rows}, as much again for what waits; {fit} rows fit in this machine")
    click.echo(f"documents and conversations, in a browser: http://{shown}:{port}/")
    click.echo(f"memories: {options['memories']}")
    if not loopback:
        click.echo("other machines can reach this server; every request must bring the key")
    try:
        Server(app, service, host, port).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        began = time.monotonic()
        late = threading.Timer(LATE, _leave)
        late.daemon = True
        if here() is not None:
            late.start()
        end(service, digests)
        late.cancel()
        say(f"stopped in {time.monotonic() - began:.1f} s")
        if broken := service.engine.acts.broken:
            raise broken


def _leave() -> None:
    """End though a rank that is gone is waited for. What was saved is whole."""
    from ..model.ranks import LOST

    say(f"error: {LOST}")
    os._exit(2)


def _follow(options: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """On the ranks that no client talks to."""
    from ..serve.acts import Acts

    acts = Acts(model, tokenizer, options["rows"])
    signal.signal(signal.SIGINT, acts.press)  # rank 0 lets answers end
    acts.follow()
