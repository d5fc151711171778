"""Connections of the service, at the moments a client seldom hits."""

import asyncio
import socket
import struct

import uvicorn

from tools.serve.connections import Connection, Connections


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
