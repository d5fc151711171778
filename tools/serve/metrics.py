"""What ``/metrics`` says, in Prometheus' format."""

import logging

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tools.common import labels
from tools.serve.batcher import Answer
from tools.serve.drift import Drift, DriftMonitor

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LABELS = (0, 1, 2, 3, 5, 10, 20, 50)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
TENTHS = tuple(n / 10 for n in range(1, 11))
CHECKS = 10  # for drift, in the time of a window

logger = logging.getLogger("serve")


class Metrics:
    """Counters and gauges of one service, and the monitor of drift."""

    def __init__(
        self,
        class_names: list[str],
        monitor: DriftMonitor | None,
        thresholds: np.ndarray | None = None,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self.class_names, self.monitor = class_names, monitor
        self.thresholds = thresholds  # (C,) of a multi-label model
        self.requests = Counter(
            "serve_requests", "Requests answered", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "serve_request_seconds",
            "From the request to the end of its answer",
            ("path",),
            buckets=SECONDS,
            registry=registry,
        )
        self.refused = Counter(
            "serve_images_refused", "Images without an answer", ("status",), registry=registry
        )
        self.pending = Gauge("serve_pending", "Images in hand", registry=registry)
        self.waiting = Gauge(
            "serve_waiting_images", "Images that wait to be decoded", registry=registry
        )
        self.bodies = Gauge("serve_body_bytes", "Bytes of bodies in hand", registry=registry)
        self.connections = Gauge("serve_connections", "Open connections", registry=registry)
        self.refused_connections = Counter(
            "serve_connections_refused", "Connections too many", ("how",), registry=registry
        )
        self.lost_decoders = Counter(
            "serve_decoders_lost", "Decoding processes lost", ("reason",), registry=registry
        )
        self.batch = Histogram(
            "serve_batch_images", "Images in a batch", buckets=IMAGES, registry=registry
        )
        self.model_seconds = Histogram(
            "serve_model_seconds",
            "The model's time for a batch",
            buckets=SECONDS,
            registry=registry,
        )
        self.threads = Gauge("serve_model_threads", "The model's threads", registry=registry)
        self._count_answers(registry)
        self._since_check = 0
        self._drifting = {"classes": False, "confidence": False}
        if monitor:
            self._measure_drift(registry)

    def _count_answers(self, registry: CollectorRegistry) -> None:
        """Make the metrics of answers; of a multi-label model they go by label."""
        several = self.thresholds is not None
        self.answers = Counter(
            "serve_answers",
            "Answers with each label" if several else "Answers by likeliest class",
            ("class",),
            registry=registry,
        )
        if several:
            self.labels = Histogram(
                "serve_labels", "Labels of an answer", buckets=LABELS, registry=registry
            )
        self.confidence = Histogram(
            "serve_confidence",
            "Probability of the likeliest class",
            buckets=TENTHS,
            registry=registry,
        )

    def _measure_drift(self, registry: CollectorRegistry) -> None:
        """Make the metrics of drift."""
        self.index = Gauge(
            "serve_drift_class_psi", "Stability index of the class mix", registry=registry
        )
        self.distance = Gauge(
            "serve_drift_confidence_ks", "Distance of the confidences", registry=registry
        )
        if self.thresholds is not None:
            self.rates = Gauge(
                "serve_drift_label_rate",
                "Share of the answers with a label, of the reference and of the window",
                ("class", "of"),
                registry=registry,
            )
        self.warned = Gauge(
            "serve_drift_warning", "1 beyond the limit", ("kind",), registry=registry
        )
        for kind in self._drifting:
            self.warned.labels(kind).set(0)

    def count_lost_decoder(self, reason: str) -> None:
        """Take note of a decoding process that was killed or crashed."""
        self.lost_decoders.labels(reason).inc()

    def count_batch(self, size: int, seconds: float) -> None:
        """Take note of a batch."""
        self.batch.observe(size)
        self.model_seconds.observe(seconds)

    def count_answer(self, answer: Answer) -> None:
        """Take note of an answer; warns in the log when drift begins and when it ends."""
        shares = answer.probabilities
        confidence = float(shares.max())
        if self.thresholds is None:
            classes = [int(shares.argmax())]
        else:
            classes = labels.found(shares, self.thresholds).tolist()
            self.labels.observe(len(classes))
        for index in classes:
            self.answers.labels(self.class_names[index]).inc()
        self.confidence.observe(confidence)
        if self.monitor is None:
            return
        self.monitor.add(classes, confidence)
        self._since_check += 1
        if self._since_check * CHECKS >= self.monitor.window and (drift := self.monitor.check()):
            self._since_check = 0
            self._report(self.monitor, drift)

    def _report(self, monitor: DriftMonitor, drift: Drift) -> None:
        self.index.set(drift.index)
        self.distance.set(drift.distance)
        if self.thresholds is not None:
            for kind, rates in zip(("reference", "window"), monitor.rates(), strict=True):
                for name, rate in zip(self.class_names, rates, strict=True):
                    self.rates.labels(name, kind).set(rate)
        most = monitor.largest_change(self.class_names)
        evidence = {
            "classes": f"stability index {drift.index:.2f}; {most['class']!r} was "
            f"{most['before']:.0%} of the answers, is {most['now']:.0%}",
            "confidence": f"Kolmogorov-Smirnov distance {drift.distance:.2f}",
        }
        for kind, found in (("classes", drift.classes), ("confidence", drift.confidence)):
            self.warned.labels(kind).set(found)
            if found and not self._drifting[kind]:
                logger.warning("drift of the %s: %s", kind, evidence[kind])
            elif self._drifting[kind] and not found:
                logger.info("drift of the %s is over: %s", kind, evidence[kind])
            self._drifting[kind] = found
