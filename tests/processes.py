"""`rd-torch` in processes that have imported everything: what takes time in them, and is killed, is work."""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import torch

from rd_torch.cli import main

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["rd_torch.model", "rd_torch.embedding", "h5py", "pyarrow.parquet"])


def begun(arguments, said=os.devnull, largest_file=None):
    """A process that runs the command, on as many threads as this one.

    Args:
        arguments: of `rd-torch`.
        said: the file that gets what it prints, errors too.
        largest_file: bytes beyond which a file cannot grow, as on a full disk.
    """
    listed = [str(each) for each in arguments]
    process = FORKED.Process(target=_run, args=(listed, str(said), largest_file, torch.get_num_threads()))
    process.start()
    return process


def _run(arguments, said, largest_file, threads):
    with Path(said).open("w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    torch.set_num_threads(threads)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2)
    main(arguments)
