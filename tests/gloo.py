"""Runs a function on several ranks: forked processes of this one, joined by gloo, which takes no second."""
import multiprocessing

import torch

FORK = multiprocessing.get_context("fork")


def rank_of(rank, world, file, work, pipe):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=world, init_method=f"file://{file}")
    pipe.send((rank, work(rank, world)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def on_ranks(folder, world, work):
    """[work(rank, world) of every rank]; `folder` is an empty one, for the file by which they meet."""
    mine, other = FORK.Pipe()
    processes = [FORK.Process(target=rank_of, args=(rank, world, folder / f"meet{world}", work, other))
                 for rank in range(world)]
    for process in processes:
        process.start()
    answers = dict(mine.recv() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [answers[rank] for rank in range(world)]
