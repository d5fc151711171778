"""Imported by the process that decoders are forked from: it loads once what each of them needs.

It ends with the service, also with one that is killed, and its children with it. Whoever stops a
service may send SIGTERM to all its processes: this one then goes on until the service has ended, as
its children are still decoding.
"""

import signal

import tools.serve.decoder  # noqa: F401
from pipeline.workers import die_with_parent

die_with_parent()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
