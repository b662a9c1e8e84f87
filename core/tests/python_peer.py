"""A PyTorch process as the last rank of one of Echelon's process groups: python_peer.py HOST PORT NAME RANK SIZE

Joins by the steps that core/src/process_group/meeting.rs lists, runs what core/tests/python_peer.rs runs, checks what it
gets, and prints "ok".
"""
import datetime
import sys

import torch
from torch.distributed import (
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    PrefixStore,
    ProcessGroupGloo,
    ReduceOp,
    TCPStore,
)

host, port, name, rank, size = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
timeout = datetime.timedelta(seconds=30)
store = TCPStore(host, port, is_master=False, timeout=timeout)
generation = store.add(f"{name}/generation", 0)
assert store.add(f"{name}/{generation}/joined/{rank}", 1) == 1, "another worker sits on this rank"
store.add(f"{name}/{generation}/present", 1)
options = ProcessGroupGloo._Options()
options._devices = [ProcessGroupGloo.create_device(hostname=host)]
options._timeout = timeout
group = ProcessGroupGloo(PrefixStore(f"{name}/{generation}", store), rank, size, options)


def equal(found, expected, what):
    assert torch.equal(found, expected), f"{what}: {found} instead of {expected}"


ranks = range(size)
for dtype in (torch.float32, torch.bfloat16):
    mine = torch.tensor([rank + 0.5, -rank, 3], dtype=dtype)

    total = mine.clone()
    sum_of_all = AllreduceOptions()
    sum_of_all.reduceOp = ReduceOp.SUM
    group.allreduce([total], sum_of_all).wait()
    equal(total, torch.tensor([sum(r + 0.5 for r in ranks), -sum(ranks), 3 * size], dtype=dtype), "all-reduce")

    gathered = torch.empty(3 * size, dtype=dtype)
    group._allgather_base(gathered, mine).wait()
    equal(gathered, torch.tensor([v for r in ranks for v in (r + 0.5, -r, 3)], dtype=dtype), "all-gather")

    exchanged = torch.empty(size, dtype=dtype)
    parts = torch.tensor([10.0 * rank + to for to in ranks], dtype=dtype)
    group.alltoall_base(exchanged, parts, [], [], AllToAllOptions()).wait()
    equal(exchanged, torch.tensor([10.0 * r + rank for r in ranks], dtype=dtype), "all-to-all")

    for root in (0, rank):
        sent = mine.clone()
        from_root = BroadcastOptions()
        from_root.rootRank = root
        group.broadcast([sent], from_root).wait()
        equal(sent, torch.tensor([root + 0.5, -root, 3], dtype=dtype), f"broadcast from {root}")

    group.send([mine], 0, 7).wait()
    received = torch.empty(3, dtype=dtype)
    group.recv([received], 0, 8).wait()
    equal(received, torch.tensor([0.5, 0, 3], dtype=dtype), "a message from rank 0")

group.barrier(BarrierOptions()).wait()
print("ok")
