"""What ``/metrics`` tells, in Prometheus' format."""

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tools.serve.batcher import Answer
from tools.serve.drift import Drift, Watch

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128)
TENTHS = tuple(n / 10 for n in range(1, 11))
LOOKS = 10  # in the time of a window

logger = logging.getLogger("serve")


class Measures:
    """Counters and gauges of one service, and the watch for drift."""

    def __init__(self, class_names: list[str], watch: Watch | None) -> None:
        self.registry = registry = CollectorRegistry()
        self.class_names, self.watch = class_names, watch
        self.requests = Counter(
            "serve_requests", "Requests answered", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "serve_request_seconds", "From the request to the end of its answer", ("path",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.refused = Counter(
            "serve_pictures_refused", "Pictures without an answer", ("status",), registry=registry
        )
        self.answers = Counter(
            "serve_answers", "Answers by likeliest class", ("class",), registry=registry
        )
        self.confidence = Histogram(
            "serve_confidence", "Probability of the likeliest class",
            buckets=TENTHS, registry=registry,
        )  # fmt: skip
        self.pending = Gauge("serve_pending", "Pictures in hand", registry=registry)
        self.batch = Histogram(
            "serve_batch_pictures", "Pictures in a batch", buckets=PICTURES, registry=registry
        )
        self.model_seconds = Histogram(
            "serve_model_seconds", "The model's time for a batch",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._since_look = 0
        self._drifting = {"classes": False, "confidence": False}
        if watch:
            self.index = Gauge(
                "serve_drift_class_psi", "Stability index of the class mix", registry=registry
            )
            self.distance = Gauge(
                "serve_drift_confidence_ks", "Distance of the confidences", registry=registry
            )
            self.warned = Gauge(
                "serve_drift_warning", "1 beyond the limit", ("kind",), registry=registry
            )
            for kind in self._drifting:
                self.warned.labels(kind).set(0)

    def batched(self, size: int, seconds: float) -> None:
        """Take note of a batch."""
        self.batch.observe(size)
        self.model_seconds.observe(seconds)

    def answered(self, answer: Answer) -> None:
        """Take note of an answer; warns in the log when drift begins and when it ends."""
        index = int(answer.probabilities.argmax())
        confidence = float(answer.probabilities[index])
        self.answers.labels(self.class_names[index]).inc()
        self.confidence.observe(confidence)
        if self.watch is None:
            return
        self.watch.add(index, confidence)
        self._since_look += 1
        if self._since_look * LOOKS >= self.watch.window and (drift := self.watch.look()):
            self._since_look = 0
            self._tell(self.watch, drift)

    def _tell(self, watch: Watch, drift: Drift) -> None:
        self.index.set(drift.index)
        self.distance.set(drift.distance)
        most = watch.describe(self.class_names)
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
