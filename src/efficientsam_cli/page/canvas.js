// One picture to point at: a click is a point (with the right button, or Alt, on the background), a drag is a box.
// Places are told in parts of the picture's sides, so that its size on the screen plays no part.
const LEAST_DRAG = 6; // pixels of the screen
let start = null;

const picture = () => element.querySelector("img");
const place = (event) => {
  const box = picture().getBoundingClientRect();
  const part = (value, from, length) => Math.min(Math.max((value - from) / length, 0), 1);
  return [part(event.clientX, box.left, box.width), part(event.clientY, box.top, box.height)];
};
const dragged = (event) => Math.hypot(event.clientX - start.x, event.clientY - start.y) >= LEAST_DRAG;

element.addEventListener("contextmenu", (event) => event.preventDefault());

element.addEventListener("pointerdown", (event) => {
  if (event.target !== picture() || event.button === 1) return;
  event.preventDefault();
  start = { x: event.clientX, y: event.clientY, place: place(event), background: event.button === 2 || event.altKey };
  element.setPointerCapture(event.pointerId);
});

element.addEventListener("pointermove", (event) => {
  if (!start || !picture()) return;
  const [x0, y0] = start.place, [x1, y1] = place(event);
  const rubber = element.querySelector(".rubber");
  rubber.style.display = dragged(event) ? "block" : "none";
  rubber.style.left = `${100 * Math.min(x0, x1)}%`;
  rubber.style.top = `${100 * Math.min(y0, y1)}%`;
  rubber.style.width = `${100 * Math.abs(x1 - x0)}%`;
  rubber.style.height = `${100 * Math.abs(y1 - y0)}%`;
});

element.addEventListener("pointerup", (event) => {
  if (!start || !picture()) return;
  const from = start.place, to = place(event), background = start.background, box = dragged(event);
  start = null;
  if (box) trigger("box", { corners: [...from, ...to] });
  else trigger("point", { place: to, background });
});

element.addEventListener("pointercancel", () => { start = null; });
