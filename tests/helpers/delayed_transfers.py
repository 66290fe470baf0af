"""A process group for CPU tensors with the worst-case buffer semantics of NCCL and HCCL.

On devices a transfer runs on a separate stream, and ``wait()`` orders streams. Between call and wait, a send may read
its buffer late and a receive may write its buffer early; code that is right under these rules is right on devices.

* a send reads its buffer when it is awaited, or when its peer cannot continue without it while this rank waits for
  something else, never before;
* a receive overwrites its buffer with NaN when it is posted, and with the message when it is awaited;
* operations of one group complete in the order in which they were posted; groups are independent of each other;
* kernels run when they are called: the compute stream is ahead of all transfers that have not been awaited.

So a buffer that is written while it is sent, or read while it is received into, gives other results than with gloo. The
group rejects what HCCL rejects: reductions of float64, and two messages to or from one rank in a batch.

``dist.init_process_group("delayed", ...)`` after ``register()``; ``finish()`` at the end, on every rank. Messages go
through the store, so they should be small.
"""

import time
from contextlib import suppress

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds for one wait


class _Send:
    def __init__(self, store, key, tensor):
        self.store, self.key, self.tensor, self.done = store, key, tensor, False

    def run(self):
        if not self.done:
            self.done = True
            _outgoing.remove(self)
            self.store.set(self.key, self.tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    def run_if_demanded(self):
        if self.store.check([f"{self.key}?"]):
            self.run()


class _Receive:
    def __init__(self, store, key, tensor):
        self.store, self.key, self.tensor = store, key, tensor
        _poison(tensor)

    def run(self):
        self.store.set(f"{self.key}?", b"1")
        _wait_until(lambda: self.store.check([self.key]))
        data = bytearray(self.store.get(self.key))
        self.store.delete_key(self.key)
        if data:
            message = torch.frombuffer(data, dtype=torch.uint8).view(self.tensor.dtype)
            self.tensor.copy_(message.view(self.tensor.shape))


_outgoing = []  # sends of this process that have not read their buffer, oldest first


def _wait_until(is_true):
    """Wait, and meanwhile send what a peer needs to continue."""
    deadline = time.monotonic() + TIMEOUT
    while not is_true():
        for send in list(_outgoing):
            send.run_if_demanded()
        if time.monotonic() > deadline:
            raise RuntimeError("a transfer has no peer")
        time.sleep(0.0002)


def _poison(tensor):
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


class Transfer(dist.Work):
    """The handle of one operation: its messages, and the function that is called after they have arrived."""

    def __init__(self, group, sends=(), receives=(), then=lambda: None):
        super().__init__()
        self._group, self._parts, self._then, self._done = group, [*sends, *receives], then, False
        _outgoing.extend(sends)
        group.posted.append(self)

    def wait(self, timeout=None):
        while not self._done:
            self._group.posted[0].run()
        return True

    def run(self):
        self._group.posted.remove(self)
        for part in self._parts:
            part.run()
        self._then()
        self._done = True

    def is_completed(self):
        return self._done


class DelayedGroup(dist.ProcessGroup):
    """The functions that torch.distributed calls; every collective consists of messages."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self._store, self._rank, self._size = store, rank, size
        self._sent, self._received, self.posted = [0] * size, [0] * size, []

    def getBackendName(self):
        return "delayed"

    def _send(self, tensor, peer):
        self._sent[peer] += 1
        return _Send(self._store, f"{self._rank}>{peer}/{self._sent[peer]}", tensor)

    def _receive(self, tensor, peer):
        self._received[peer] += 1
        return _Receive(self._store, f"{peer}>{self._rank}/{self._received[peer]}", tensor)

    def _exchange(self, leaving, arriving, then=lambda: None):
        """Send ``leaving[rank]`` to each rank and receive ``arriving[rank]``; also delayed for a rank's own message."""
        return Transfer(
            self,
            [self._send(tensor, peer) for peer, tensor in enumerate(leaving)],
            [self._receive(tensor, peer) for peer, tensor in enumerate(arriving)],
            then,
        )

    def send(self, tensors, peer, tag=0):
        return Transfer(self, sends=[self._send(tensors[0], peer)])

    def recv(self, tensors, peer, tag=0):
        return Transfer(self, receives=[self._receive(tensors[0], peer)])

    def alltoall_base(self, output, input, output_sizes, input_sizes, opts=None):
        def pieces(tensor, sizes):
            return tensor.split(list(sizes) or [tensor.shape[0] // self._size] * self._size)

        return self._exchange(pieces(input, input_sizes), pieces(output, output_sizes))

    def _allgather_base(self, output, input, opts=None):
        return self._exchange([input] * self._size, output.view(-1).tensor_split(self._size))

    all_to_all_single, all_gather_single = alltoall_base, _allgather_base  # torch 2.13's names

    def allgather(self, outputs, inputs, opts=None):
        return self._exchange([inputs[0]] * self._size, outputs[0])

    def allreduce(self, tensors, opts=None):
        tensor = tensors[0]
        if tensor.dtype == torch.float64:
            raise RuntimeError("HCCL allreduce: Unsupported data type at::kDouble")
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        wanted = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        operator = (
            torch.amax if wanted == dist.ReduceOp.MAX else torch.amin if wanted == dist.ReduceOp.MIN else torch.sum
        )
        return self._exchange([tensor] * self._size, parts, lambda: tensor.copy_(operator(torch.stack(parts), 0)))

    def broadcast(self, tensors, opts):
        if self._rank == opts.rootRank:
            others = [peer for peer in range(self._size) if peer != self._rank]
            return Transfer(self, sends=[self._send(tensors[0], peer) for peer in others])
        return Transfer(self, receives=[self._receive(tensors[0], opts.rootRank)])

    def barrier(self, opts=None):
        return self.allreduce([torch.zeros(1)])


def _refuse_duplicates(original):
    def batch_isend_irecv(operations):
        seen = {}
        for operation in operations:
            pair = (operation.op.__name__, operation.peer)
            if seen.setdefault(pair, operation) is not operation:
                raise RuntimeError(f"HCCL: two tasks {pair} in one batch")
        return original(operations)

    return batch_isend_irecv


def register():
    """Register the backend "delayed" with torch.distributed in this process; a second call does nothing."""
    if "DELAYED" not in dist.Backend._plugins:
        dist.Backend.register_backend("delayed", DelayedGroup, devices=["cpu"])
        dist.batch_isend_irecv = _refuse_duplicates(dist.batch_isend_irecv)


def finish(store, world_size, number=0):
    """Serve the peers until all of them have called this; then all sends that were not awaited are done."""
    key = f"finished/{number}"
    count = [store.add(key, 1)]

    def everyone():
        with suppress(RuntimeError):
            count[0] = store.add(key, 0)
        return count[0] >= world_size

    _wait_until(everyone)
    for send in list(_outgoing):
        send.run()
