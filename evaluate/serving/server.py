"""The web application around a policy: HTTP and WebSocket in, answers and refusals out."""

import asyncio
import hmac
import logging
import socket
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from aiohttp import WSMessage, WSMsgType, web

from data_utils import UserError
from evaluate.wire import RequestError, pack, to_json, unpack, unpack_json
from qwen2_vla import Qwen2VLAPolicy

from .batching import Batcher
from .queries import Query, RequestReader

MSGPACK_TYPES = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
OPEN_PATHS = ("/healthz", "/health")  # a load balancer has no key
MAX_SESSIONS = 1000
BACKLOG = 128
GOODBYE = 2.0  # s that a client has to answer the closing of its connection

logger = logging.getLogger("evaluate.serve")


@dataclass
class Limits:
    """timeout: s for a request, waiting included. max_body: bytes of a message."""

    timeout: float = 10.0
    max_body: int = 64 * 2**20


class Reasonings:
    """The last reasoning of every session, reused for `every` - 1 further queries with the same instruction."""

    def __init__(self, every: int = 1):
        self.every = every
        self._kept: OrderedDict[str, tuple[str, str, int]] = OrderedDict()  # session -> instruction, text, uses left

    def recall(self, session: str | None, instruction: str) -> str | None:
        known, text, left = self._kept.get(session, ("", "", 0))
        if not left or known != instruction:
            return None
        self._kept[session] = (known, text, left - 1)
        return text

    def remember(self, session: str | None, instruction: str, text: str):
        if session is not None and self.every > 1:
            self._kept[session] = (instruction, text, self.every - 1)
            self._kept.move_to_end(session)
            if len(self._kept) > MAX_SESSIONS:
                self._kept.popitem(last=False)


class PolicyServer:
    """The web application around a policy; `run` serves it, tests may mount `application()` themselves."""

    def __init__(
        self,
        policy: Qwen2VLAPolicy,
        *,
        reader: RequestReader | None = None,
        batcher: Batcher | None = None,
        limits: Limits | None = None,
        api_key: str | None = None,
        use_reasoning: bool = True,
        reasoning_every: int = 1,
    ):
        self.policy = policy
        self.reader = reader or RequestReader(policy)
        self.batcher = batcher or Batcher(policy)
        self.limits = limits or Limits()
        self.api_key = api_key
        self.use_reasoning = use_reasoning
        self.reasonings = Reasonings(reasoning_every)
        self.busy = 0  # requests that wait for an answer, or are being sent one
        self._sockets: set[web.WebSocketResponse] = set()

    def application(self) -> web.Application:
        application = web.Application(middlewares=[self._refusals_as_json], client_max_size=self.limits.max_body)
        application.router.add_get("/", self._websocket, allow_head=False)
        application.router.add_post("/infer", self._infer)
        application.router.add_get("/metadata", self._metadata)
        for path in OPEN_PATHS:
            application.router.add_get(path, self._health)
        return application

    async def run(self, listener: socket.socket, stop: asyncio.Event, listening: Callable[[], None]):
        """Warms the model up, serves on a bound socket until `stop` is set, then closes gracefully.

        `listening` is called once clients are let in.

        Raises:
            UserError: when the policy cannot act, or another process listens at the address by then.
        """
        worker = asyncio.create_task(self.batcher.run())
        worker.add_done_callback(lambda task: stop.set())  # it never ends by itself
        try:
            await self.batcher.warm_up(self._example())
        except RequestError as error:
            raise UserError(f"--checkpoint: expected a policy that acts; {error}") from error
        try:
            listener.listen(BACKLOG)
        except OSError as error:
            raise UserError(f"--port: expected a free port, found {listener.getsockname()[1]} in use") from error
        # A handler whose client has gone is cancelled, and its query leaves the queue
        runner = web.AppRunner(self.application(), handler_cancellation=True, access_log=None, shutdown_timeout=GOODBYE)
        await runner.setup()
        site = web.SockSite(runner, listener)
        await site.start()
        listening()
        await stop.wait()
        await site.stop()
        await self.close()
        await runner.cleanup()
        if worker.done():
            worker.result()  # raises what ended it
        worker.cancel()

    async def close(self):
        """Answers what is queued, within the timeout, refuses what comes, and closes the connections (1001)."""
        self.batcher.close()
        deadline = time.monotonic() + self.limits.timeout
        while self.busy and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        goodbyes = [socket.close(code=1001, message=b"the server is shutting down") for socket in self._sockets]
        await asyncio.gather(*goodbyes, return_exceptions=True)

    async def answer(self, message: dict, session: str | None = None) -> dict:
        """A checked message -> `actions` (T, A) float32, `reasoning` and timings in ms.

        Raises:
            RequestError: see `RequestReader.read` and `Batcher.predict`.
        """
        began = time.perf_counter()
        query = self.reader.read(message)
        session = session or query.session and f"named {query.session}"
        query.reasoning = self.reasonings.recall(session, query.instruction) if self.use_reasoning else ""
        answer = await self.batcher.predict(query, self.limits.timeout)
        if query.reasoning is None:
            self.reasonings.remember(session, query.instruction, answer.reasoning)
        computed = 1000 * answer.computed
        return {
            "actions": answer.actions,
            "reasoning": answer.reasoning,
            "server_timing": {
                "queue_ms": 1000 * answer.waited,
                "infer_ms": computed,
                "total_ms": 1000 * (time.perf_counter() - began),
                "batch_size": answer.batch_size,
            },
            "policy_timing": {"infer_ms": computed},
        }

    def _example(self) -> Query:
        """An observation of zeros, for the warm-up."""
        policy, (width, height) = self.policy, self.policy.metadata()["image_size"]
        frames = (policy.history,) if policy.history > 1 else ()
        image = np.zeros((*frames, height, width, 3), np.uint8)
        observation = {"images": dict.fromkeys(policy.camera_names, image), "qpos": np.zeros(policy.state_dim)}
        robot = policy.unnorm_keys[0] if policy.unnorm_keys else None
        return Query(observation, "Warm up.", robot, reasoning=None if self.use_reasoning else "")

    @web.middleware
    async def _refusals_as_json(self, request: web.Request, handler) -> web.StreamResponse:
        headers = {}
        try:
            if request.path not in OPEN_PATHS:
                self._check_key(request)
            return await handler(request)
        except RequestError as error:
            status, message = error.status, str(error)
            headers = {401: {"WWW-Authenticate": "Api-Key"}, 503: {"Retry-After": "1"}}.get(status, {})
        except web.HTTPException as error:  # aiohttp's own: 404, 405, 413
            status, message = error.status, error.reason
            if status == 404:
                message = f"path: expected /infer, /metadata, /healthz or a WebSocket at /, found {request.path:.80}"
            elif status == 405:
                headers = {"Allow": error.headers["Allow"]}
                message = f"method: expected {headers['Allow']}, found {request.method}"
            elif status == 413:
                message = f"body: expected at most {self.limits.max_body} bytes (--max_body_mb)"
        except (web.RequestPayloadError, ConnectionError) as error:
            status, message = 400, f"body: could not be read ({error})"
        except Exception:  # a defect of ours: told in the log, and the server goes on
            logger.exception("%s %s failed", request.method, request.path)
            status, message = 500, "the server failed; its log says where"
        return web.json_response({"error": message}, status=status, headers=headers)

    def _check_key(self, request: web.Request):
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        # compared as bytes, since compare_digest takes only ASCII text, and in constant time
        given = key.strip().encode("utf-8", "surrogateescape")
        if self.api_key is None or (
            scheme.lower() in ("api-key", "bearer") and hmac.compare_digest(given, self.api_key.encode())
        ):
            return
        found = "another" if key else "none"
        raise RequestError(401, f"Authorization: expected 'Api-Key <the server's key>', found {found}")

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metadata(self, request: web.Request) -> web.Response:
        return web.json_response(self.policy.metadata())

    async def _infer(self, request: web.Request) -> web.Response:
        kind = request.content_type
        if kind != "application/json" and kind not in MSGPACK_TYPES:
            raise RequestError(415, f"Content-Type: expected application/json or application/msgpack, found {kind}")
        try:
            async with asyncio.timeout(self.limits.timeout):
                body = await request.read()
        except TimeoutError:
            raise RequestError(408, f"body: did not arrive within {self.limits.timeout:g} s (--timeout)") from None
        self.busy += 1
        try:
            if kind == "application/json":
                reply = await self.answer(unpack_json(body))
                return web.json_response(to_json(reply))
            reply = await self.answer(unpack(body))
            return web.Response(body=pack(reply), content_type="application/msgpack")
        finally:
            self.busy -= 1

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        # No heartbeat: robots that answer pings only between their own messages would be cut off
        connection = web.WebSocketResponse(
            max_msg_size=self.limits.max_body, compress=False, timeout=GOODBYE, heartbeat=None
        )
        if not connection.can_prepare(request):
            raise RequestError(426, "Upgrade: expected a WebSocket here; over HTTP, POST to /infer")
        await connection.prepare(request)
        self._sockets.add(connection)
        # Reading goes on while the model computes: pings are answered, and a client that has gone is noticed
        inbox = asyncio.Queue(maxsize=8)
        answering = asyncio.create_task(self._answer_messages(connection, inbox))
        try:
            await connection.send_bytes(pack(self.policy.metadata()))
            async for message in connection:
                await inbox.put(message)
        except ConnectionError:
            logger.info("a client has gone")
        finally:
            answering.cancel()
            self._sockets.discard(connection)
        return connection

    async def _answer_messages(self, connection: web.WebSocketResponse, inbox: asyncio.Queue):
        session = uuid.uuid4().hex
        while True:
            message = await inbox.get()
            self.busy += 1
            try:
                reply = await self._reply(message, session)
                await (connection.send_str(reply) if isinstance(reply, str) else connection.send_bytes(reply))
            except ConnectionError:  # the reading side notices, too
                return
            finally:
                self.busy -= 1

    async def _reply(self, message: WSMessage, session: str) -> bytes | str:
        """The answer in msgpack, or as text what is wrong: openpi's clients raise it."""
        try:
            if message.type != WSMsgType.BINARY:
                raise RequestError(400, "body: expected a binary message (msgpack), found text")
            return pack(await self.answer(unpack(message.data), session))
        except RequestError as error:
            return f"{error.status} {error}"
        except Exception:  # a defect of ours, as above
            logger.exception("a WebSocket message failed")
            return "500 the server failed; its log says where"
