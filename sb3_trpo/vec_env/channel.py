"""A connection to a worker process whose reads and writes fail when the worker exits or times out."""

import math
import os
import pickle
import select
import selectors
import socket
import struct
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

#: Largest length that fits the short header of a message of :mod:`multiprocessing`.
SHORT = 0x7FFFFFFF
#: Single reads and writes need not block; otherwise (Windows) a read waits for the whole message.
CAN_POLL = hasattr(socket, "MSG_DONTWAIT")

SecondsLeft = Callable[[], float | None]


class NoAnswerError(Exception):
    """The worker did not answer in time."""


class Channel:
    """
    Send and receive messages of :mod:`multiprocessing` in parts: a worker may stop or die in the middle of one.

    ``Connection.recv`` would wait for the rest of a message forever: a stopped worker sends none, and a killed one causes no
    end of file, since with the start method "fork" other workers inherited its side of the connection.

    :param connection: the connection, a socket as ``Pipe()`` makes it
    :param sentinel: the worker's ``Process.sentinel``
    """

    def __init__(self, connection: Connection, sentinel: int) -> None:
        self._connection, self._sentinel = connection, sentinel
        self._socket = socket.socket(fileno=os.dup(connection.fileno())) if CAN_POLL else None
        if self._socket is not None:
            self._socket.setblocking(True)  # whatever socket.setdefaulttimeout says
            # Registered once: `multiprocessing.connection.wait` does it at every call, for longer than a message takes.
            self._readable = select.poll()
            self._readable.register(self._socket, select.POLLIN)
            self._readable.register(sentinel, select.POLLIN)

    def send(self, message: Any, seconds_left: SecondsLeft) -> None:
        """
        Send a message.

        :param message: any object that can be pickled
        :param seconds_left: time for the worker to receive it; None for no limit
        :raises NoAnswerError: the worker did not answer in time
        :raises EOFError: the worker exited
        :raises ConnectionError: the worker closed the connection
        """
        if self._socket is None:
            self._connection.send(message)
            return
        body = bytes(ForkingPickler.dumps(message))
        header = struct.pack("!i", len(body)) if len(body) <= SHORT else struct.pack("!iQ", -1, len(body))
        left = memoryview(header + body)
        while left:
            try:
                left = left[self._socket.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                self._wait_to_write(seconds_left)

    def recv(self, seconds_left: SecondsLeft) -> Any:
        """
        Receive a message.

        :param seconds_left: time for the whole message to arrive; None for no limit
        :return: the object that was sent
        :raises NoAnswerError: the worker did not answer in time
        :raises EOFError: the worker exited
        :raises ConnectionError: the worker closed the connection
        """
        if self._socket is None:
            ready = wait([self._connection, self._sentinel], seconds_left())
            self._check_readable(bool(ready), self._connection in ready)
            return self._connection.recv()
        (size,) = struct.unpack("!i", self._read(self._socket, 4, seconds_left))
        if size == -1:
            (size,) = struct.unpack("!Q", self._read(self._socket, 8, seconds_left))
        return pickle.loads(self._read(self._socket, size, seconds_left))

    def _read(self, connection: socket.socket, size: int, seconds_left: SecondsLeft) -> bytearray:
        contents = bytearray(size)
        left = memoryview(contents)
        while left:
            try:
                received = connection.recv_into(left, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait_to_read(connection, seconds_left)
                continue
            if received == 0:
                raise EOFError("the worker has closed the connection")
            left = left[received:]
        return contents

    def _wait_to_read(self, connection: socket.socket, seconds_left: SecondsLeft) -> None:
        left = seconds_left()
        ready = [descriptor for descriptor, _ in self._readable.poll(None if left is None else math.ceil(1e3 * left))]
        self._check_readable(bool(ready), connection.fileno() in ready)

    def _check_readable(self, is_any_ready: bool, is_connection_ready: bool) -> None:
        if not is_any_ready:
            raise NoAnswerError
        if not is_connection_ready and not self._connection.poll():
            raise EOFError("the worker has ended")

    def _wait_to_write(self, seconds_left: SecondsLeft) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_WRITE)
            selector.register(self._sentinel, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(seconds_left())]
        if not ready:
            raise NoAnswerError
        if self._connection not in ready:
            raise EOFError("the worker has ended")

    def close(self) -> None:
        """Close this handle of the connection; ``Connection.close`` closes the other one."""
        if self._socket is not None:
            self._socket.close()
