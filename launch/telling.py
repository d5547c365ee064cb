"""The options of ``everstep run`` that tell others: hooks and metrics."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """A group of its own."""
    group = parser.add_argument_group("telling others")
    group.add_argument(
        "--hook",
        metavar="[EVENT,…=]COMMAND|URL",
        action="append",
        help="run a command, or post to a webhook, on events (failure, preempted, stopped, completed, gave-up; all if none is "
        "named), with what happened as JSON; may be given several times",
    )
    group.add_argument("--hook-timeout", metavar="TIME", help="that a hook may take each time (default: 10s)")
    group.add_argument(
        "--metrics-port", metavar="N", help="serve Prometheus metrics there (0: any port that is free)"
    )
    group.add_argument("--metrics-address", metavar="ADDRESS", help="where that listens (default: 127.0.0.1)")
    group.add_argument(
        "--metrics-file",
        metavar="FILE.prom",
        help="keep a file of them, for node_exporter's textfile collector",
    )
    group.add_argument(
        "--otel",
        action=argparse.BooleanOptionalAction,
        help="send the run and its attempts as OpenTelemetry spans, to OTEL_EXPORTER_OTLP_ENDPOINT",
    )
