"""Connections of the service, at the moments a client seldom hits."""

import asyncio
import socket
import struct

import uvicorn
from serving import LIMITS, opened

from tools.serve import app
from tools.serve.connections import Connection, Connections
from tools.serve.nursery import Nursery
from tools.serve.server import Server
from tools.serve.service import Batching, Service


async def no_answer(scope: dict, receive: object, send: object) -> None:
    """An application that is never asked."""


def test_a_reset_that_comes_just_before_the_close_is_no_error():
    """The client is gone, and the event loop has not yet been told."""
    reset = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST
    told: list[dict] = []

    async def close_after_reset() -> set:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        connections = Connections(4)
        config = uvicorn.Config("tests.tools.test_serve_connections:no_answer", log_config=None)
        state = uvicorn.server.ServerState()
        made: list[Connection] = []

        def connection() -> Connection:
            made.append(
                Connection(connections, config=config, server_state=state, app_state={}, _loop=loop)
            )
            return made[-1]

        server = await loop.create_server(connection, "127.0.0.1", 0)
        async with server:
            with socket.create_connection(server.sockets[0].getsockname()) as client:
                while not connections.open:
                    await asyncio.sleep(0.01)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            made[0].transport.close()  # no turn of the loop since the reset
            while connections.open:
                await asyncio.sleep(0.01)
        return connections.open | connections.idle.keys() | connections.parting.keys()

    assert asyncio.run(asyncio.wait_for(close_after_reset(), 30)) == set()
    assert told == []


def test_who_came_just_before_the_end_is_answered(checkpoint):
    """The system has taken the connections, and the event loop has not yet been told."""
    service = Service(opened(checkpoint), "pets", Nursery(), limits=LIMITS, batching=Batching())
    server = Server(app.build_app(service), service)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=16)

    async def end() -> list[bytes]:
        await server.startup([listener])
        clients = [socket.create_connection(listener.getsockname(), 5) for _ in range(8)]
        for client in clients:
            client.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        await server.shutdown([listener])
        answers = []
        for client in clients:
            with client:
                answers.append(client.recv(12))
        return answers

    assert asyncio.run(asyncio.wait_for(end(), 30)) == [b"HTTP/1.1 200"] * 8
    assert server.ended_well
