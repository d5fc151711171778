"""The page of ``tools.serve`` in a real browser: images in, classes and heat maps out."""

import argparse
import base64
import contextlib
import io
import shutil
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from after_training import train
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tools.common import trained
from tools.serve import app
from tools.serve.nursery import Nursery
from tools.serve.server import Server
from tools.serve.service import Batching, Limits, Service

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed"
)
NAMES = ["temple", "sky", "square", "flower", "leaves", "<b onclick='x()'>&amp;"]
# (photograph, left, top, right, bottom) as shares: what of scikit-learn's photographs each shows.
REGIONS = (
    (0, 0.1, 0.2, 0.9, 0.8),
    (0, 0.0, 0.0, 1.0, 0.2),
    (0, 0.0, 0.75, 1.0, 1.0),
    (1, 0.2, 0.1, 0.9, 0.9),
    (1, 0.0, 0.6, 0.3, 1.0),
    None,
)


def photographs():
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has seen parts of two photographs."""
    import numpy as np

    root, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    photos = photographs()
    for number, region in enumerate(REGIONS):
        for part, count in (("train", 8), ("val", 2)):
            folder = root / part / str(number)
            folder.mkdir(parents=True)
            for i in range(count):
                if region is None:
                    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
                else:
                    image = crop(photos[region[0]], region[1:], rng)
                image.save(folder / f"{i}.png")
    more = ["--input-size", "32", "--batch-size", "16", "--epochs", "2"]
    folder = tmp_path_factory.mktemp("run")
    train(root, folder, *more)
    return folder / "best.pth"


def crop(photo, region, rng):
    width, height = photo.size
    left, top, right, bottom = region
    share = rng.uniform(0.6, 1.0)
    wide, high = (right - left) * share, (bottom - top) * share
    x, y = rng.uniform(left, right - wide), rng.uniform(top, bottom - high)
    box = (x * width, y * height, (x + wide) * width, (y + high) * height)
    return photo.crop(tuple(map(int, box))).resize((64, 64))


def opened(checkpoint):
    given = argparse.Namespace(model=str(checkpoint), ema=False, device="cpu", plugin=[])
    model = trained.open_model(given)
    # Folders can't have such names; class lists of CSV files can.
    model.classifier.class_names[:] = NAMES
    return model


@contextlib.contextmanager
def served(model):
    """The address of the page."""
    service = Service(model, "parts", Nursery(), limits=Limits(), batching=Batching())
    server = Server(app.build_app(service), service)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(checkpoint):
    with served(opened(checkpoint)) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1000,640")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    browser.get(address)
    browser.get_log("browser")
    yield browser
    # Among others a script or image that the policy forbids would be told here.
    told = [entry["message"] for entry in browser.get_log("browser")]
    assert not [text for text in told if "/predict" not in text]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "china & <i>co.jpg"
    photographs()[0].save(path, quality=92)
    return path


def find(page, name):
    return page.find_element(By.ID, name)


def wait(page, condition):
    return WebDriverWait(page, 20, 0.05).until(lambda _: condition())


def choose(page, path):
    find(page, "file").send_keys(str(path))
    wait(page, lambda: find(page, "map").is_displayed())


def shown(page):
    """A PNG of the page to its end."""
    height = page.execute_script("return document.documentElement.scrollHeight")
    page.set_window_size(page.get_window_size()["width"], max(640, height + 140))
    return Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")


def test_a_chosen_image_gets_classes_and_a_map(page, photo):
    choose(page, photo)
    rows = page.find_elements(By.CSS_SELECTOR, "#classes button")
    assert len(rows) == 5
    texts = [row.text.splitlines() for row in rows]
    shares = [float(share.removesuffix(" %")) for _, share in texts]
    assert shares == sorted(shares, reverse=True) and {name for name, _ in texts} <= set(NAMES)
    explanation = find(page, "explanation")
    data = explanation.get_attribute("src").partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (224, 224)
    assert explanation.get_property("naturalWidth") == 224
    assert texts[0][0] in explanation.get_attribute("alt")
    assert find(page, "image").get_property("naturalWidth") == 640


def test_labels_that_reach_their_threshold_are_marked(browser, checkpoint, photo):
    model = opened(checkpoint)
    with torch.no_grad():
        logits = model.classifier.model(model.classifier.transform(photo)[None])[0]
    shares = torch.sigmoid(logits).tolist()
    there = {name for name, share in zip(NAMES, shares, strict=True) if share > 0.5}
    assert 0 < len(there) < 5
    several = replace(model.classifier, task="multilabel", thresholds=(0.5,) * len(NAMES))
    with served(model._replace(classifier=several)) as address:
        browser.get(address)
        choose(browser, photo)
        assert find(browser, "likely").text == "Labels"
        rows = browser.find_elements(By.CSS_SELECTOR, "#classes button")
        texts = [row.text.splitlines() for row in rows]
        marked = {name.removeprefix("✓ ") for name, _ in texts if name.startswith("✓ ")}
        assert marked == there
        assert [float(share.removesuffix(" %")) for _, share in texts] == pytest.approx(
            sorted((100 * share for share in shares), reverse=True)[:5], abs=0.06
        )
        assert rows[0].get_attribute("title") == "there from 50.0 %"
        assert [row.get_attribute("class") for row in rows[len(there) :]] == ["absent"] * (
            5 - len(there)
        )


def test_names_of_files_and_classes_are_text(page, photo):
    choose(page, photo)
    assert find(page, "caption").text == photo.name
    assert photo.name in find(page, "image").get_attribute("alt")
    assert not page.find_elements(By.CSS_SELECTOR, "#classes b, figcaption i")


def test_a_class_is_explained_by_keyboard(page, photo):
    choose(page, photo)
    before = find(page, "explanation").get_attribute("src")
    second = page.find_elements(By.CSS_SELECTOR, "#classes button")[1]
    name = second.text.splitlines()[0]
    page.find_elements(By.CSS_SELECTOR, "#classes button")[0].send_keys(Keys.TAB)
    active = page.switch_to.active_element
    assert active == second
    active.send_keys(Keys.ENTER)
    wait(page, lambda: find(page, "about").text == f"What speaks for {name}")
    assert second.get_attribute("aria-pressed") == "true"
    assert find(page, "explanation").get_attribute("src") != before
    assert find(page, "status").text == ""


def test_what_is_no_image_is_told(page, tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("not an image")
    find(page, "file").send_keys(str(path))
    wait(page, lambda: "not an image" in find(page, "status").text)
    assert find(page, "status").get_attribute("role") == "status"
    assert not find(page, "result").is_displayed()


def test_an_image_can_be_dropped(page, photo):
    data = base64.b64encode(photo.read_bytes()).decode()
    page.execute_script(
        """
        const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
        document.getElementById("drop").dispatchEvent(
          new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        """,
        data,
    )
    wait(page, lambda: find(page, "map").is_displayed())
    assert find(page, "caption").text == "dropped.jpg"


def test_everything_has_a_name_and_the_label_leads_to_the_input(page, photo):
    choose(page, photo)
    assert find(page, "file").accessible_name.startswith("Drop an image here")
    for image in page.find_elements(By.CSS_SELECTOR, "img"):
        assert image.get_attribute("alt")
    for button in page.find_elements(By.CSS_SELECTOR, "button"):
        assert button.accessible_name
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page, photo, scheme):
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    choose(page, photo)
    pixels = shown(page).convert("L")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    ground = pixels.getpixel((5, 5))
    heading = find(page, "likely").rect
    box = [int(heading[k]) for k in ("x", "y", "width", "height")]
    words = pixels.crop((box[0], box[1], box[0] + box[2], box[1] + box[3]))
    low, high = words.getextrema()
    assert ground > 240 if scheme == "light" else ground < 40
    assert high - low > 150


def test_a_phone_needs_no_sideways_scrolling(page, photo):
    metrics = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    choose(page, photo)
    width = page.execute_script("return document.documentElement.scrollWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 320


def test_docs_page_lists_the_paths(page, address):
    page.get(address + "docs")
    wait(page, lambda: page.find_elements(By.TAG_NAME, "h2"))
    headings = {element.text for element in page.find_elements(By.TAG_NAME, "h2")}
    assert {"POST /predict", "GET /health", "GET /metrics"} <= headings
    assert "explain" in page.find_element(By.TAG_NAME, "main").text


def test_page_is_one_file():
    text = (Path(app.__file__).parent / "page.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "innerHTML" not in text
