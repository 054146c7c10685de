"""`python -m evaluate.serve --checkpoint C --port P`: a checkpoint answers robots over the network.

WebSocket at `/`, as openpi's clients speak it: the server sends its metadata, then answers each binary message, an
observation in msgpack, with actions in msgpack, or with a text message when something is wrong. Over HTTP: `POST
/infer` (application/json or application/msgpack), `GET /metadata`, `GET /healthz`. Messages: docs/evaluate.md.
"""

import argparse
import asyncio
import errno
import ipaddress
import logging
import os
import re
import signal
import socket

import qwen2_vla.environment  # noqa: F401  before the libraries that it prepares

# isort: split
from data_utils import UserError, run_command
from evaluate.serving import Batcher, Limits, PolicyServer, RequestReader
from qwen2_vla import Qwen2VLAPolicy


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which does not listen yet.

    Raises:
        UserError: naming the flag, when the address cannot be had.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port: expected 0 to 65535, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host: expected an address of this machine, found {host}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise address_error(error, host, port) from None
    return listener


def address_error(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"--port: expected a free port, found {port} of {host} in use")
    if error.errno == errno.EACCES:
        return UserError(f"--port: expected one that this user may open, found {port}")
    return UserError(f"--host: expected an address of this machine, found {host} ({error.strerror})")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def image_limit(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, found {text}")
    return int(match[1]), int(match[2])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder written by training")
    add("--port", type=int, default=8000, help="0: any free one, which is printed")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every network of this machine")
    add("--api_key", help="what clients must send; the environment variable DEXVLA_API_KEY does not show in `ps`")
    add("--prompt", help="the instruction for clients that send none")
    add("--unnorm_key", help="the robot of clients that name none, for a checkpoint trained on several")
    add("--ema", action="store_true", help="act with the averaged weights of --using_ema True")
    add("--bits", type=int, default=16, choices=(4, 8, 16), help="quantise the weights")
    add("--device", help="such as cuda:1 or cpu (default: the accelerator)")
    add("--no_reasoning", action="store_true", help="act without writing the reasoning first")
    add("--reasoning_every", type=int, default=1, help="write the reasoning at every N-th query of a connection only")
    add("--max_new_tokens", type=int, default=256, help="of the reasoning")
    add("--max_batch", type=int, default=8, help="queries that are answered at once")
    add("--max_waiting", type=int, default=64, help="queries that may wait; more get 503")
    add("--timeout", type=float, default=10.0, help="seconds for a request; then 504")
    add("--max_body_mb", type=int, default=64, help="size of a message, 2^20 bytes")
    add("--max_image", type=image_limit, default="1920x1080", help="pixels of a camera")
    args = parser.parse_args()
    for name in ("reasoning_every", "max_new_tokens", "max_batch", "max_waiting", "timeout", "max_body_mb"):
        if not getattr(args, name) > 0:  # nor NaN
            raise UserError(f"--{name}: expected more than 0, found {getattr(args, name)}")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt: expected the task in words, found nothing")
    args.api_key = args.api_key if args.api_key is not None else os.environ.get("DEXVLA_API_KEY")
    if args.api_key is not None:
        args.api_key = args.api_key.strip()  # as it arrives in a header
        if not args.api_key:
            raise UserError("--api_key: expected a key, found nothing")
    return args


async def serve(args: argparse.Namespace, listener: socket.socket):
    """Loads the policy and serves it until a signal."""
    policy = Qwen2VLAPolicy.from_pretrained(args.checkpoint, args.device, ema=args.ema, bits=args.bits)
    if args.unnorm_key is not None and args.unnorm_key not in policy.unnorm_keys:
        raise UserError(f"--unnorm_key: expected one of {', '.join(policy.unnorm_keys)}, found {args.unnorm_key}")
    server = PolicyServer(
        policy,
        reader=RequestReader(policy, args.max_image, args.prompt, args.unnorm_key),
        batcher=Batcher(
            policy, max_batch=args.max_batch, max_waiting=args.max_waiting, max_new_tokens=args.max_new_tokens
        ),
        limits=Limits(args.timeout, args.max_body_mb * 2**20),
        api_key=args.api_key,
        use_reasoning=not args.no_reasoning,
        reasoning_every=args.reasoning_every,
    )
    stop = asyncio.Event()

    def listening():
        host, port = listener.getsockname()[:2]
        url = f"ws://{f'[{host}]' if ':' in host else host}:{port}"
        shapes = f"state {policy.state_dim}, chunk {policy.chunk_size} x {policy.action_dim}"
        print(f"serving {args.checkpoint} on {url} (cameras {', '.join(policy.camera_names)}, {shapes})", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    def on_signal():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)  # a second one ends it at once
        stop.set()

    await server.run(listener, stop, listening)
    print(f"stopped; {server.batcher.answered} queries answered", flush=True)


def main():
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Taken before minutes are spent on loading; it listens, and clients stop waiting for it, only afterwards
    listener = bind(args.host, args.port)
    if args.api_key is None and not is_loopback(args.host):
        logging.warning("whoever reaches %s can use this server; --api_key lets in only who knows the key", args.host)
    asyncio.run(serve(args, listener))


if __name__ == "__main__":
    run_command(main)
