"""An S3 server on loopback (moto) behind a proxy that adds a delay to every request, each in a process of its own."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "bench"
_SERVER = (
    "from moto.server import ThreadedMotoServer; import time\n"
    "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False); server.start()\n"
    "print(server.get_host_and_port()[1], flush=True); time.sleep(1 << 20)"
)
_PIECE_BYTES = 1 << 16


@contextmanager
def running(code: list[str]) -> Iterator[int]:
    """A server that prints its port first; ended with the block."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", *code], stdout=subprocess.PIPE, text=True)  # noqa: S603 - ours
    try:
        assert process.stdout is not None  # noqa: S101 - a pipe
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """All files of ``folder`` as objects of ``s3://bench``; yields the server's port."""
    import boto3

    with running(["-c", _SERVER]) as port:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="bench",
            aws_secret_access_key="bench",  # noqa: S106 - moto takes any
        )
        client.create_bucket(Bucket=BUCKET)
        for file in folder.rglob("*"):
            if file.is_file():
                client.put_object(Bucket=BUCKET, Key=file.relative_to(folder).as_posix(), Body=file.read_bytes())
        yield port


@contextmanager
def delayed(port: int, delay_ms: float) -> Iterator[int]:
    """A proxy before ``port`` that holds every request back for ``delay_ms``, many at a time; yields the proxy's port."""
    with running(["-m", "ftengine.bench.slow_s3", str(port), str(delay_ms)]) as own:
        yield own


def environment_for(port: int) -> dict[str, str]:
    """The environment that makes a process read ``s3://`` through ``port``."""
    return os.environ | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


async def proxy(target: int, delay_s: float) -> None:
    """Listen on a free port, print it, and forward connections until killed.

    A client writes a request, then waits for the answer: whatever comes from it in one piece is held back once.
    """

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait_s: float) -> None:
        try:
            while piece := await reader.read(_PIECE_BYTES):
                if wait_s:
                    await asyncio.sleep(wait_s)
                writer.write(piece)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(forward(reader, to_server, delay_s), forward(from_server, writer, 0.0))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(proxy(int(sys.argv[1]), float(sys.argv[2]) / 1e3))
