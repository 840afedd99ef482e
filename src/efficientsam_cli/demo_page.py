"""The page of the demo: wiring between the browser and `efficientsam_hf.interaction`.

Whatever the page shows is made for one visitor: pictures travel inside the page, and files that a visitor takes away
lie in gradio's own folder of temporary files. Gradio serves nothing else, and the page asks no other host.
"""

import base64
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Before gradio is imported: it would ask other hosts for its news.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import PIL.Image

from efficientsam_hf.interaction import PhotoSession, open_photo
from efficientsam_hf.mask_settings import MaskGenerationSettings

PAGE = Path(__file__).parent / "page"
PHOTOS = sorted((PAGE / "photos").glob("*.jpg"), key=lambda path: path.stem != "coffee")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
# Of a photo that is no longer looked at; its embedding takes memory.
FORGET_AFTER = 3600
MOST_VISITORS = 200
# The file that the server has just written, saved by the browser under its own name.
TAKE = """(file) => { if (!file) return; const link = document.createElement("a"); link.href = file.url;
link.download = file.orig_name || ""; document.body.append(link); link.click(); link.remove(); }"""


@dataclass(frozen=True)
class Limits:
    """What a visitor may send.

    Args:
        megabytes: Of an uploaded file.
        megapixels: Of a picture.
    """

    megabytes: float = 20
    megapixels: float = 40


class Page:
    """What happens at each click of a visitor; `session` is that visitor's, and nobody else's.

    Args:
        model: Shared by all visitors, who wait for each other.
        processor: The model's.
        limits: Of uploads.
    """

    def __init__(self, model: Any, processor: Any, limits: Limits):
        self.model = model
        self.processor = processor
        self.most_pixels = int(limits.megapixels * 1e6)
        self.room = tempfile.TemporaryDirectory(prefix="efficientsam-demo-")

    def open(self, path: str | None, opacity: float) -> tuple:
        """A photo that a visitor sent, or an example."""
        if path is None:
            return self.show(None, opacity, "")
        photo = open_photo(path, self.most_pixels)
        session = PhotoSession(photo, Path(path).name)
        return self.show(session, opacity, f"{photo.width} x {photo.height} pixels. Click on something.")

    def look(self, session: PhotoSession | None) -> None:
        """Encode the photo while its visitor still wonders where to click."""
        if session is not None:
            session.look(self.model, self.processor)

    def open_example(self, opacity: float, event: gr.SelectData) -> tuple:
        """The example that was clicked on."""
        return self.open(str(PHOTOS[event.index]), opacity)

    def point(self, session: PhotoSession | None, tool: str, opacity: float, event: gr.EventData) -> tuple:
        """A click on the picture."""
        (x, y), background = event.place, event.background or tool == "Background"
        return self.work(session, opacity, lambda s: s.click(self.model, self.processor, x, y, int(not background)))

    def box(self, session: PhotoSession | None, opacity: float, event: gr.EventData) -> tuple:
        """A box drawn on the picture."""
        return self.work(session, opacity, lambda s: s.drag(self.model, self.processor, tuple(event.corners)))

    def undo(self, session: PhotoSession | None, opacity: float) -> tuple:
        """Take back the last click or box."""
        return self.work(session, opacity, lambda s: s.undo(self.model, self.processor))

    def clear(self, session: PhotoSession | None, opacity: float) -> tuple:
        """Forget what was pointed at."""
        return self.work(session, opacity, lambda s: s.clear())

    def everything(self, session: PhotoSession | None, opacity: float, *sliders: float) -> tuple:
        """Find all objects."""
        side, iou, stability, region = sliders
        options = {"points_per_side": int(side), "pred_iou_thresh": iou, "stability_score_thresh": stability}
        options["min_mask_region_area"] = int(region)
        nothing = "No object was found: lower the thresholds."
        return self.work(session, opacity, lambda s: s.find_everything(self.model, self.processor, **options), nothing)

    def work(
        self,
        session: PhotoSession | None,
        opacity: float,
        job: Callable[[PhotoSession], Any],
        nothing: str = "Nothing is selected.",
    ) -> tuple:
        """Do something to a visitor's photo, and show what came of it; `nothing` is told where that is nothing."""
        if session is None:
            raise ValueError("there is no photo yet: upload one, or take an example")
        start = time.monotonic()
        job(session)
        found = f"{len(session.found.records)} objects" if session.found.records else ""
        if session.found.answer is not None:
            found = f"predicted IoU {session.found.scores[session.found.choice]:.2f}"
        told = [found, f"{time.monotonic() - start:.2f} s"] if found else [nothing]
        return self.show(session, opacity, ", ".join(told))

    def choose(self, session: PhotoSession | None, opacity: float, choice: int | None) -> str | None:
        """Another of the candidates."""
        if session is not None and choice is not None and session.found.answer is not None:
            session.choose(choice)
        return self.redraw(session, opacity)

    def redraw(self, session: PhotoSession | None, opacity: float) -> str | None:
        """The picture for the page, as text that holds all of it."""
        if session is None:
            return None
        written = io.BytesIO()
        session.draw(opacity).save(written, "JPEG", quality=90)
        return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"

    def show(self, session: PhotoSession | None, opacity: float, status: str) -> tuple:
        """Session, picture, candidates and status, as the page wants them."""
        scores = session.found.scores if session else []
        names = [
            (f"{'best' if not number else number + 1}: {score:.2f}", number) for number, score in enumerate(scores)
        ]
        candidates = gr.Radio(names, value=session.found.choice if session and names else None, visible=bool(names))
        return session, self.redraw(session, opacity), candidates, status

    def take(self, kind: str) -> Callable[[PhotoSession | None], str]:
        """What a download button of this kind does."""

        def save(session: PhotoSession | None) -> str:
            if session is None:
                raise ValueError("there is no photo yet: upload one, or take an example")
            self.tidy()
            return str(session.save(kind, tempfile.mkdtemp(dir=self.room.name)))

        return save

    def tidy(self) -> None:
        """Drop the downloads of visitors who have long had them; gradio does so with its own copies."""
        for folder in Path(self.room.name).iterdir():
            with suppress(FileNotFoundError):  # another visitor's download has dropped it
                if time.time() - folder.stat().st_mtime > FORGET_AFTER:
                    shutil.rmtree(folder, ignore_errors=True)


def said_to_the_visitor(job: Callable) -> Callable:
    """What a visitor can mend becomes a message in the page; everything else stays an error of ours."""

    @wraps(job)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return job(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from error

    return run


# --------------------------------------------------------------------------------------------------------------------
# Layout and wires


def build_page(model: Any, processor: Any, name: str, limits: Limits | None = None) -> gr.Blocks:
    """The page for one model; `serve` serves it.

    Args:
        model: Of EfficientSAM.
        processor: The model's.
        name: What the page calls the model.
        limits: Of uploads.
    """
    page = Page(model, processor, limits or Limits())
    if PIL.Image.MAX_IMAGE_PIXELS:  # which would refuse what the page's own limit lets in
        PIL.Image.MAX_IMAGE_PIXELS = max(PIL.Image.MAX_IMAGE_PIXELS, page.most_pixels)
    with gr.Blocks(title="EfficientSAM", analytics_enabled=False, delete_cache=(FORGET_AFTER, FORGET_AFTER)) as blocks:
        title = f"# EfficientSAM\nPoint at things in a photo and take their masks away. Model: `{name}`"
        gr.Markdown(title, elem_id="title")
        with gr.Row():
            with gr.Column(scale=5, min_width=420):
                parts = picture_parts()
            with gr.Column(scale=2, min_width=300):
                parts |= side_parts(page)
        session = gr.State(None, time_to_live=FORGET_AFTER)
        wire(page, SimpleNamespace(session=session, **parts))
    return blocks


def picture_parts() -> dict[str, Any]:
    """The picture, what is said about it, candidates, opacity and downloads."""
    texts = {name: (PAGE / f"canvas.{name}").read_text() for name in ("html", "css", "js")}
    canvas = gr.HTML(
        None,
        html_template=texts["html"],
        css_template=texts["css"],
        js_on_load=texts["js"],
        elem_id="canvas",
        apply_default_css=False,
    )
    status = gr.Markdown("", elem_id="status")
    label = "Candidates, with the IoU that the model predicts"
    candidates = gr.Radio([], label=label, visible=False, elem_id="candidates")
    with gr.Row(elem_id="below"):
        opacity = gr.Slider(0, 1, 0.45, step=0.05, label="Opacity", scale=3, min_width=240, elem_id="opacity")
        names = {"mask": "⤓ Mask", "coco": "⤓ COCO JSON", "cutout": "⤓ Cut-out"}
        buttons: dict[str, Any] = {"min_width": 90, "size": "md"}
        downloads = {kind: gr.Button(text, elem_id=f"take-{kind}", **buttons) for kind, text in names.items()}
    taken = gr.File(visible="hidden")
    return {
        "canvas": canvas, "status": status, "candidates": candidates, "opacity": opacity, "downloads": downloads,
        "taken": taken,
    }  # fmt: skip


def side_parts(page: Page) -> dict[str, Any]:
    """Upload, examples, tools and downloads."""
    upload = gr.UploadButton("Upload a photo", file_types=["image"], variant="primary", elem_id="upload")
    photos = [str(path) for path in PHOTOS]
    plain: dict[str, Any] = {"show_label": False, "allow_preview": False, "buttons": [], "interactive": False}
    examples = gr.Gallery(photos, columns=4, object_fit="cover", height="auto", elem_id="examples", **plain)
    with gr.Tab("Point and box"):
        teach = page.processor.negative_points
        tools = ["Object", "Background"] if teach else ["Object"]
        hint = "the right button points at the background" if teach else "this model never learnt background clicks"
        tool = gr.Radio(tools, value="Object", label="A click is on the", info=f"Drag for a box; {hint}.")
        with gr.Row():
            undo = gr.Button("Undo", min_width=80, size="md", elem_id="undo")
            clear = gr.Button("Clear", min_width=80, size="md", elem_id="clear")
    with gr.Tab("Everything"):
        known = MaskGenerationSettings.read(**(page.model.config.mask_generation or {}))
        sliders = [
            gr.Slider(4, 32, min(known.points_per_side, 32), step=1, label="Clicks along each side"),
            gr.Slider(0, 1, known.pred_iou_thresh, step=0.01, label="Least predicted IoU"),
            gr.Slider(0, 1, known.stability_score_thresh, step=0.01, label="Least stability"),
            gr.Slider(0, 2000, 0, step=50, label="Fill holes, drop islands below (pixels)"),
        ]
        everything = gr.Button("Find everything", variant="primary", elem_id="everything")
    return {
        "upload": upload, "examples": examples, "tool": tool, "undo": undo, "clear": clear, "sliders": sliders,
        "everything": everything,
    }  # fmt: skip


def wire(page: Page, ui: SimpleNamespace) -> None:
    """Which part of the page calls what. Whoever needs the model waits for the visitors before."""
    shown = [ui.session, ui.canvas, ui.candidates, ui.status]
    alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    busy: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": ui.status}
    opened = []
    for event, job, inputs in (
        (ui.upload.upload, page.open, [ui.upload, ui.opacity]),
        (ui.examples.select, page.open_example, [ui.opacity]),
        (ui.canvas.point, page.point, [ui.session, ui.tool, ui.opacity]),
        (ui.canvas.box, page.box, [ui.session, ui.opacity]),
        (ui.undo.click, page.undo, [ui.session, ui.opacity]),
        (ui.clear.click, page.clear, [ui.session, ui.opacity]),
        (ui.everything.click, page.everything, [ui.session, ui.opacity, *ui.sliders]),
    ):
        answered = event(said_to_the_visitor(job), inputs, shown, **alone, **busy)
        opened += [answered] if job in (page.open, page.open_example) else []
    for answered in opened:
        answered.success(page.look, ui.session, None, show_progress="hidden", **alone)
    redrawn: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
    ui.candidates.input(page.choose, [ui.session, ui.opacity, ui.candidates], ui.canvas, **redrawn)
    ui.opacity.input(page.redraw, [ui.session, ui.opacity], ui.canvas, **redrawn)
    for kind, button in ui.downloads.items():
        saved = button.click(said_to_the_visitor(page.take(kind)), ui.session, ui.taken, show_progress="hidden")
        saved.success(None, ui.taken, None, js=TAKE)


def serve(blocks: gr.Blocks, limits: Limits | None = None, **options: Any) -> tuple:
    """Serve the page: of this machine's files nothing but the examples, and what gradio keeps for its visitors."""
    limits = limits or Limits()
    theme = gr.themes.Soft(
        primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
    )
    return blocks.queue(max_size=100).launch(
        max_file_size=round(limits.megabytes * 2**20),
        state_session_capacity=MOST_VISITORS,
        theme=theme,
        css=(PAGE / "style.css").read_text(),
        footer_links=[],
        ssr_mode=False,
        share=False,
        quiet=True,
        **options,
    )
