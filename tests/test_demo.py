"""The demo as a visitor meets it: over HTTP, and in a headless Chromium where there is one."""

import http.client
import io
import json
import os
import re
import runpy
import shutil
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_model, tiny_config
from PIL import Image
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_hf import EfficientSamProcessor, load_checkpoint, save_for_hub
from efficientsam_hf.interaction import open_photo
from efficientsam_hf.masks_efficientsam import decode_rle

gradio = pytest.importorskip("gradio", reason="the demo needs gradio: the extra [demo]")
demo_page = pytest.importorskip("efficientsam_cli.demo_page", reason="the demo needs gradio: the extra [demo]")
PHOTOS, Limits, build_page, serve = demo_page.PHOTOS, demo_page.Limits, demo_page.build_page, demo_page.serve

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
SWITCHES += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# `EFFICIENTSAM_SCREENSHOTS=docs/images` refreshes those of the documentation.
SCREENSHOTS = os.environ.get("EFFICIENTSAM_SCREENSHOTS")


@pytest.fixture(scope="module")
def address():
    """A demo of a tiny model, for whatever needs no eyes."""
    model = make_model(tiny_config())
    limits = Limits(megabytes=1.5, megapixels=2)  # no whole number, as the option takes it
    blocks = build_page(model, EfficientSamProcessor.from_model_config(model.config), "tiny", limits)
    _, url, _ = serve(blocks, limits, prevent_thread_lock=True, server_name="127.0.0.1")
    yield url.removeprefix("http://").rstrip("/")
    blocks.close()


def test_pictures_as_large_as_the_option_says_are_taken(tmp_path, photo, monkeypatch):
    Image.fromarray(photo).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    model = make_model(tiny_config())
    build_page(model, EfficientSamProcessor.from_model_config(model.config), "tiny", Limits(megapixels=0.1))
    assert open_photo(tmp_path / "large.png", 100_000).size == (80, 48)


def ask(address: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read()


def multipart(name: str, content: bytes) -> tuple[bytes, str]:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    return head + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


def upload(address: str, name: str, content: bytes) -> tuple[int, bytes]:
    body, kind = multipart(name, content)
    return ask(address, "POST", "/gradio_api/upload", body, Content_Type=kind)


def call(address: str, api: str, data: list, session: str) -> dict:
    """One event of the page, from its number to the last message of the server."""
    config = json.loads(ask(address, "GET", "/config")[1])
    (number,) = [item["id"] for item in config["dependencies"] if item["api_name"] == api]
    body = {"data": data, "fn_index": number, "session_hash": session}
    status, text = ask(
        address, "POST", "/gradio_api/queue/join", json.dumps(body).encode(), Content_Type="application/json"
    )
    if status != 200:
        return {"msg": "refused", "status": status, "text": text.decode()}
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
    answer = connection.getresponse()
    while line := answer.readline().decode():
        message = json.loads(line[5:]) if line.startswith("data:") else {}
        if message.get("msg") in ("process_completed", "unexpected_error"):
            return message
    raise AssertionError("the server said no more")


def file(path: str | Path) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", str(REPOSITORY / "pyproject.toml"), str(PHOTOS[0].parent / "README.md"), "../../etc/passwd"],
)
def test_no_other_file_is_served(address, path):
    for prefix in ("/gradio_api/file=", "/file=", "/static/", "/assets/"):
        status, content = ask(address, "GET", prefix + path)
        assert status in (403, 404), (prefix, status)
        assert b"root:" not in content
        assert b"[project]" not in content
    # Nor read on behalf of a visitor who names it instead of uploading something.
    message = call(address, "open", [file(path), 0.5], "thief")
    assert message["msg"] == "refused" or message["success"] is False


def test_an_upload_is_opened_and_bad_ones_are_answered(address, photo):
    written = io.BytesIO()
    Image.fromarray(photo).save(written, "PNG")
    good = written.getvalue()
    for name, content, words in (
        ("good.png", good, None),
        ("bad.png", b"no picture", "bad.png is no picture that can be read"),
        ("cut.png", good[:-400], "cut.png is damaged, or its upload was cut short"),
    ):
        status, text = upload(address, name, content)
        assert status == 200
        message = call(address, "open", [file(json.loads(text)[0]), 0.5], "visitor")
        if words is None:
            assert message["success"], message
            assert message["output"]["data"][1].startswith("data:image/jpeg;base64,")
        else:
            assert message["output"]["error"] == words


def test_too_much_is_refused(address):
    assert upload(address, "below.png", b"x" * 1_400_000)[0] == 200
    status, text = upload(address, "large.png", b"x" * 1_700_000)
    assert status == 413 or b"exceeded" in text, (status, text)
    room = Path(tempfile.mkdtemp())
    Image.new("RGB", (2000, 1500)).save(room / "huge.png")
    _, text = upload(address, "huge.png", (room / "huge.png").read_bytes())
    message = call(address, "open", [file(json.loads(text)[0]), 0.5], "visitor")
    assert message["output"]["error"] == "huge.png has 2000 x 1500 pixels, wanted at most 2 megapixels"


def test_undo_comes_back_to_the_mask_that_was_chosen():
    model = make_model(tiny_config())
    page = demo_page.Page(model, EfficientSamProcessor.from_model_config(model.config), Limits())
    session, *_ = page.open(str(PHOTOS[0]), 0.5)
    page.point(session, "Object", 0.5, SimpleNamespace(place=(0.5, 0.5), background=False))
    page.choose(session, 0.5, 2)
    page.point(session, "Object", 0.5, SimpleNamespace(place=(0.4, 0.5), background=False))
    _, _, candidates, told = page.undo(session, 0.5)
    assert candidates.value == session.found.choice == 2
    assert told.startswith(f"predicted IoU {session.found.scores[2]:.2f}, ")


def test_downloads_that_another_visitor_has_dropped_are_no_error(monkeypatch):
    page = demo_page.Page(None, None, Limits())
    gone = Path(page.room.name) / "gone"
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([gone]))
    page.tidy()


def test_an_interrupted_upload_leaves_the_demo_serving(address, photo):
    body, kind = multipart("half.png", b"x" * 100_000)
    host, port = address.split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=10) as line:
            head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {address}\r\nContent-Type: {kind}\r\n"
            line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:30_000])
    assert ask(address, "GET", "/config")[0] == 200
    test_an_upload_is_opened_and_bad_ones_are_answered(address, photo)


def test_clicks_before_a_photo_are_answered(address):
    message = call(address, "undo", [None, 0.5], "hasty")
    assert message["output"]["error"] == "there is no photo yet: upload one, or take an example"


def test_the_command_serves_until_it_is_stopped(tmp_path, monkeypatch):
    model = make_model(tiny_config())
    save_for_hub(model, EfficientSamProcessor.from_model_config(model.config), tmp_path / "tiny")

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("efficientsam_cli.demo.time", SimpleNamespace(sleep=stop))
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path / "tiny"), "--no-open", "--device", "cpu"])
    found = re.search(r"serving at http://(127\.0\.0\.1:\d+)/", result.output)
    assert found, result.output
    config = json.loads(ask(found[1], "GET", "/config")[1])
    assert "Model: `tiny`" in json.dumps(config)
    gradio.close_all()
    result = CliRunner().invoke(app, ["demo", "--model", str(tmp_path / "nowhere"), "--no-open"])
    assert result.exit_code == 2
    assert "nowhere" in result.output


def test_the_space_is_ready(tmp_path, monkeypatch):
    model = make_model(tiny_config())
    save_for_hub(model, EfficientSamProcessor.from_model_config(model.config), tmp_path / "tiny")
    served = []
    monkeypatch.setenv("EFFICIENTSAM_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setattr(demo_page, "serve", lambda *args, **kwargs: served.append((args, kwargs)))
    runpy.run_path(str(REPOSITORY / "examples" / "gradio_app.py"), run_name="__main__")
    (((page, limits), options),) = served
    _, url, _ = serve(page, limits, prevent_thread_lock=True, **options)
    assert ask(url.removeprefix("http://").rstrip("/"), "GET", "/config")[0] == 200
    page.close()
    header = (REPOSITORY / "examples" / "space" / "README.md").read_text().split("---\n")[1]
    pinned = re.search(r"^gradio==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert f"sdk_version: {pinned[1]}\n" in header
    assert "app_file: app.py\n" in header


# --------------------------------------------------------------------------------------------------------------------
# With eyes


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    if CHROMIUM is None:
        pytest.skip("the browser test needs chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright, tempfile.TemporaryDirectory() as home:
        context = playwright.chromium.launch_persistent_context(
            home, executable_path=CHROMIUM, args=SWITCHES, viewport={"width": 1280, "height": 900}
        )
        context.set_default_timeout(60_000)
        yield context
        context.close()


class Visitor:
    """A page, and what one does there."""

    def __init__(self, browser, url: str):
        self.page = browser.new_page()
        self.asked: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        start = time.monotonic()
        self.page.goto(url)
        self.page.wait_for_selector("#canvas .stage")
        self.page.wait_for_selector("#examples img")
        self.ready = time.monotonic() - start

    @property
    def picture(self):
        return self.page.locator("#canvas img")

    def change(self, action, looked: int = 0) -> float:
        """Seconds from an action until another picture is there, after looking at the last for some milliseconds."""
        self.page.wait_for_timeout(looked)
        old = self.picture.get_attribute("src") if self.picture.count() else ""
        start = time.monotonic()
        action()
        image = "document.querySelector('#canvas img')"
        self.page.wait_for_function(f"old => {image} && {image}.src !== old && {image}.complete", arg=old)
        return time.monotonic() - start

    def example(self, number: int) -> None:
        self.change(self.page.locator("#examples .grid-container button").nth(number).click)
        self.page.wait_for_timeout(200)

    def at(self, x: float, y: float) -> tuple[float, float]:
        box = self.picture.bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        mouse = self.page.mouse
        mouse.move(*self.at(x0, y0))
        mouse.down()
        mouse.move(*self.at((x0 + x1) / 2, (y0 + y1) / 2))
        mouse.move(*self.at(x1, y1))
        mouse.up()

    def take(self, kind: str, folder: Path) -> Path:
        with self.page.expect_download() as download:
            self.page.click(f"#take-{kind}")
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path

    def screenshot(self, name: str, folder: Path) -> None:
        self.page.mouse.move(2, 2)
        self.page.wait_for_timeout(500)
        self.page.screenshot(path=Path(SCREENSHOTS or folder) / f"demo_{name}.jpg", type="jpeg", quality=82)


@pytest.mark.slow
def test_a_visit(browser, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    blocks = build_page(*load_checkpoint(device="cpu"), "efficientsam-nano-512")
    _, url, _ = serve(blocks, prevent_thread_lock=True, server_name="127.0.0.1")
    try:
        times = visit(browser, url, tmp_path)
    finally:
        blocks.close()
        torch.set_num_threads(threads)
    with capsys.disabled():
        print("\ndemo:", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items()))


def visit(browser, url: str, folder: Path) -> dict[str, float]:
    visitor, other = Visitor(browser, url), Visitor(browser, url)
    times = {"page ready": visitor.ready, "page ready again": other.ready}
    # Chromium wakes what lies behind another page once a second.
    visitor.page.bring_to_front()
    visitor.example(0)
    times["first click"] = visitor.change(lambda: visitor.page.mouse.click(*visitor.at(0.45, 0.3)))
    times["hasty click"] = visitor.change(lambda: visitor.page.mouse.click(*visitor.at(0.35, 0.55)))
    times["further click"] = visitor.change(lambda: visitor.page.mouse.click(*visitor.at(0.4, 0.6)), looked=1500)
    click = {"button": "right"}
    times["background click"] = visitor.change(lambda: visitor.page.mouse.click(*visitor.at(0.9, 0.9), **click))
    assert visitor.page.locator("#candidates label").count() == 3
    times["another candidate"] = visitor.change(visitor.page.locator("#candidates label").nth(1).click)
    visitor.change(visitor.page.locator("#undo").click)
    visitor.change(visitor.page.locator("#clear").click)

    # Another visitor's picture and prompts are their own.
    other.page.bring_to_front()
    other.example(1)
    other.change(lambda: other.page.mouse.click(*other.at(0.5, 0.5)))
    visitor.page.bring_to_front()
    times["box"] = visitor.change(lambda: visitor.drag(0.125, 0.0375, 0.8, 0.9625))
    visitor.screenshot("box", folder)
    mask = np.asarray(Image.open(visitor.take("mask", folder)))
    (record,) = json.loads(visitor.take("coco", folder).read_text())["annotations"]
    cutout = np.asarray(Image.open(visitor.take("cutout", folder)))
    assert mask.shape == (400, 600)
    assert np.array_equal(mask > 0, decode_rle(record["segmentation"]).numpy())
    assert np.array_equal(cutout[..., 3] > 0, mask > 0)
    # The cup and its saucer fill most of the box that was drawn around them.
    assert (mask[15:385, 75:480] > 0).mean() > 0.5
    assert np.asarray(Image.open(other.take("mask", folder))).shape == (300, 451)

    visitor.page.get_by_role("tab", name="Everything").click()
    times["everything"] = visitor.change(visitor.page.locator("#everything").click)
    visitor.screenshot("everything", folder)
    assert len(json.loads(visitor.take("coco", folder).read_text())["annotations"]) > 3
    assert re.search(r"\d+ objects", visitor.page.locator("#status").inner_text())

    (folder / "bad.jpg").write_text("no picture")
    before = visitor.picture.get_attribute("src")
    visitor.page.locator("input[type=file]").first.set_input_files(folder / "bad.jpg")
    visitor.page.get_by_text("bad.jpg is no picture that can be read").wait_for()
    assert visitor.picture.get_attribute("src") == before
    Image.open(PHOTOS[2]).save(folder / "own.png")
    visitor.change(lambda: visitor.page.locator("input[type=file]").first.set_input_files(folder / "own.png"))
    elsewhere = [asked for asked in visitor.asked + other.asked if not asked.startswith((url, "data:", "blob:"))]
    assert not elsewhere
    assert not visitor.faults
    return times
