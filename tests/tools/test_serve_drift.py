"""tools.serve.drift and the metrics: formulas, limits, warnings."""

import json
import logging

import numpy as np
import pytest
from scipy import stats
from serving import metrics, predict, request, running
from tiny_images import COLOURS

from errors import UserError
from tools import report
from tools.serve import drift


def test_metrics_count_what_happened(checkpoint, images):
    with running(checkpoint) as (_, port):
        for name in COLOURS:
            predict(port, (images / f"val/{name}/1.png").read_bytes())
        predict(port, b"no image")
        request(port, "GET", "/some/other/path")
        found = metrics(port)
    assert found["serve_requests_total", "/predict", "200"] == 3
    assert found["serve_requests_total", "/predict", "422"] == 1
    assert found["serve_requests_total", "other", "404"] == 1
    assert found["serve_request_seconds_count", "/predict"] == 4
    assert found["serve_images_refused_total", "422"] == 1
    assert found["serve_confidence_count",] == 3
    assert found["serve_batch_images_sum",] == 3
    assert sum(v for k, v in found.items() if k[0] == "serve_answers_total") == 3
    assert found["serve_pending",] == 0


def test_stability_index_and_distance_are_those_of_the_formulas():
    reference, observed = np.array([60.0, 30, 10]), np.array([20.0, 30, 50])
    p, q = (reference + 0.5) / 101.5, (observed + 0.5) / 101.5
    by_hand = sum((a - b) * np.log(a / b) for a, b in zip(p, q, strict=True))
    assert drift.stability_index(reference, observed) == pytest.approx(by_hand)
    assert drift.stability_index(reference, reference) == 0
    values = [np.repeat([0, 1, 2], counts.astype(int)) for counts in (reference, observed)]
    wanted = stats.ks_2samp(*values).statistic
    assert drift.distance(reference, observed) == pytest.approx(wanted)


def test_limits_leave_chance_alone():
    """Windows drawn from the reference itself warn about as seldom as is promised."""
    rng = np.random.default_rng(0)
    classes, bins = np.full(200, 1 / 200), np.full(15, 1 / 15)
    warned = 0
    for _ in range(300):
        reference = drift.Reference(
            rng.multinomial(2000, classes).astype(float), rng.multinomial(2000, bins).astype(float)
        )
        index, gap = drift.limits(reference, 500)
        warned += (
            drift.stability_index(reference.classes, rng.multinomial(500, classes)) > index
            or drift.distance(reference.confidences, rng.multinomial(500, bins)) > gap
        )
    assert warned <= 6


def test_drift_is_warned_of_in_log_and_metrics(checkpoint, images, tmp_path, caplog):
    argv = [str(checkpoint), "--output", str(tmp_path), "--device", "cpu", "--num-workers", "0"]
    assert report.main(argv) == 0
    names = list(COLOURS)
    reference = drift.Reference.read(tmp_path / "report.json", names)
    content = json.loads((tmp_path / "report.json").read_text())
    assert reference.classes.sum() == reference.confidences.sum() == content["images"] == 18
    with running(checkpoint, monitor=drift.DriftMonitor(reference, 18)) as (_, port):
        caplog.set_level(logging.INFO, "serve")
        # The validation images themselves are no drift.
        for path in sorted(images.glob("val/*/*.png")):
            predict(port, path.read_bytes())
        calm = metrics(port)
        assert "drift" not in caplog.text
        assert calm["serve_drift_class_psi",] == pytest.approx(0, abs=1e-9)
        assert calm["serve_drift_warning", "classes"] == 0
        blue = (images / "val/blue/0.png").read_bytes()
        for _ in range(18):
            predict(port, blue)
        stirred = metrics(port)
    assert stirred["serve_drift_class_psi",] > 0.2
    assert stirred["serve_drift_warning", "classes"] == 1
    warnings = [r for r in caplog.records if "drift of the classes" in r.getMessage()]
    assert [r.levelname for r in warnings] == ["WARNING"]


def test_a_reference_of_another_model_is_named(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(UserError, match=r"report\.json: No such file"):
        drift.Reference.read(path, ["a"])
    path.write_text("[]")
    with pytest.raises(UserError, match="no report.json"):
        drift.Reference.read(path, ["a"])
    rows = [{"class": "b", "predicted": 1}]
    path.write_text(json.dumps({"per_class": rows, "calibration": {"bins": {"count": [1]}}}))
    with pytest.raises(UserError, match="other classes"):
        drift.Reference.read(path, ["a"])


@pytest.mark.parametrize("count", ["[-1]", "[NaN]", "[]", "3", "[1e999]", f"[1{'0' * 400}]"])
def test_counts_that_can_be_none_are_no_reference(tmp_path, count):
    path = tmp_path / "report.json"
    rows = '"per_class": [{"class": "a", "predicted": 1}]'
    path.write_text(f'{{{rows}, "calibration": {{"bins": {{"count": {count}}}}}}}')
    with pytest.raises(UserError, match="no report.json"):
        drift.Reference.read(path, ["a"])
