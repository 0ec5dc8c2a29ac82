"""Limits of the system that a test lowers for a while."""

import os
import resource
from contextlib import contextmanager


@contextmanager
def open_files(more=0):
    """Let this process open no more than that many files at once besides those that are open."""
    with open(os.devnull) as file:
        lowest = file.fileno()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
