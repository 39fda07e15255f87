// The reader's page: fetches the case that is due, draws it, keeps the time, sends the answer until it is acknowledged.
// Volumes are int16 HU [z, y, x], RAS+; every plane is flipped on both axes, which is the radiological view.

const PLANES = {
  axial: { axis: 0, rows: 1, columns: 2, edges: { left: "R", right: "L", top: "A", bottom: "P" } },
  coronal: { axis: 1, rows: 0, columns: 2, edges: { left: "R", right: "L", top: "S", bottom: "I" } },
  sagittal: { axis: 2, rows: 0, columns: 1, edges: { left: "A", right: "P", top: "S", bottom: "I" } },
};
const MARK = "#ffd54a", POINT = "#7fe0ff";
const RETRY_S = [0.3, 1, 2, 5];
const LONGEST_S = 86400; // what the server takes for one visit
const TOKEN = /^[A-Za-z0-9_-]{32}$/; // as the server makes them: 24 bytes in URL-safe base 64
const $ = (id) => document.getElementById(id);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

let study = null; // the last state of the server
let volume = null; // Int16Array of the case on screen
let view = null; // how it is shown
let visit = null; // this showing on this page: id, milliseconds on screen
let answerId = ""; // of the answer to this case: the same after a reload, so that it is never stored twice
let sending = false;
let prefetched = { item: null, bytes: null };

const randomHex = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

// ---- talking to the server

class Problem extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function request(path, body, options = {}) {
  const post = body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, { ...post, credentials: "same-origin", ...options });
  if (response.ok) return response;
  let text = `the server answered ${response.status}`;
  try {
    text = (await response.json()).error ?? text;
  } catch {
    // not JSON: the status has to do
  }
  throw new Problem(response.status, text);
}

function tokenOfLink() {
  const text = location.hash.slice(1);
  return TOKEN.test(text) ? text : null;
}

async function start() {
  try {
    const token = tokenOfLink();
    if (token) {
      await request("/api/session", { token });
      history.replaceState(null, "", "/"); // the link stays out of the history and of screenshots
    }
    await refresh();
  } catch (error) {
    showProblem(error);
  }
}

async function refresh() {
  study = await (await request("/api/state")).json();
  await showCurrent();
}

function showProblem(error) {
  const denied = error instanceof Problem && (error.status === 401 || error.status === 403);
  stopClock();
  for (const id of ["reading", "finished"]) $(id).hidden = true;
  $("problem").hidden = false;
  $("problem-title").textContent = denied ? "Open your own link" : "The study cannot be shown";
  const lost = "The server does not answer. Every saved answer is safe; try again when it runs.";
  $("problem-text").textContent = error instanceof Problem ? `${error.message}.` : lost;
  $("problem-retry").hidden = denied;
}

// ---- a case

async function showCurrent() {
  $("problem").hidden = true;
  const total = study.num_training + study.num_cases;
  $("reader").textContent = `Reader ${study.reader.name}`;
  $("progress").max = total;
  $("progress").value = study.num_answered;
  const current = study.current;
  $("reading").hidden = current === null;
  $("finished").hidden = current !== null;
  for (const id of ["pause-open", "help-open"]) $(id).hidden = current === null;
  if (current === null) {
    stopClock();
    setHeading("All cases are answered");
    return;
  }
  const number = study.num_answered + 1;
  setHeading(
    current.training
      ? `Training case ${number} of ${study.num_training}`
      : `Case ${number - study.num_training} of ${study.num_cases}`,
  );
  $("question").textContent = `Tumour type: ${current.type}`;
  volume = null;
  $("viewer").setAttribute("aria-busy", "true");
  makeView(current);
  restoreDraft(current.item);
  say("");
  const bytes = await caseBytes(current.item);
  if (study.current?.item !== current.item) return; // another one came meanwhile
  volume = new Int16Array(bytes);
  $("loading").textContent = "";
  visit = { item: current.item, id: randomHex(), shown_ms: 0, since: null };
  startClock();
  draw();
  $("viewer").setAttribute("aria-busy", "false");
  prefetch();
}

function setHeading(text) {
  $("heading").textContent = text;
  document.title = `${text} \u2013 reading study`;
}

async function caseBytes(item) {
  if (prefetched.item === item && prefetched.bytes) return prefetched.bytes;
  const late = setTimeout(() => ($("loading").textContent = "Loading the case \u2026"), 300);
  try {
    for (let attempt = 0; ; attempt++) {
      try {
        const bytes = await (await request(`/api/case/${item}`)).arrayBuffer();
        const wanted = 2 * study.shape_zyx.reduce((a, b) => a * b);
        if (bytes.byteLength !== wanted) throw new TypeError("cut short");
        return bytes;
      } catch (error) {
        if (error instanceof Problem) throw error;
        $("loading").textContent = "The server does not answer. Trying again \u2026";
        await sleep(RETRY_S[Math.min(attempt, RETRY_S.length - 1)]);
      }
    }
  } finally {
    clearTimeout(late);
  }
}

async function prefetch() {
  const item = study.next_item;
  if (item === null || prefetched.item === item) return;
  prefetched = { item, bytes: null };
  try {
    const bytes = await (await request(`/api/case/${item}`)).arrayBuffer();
    if (prefetched.item === item) prefetched.bytes = bytes;
  } catch {
    prefetched = { item: null, bytes: null }; // it is fetched when its turn comes
  }
}

function makeView(current) {
  const kept = view; // the window stays from case to case, as readers expect
  const center = current.mark ? current.mark.center_zyx : study.shape_zyx.map((n) => Math.floor(n / 2));
  const [low, high] = kept ? [kept.low, kept.high] : study.window_hu;
  view = { plane: "axial", voxel: [...center], zoom: 1, shift_mm: [0, 0], low, high, mark: current.mark, point: null };
  if (!kept) makePresets();
  document.querySelector('input[name="plane"][value="axial"]').checked = true;
  document.querySelector('input[name="tool"][value="scroll"]').checked = true;
  $("mark").checked = true;
  $("mark-label").hidden = current.mark === null;
  const longest = Math.max(...study.shape_zyx.map((count, axis) => whereText(axis, count).length));
  $("where").style.minWidth = `${longest}ch`; // nothing moves under a finger when the number grows
  afterPlane();
  afterWindow();
}

// ---- time

function startClock() {
  if (visit && visit.since === null && volume && !document.hidden && !$("pause").open) visit.since = performance.now();
}

function stopClock() {
  if (!visit || visit.since === null) return;
  visit.shown_ms += performance.now() - visit.since;
  visit.since = null;
}

function shownSeconds() {
  const running_ms = visit.since === null ? 0 : performance.now() - visit.since;
  return Math.min((visit.shown_ms + running_ms) / 1000, LONGEST_S);
}

function reportTime() {
  stopClock();
  if (!visit || sending || study.current?.item !== visit.item) return;
  const body = { reader: study.reader.id, item: visit.item, visit: visit.id, seconds: shownSeconds() };
  request("/api/time", body, { keepalive: true }).catch(() => {}); // the answer carries the visit's time again
}

// ---- the answer

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value ?? null;

function draft() {
  return { synthetic: chosen("synthetic"), confidence: chosen("confidence"), comment: $("comment").value, point: view.point };
}

function keepDraft() {
  if (!study?.current) return;
  try {
    sessionStorage.setItem("draft", JSON.stringify({ item: study.current.item, answer_id: answerId, ...draft() }));
  } catch {
    // no storage: a reload starts the case's answer anew
  }
}

function restoreDraft(item) {
  let kept = {};
  try {
    kept = JSON.parse(sessionStorage.getItem("draft") ?? "{}");
  } catch {
    // as above
  }
  if (kept.item !== item) kept = {};
  for (const name of ["synthetic", "confidence"])
    for (const input of document.querySelectorAll(`input[name="${name}"]`)) input.checked = input.value === kept[name];
  $("comment").value = kept.comment ?? "";
  answerId = kept.answer_id ?? randomHex();
  setPoint(kept.point ?? null, false);
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function submit() {
  if (sending || !volume || !study.current) return;
  const { synthetic, confidence, comment, point } = draft();
  if (synthetic === null || confidence === null) {
    const missing = synthetic === null ? "synthetic" : "confidence";
    say(missing === "synthetic" ? "Choose real or synthetic first." : "Say how sure you are first.", true);
    document.querySelector(`input[name="${missing}"]`).focus();
    return;
  }
  keepDraft();
  sending = true;
  stopClock();
  $("save").disabled = true;
  const body = {
    reader: study.reader.id, item: study.current.item, answer_id: answerId, synthetic: synthetic === "true",
    confidence: Number(confidence), comment: comment.toWellFormed?.() ?? comment, click_zyx: point, visit: visit.id, seconds: shownSeconds(),
  };
  try {
    const result = await sendUntilStored(body);
    sessionStorage.removeItem("draft");
    if (result.truth_of_training_case !== null) await showFeedback(result.truth_of_training_case, body.synthetic);
    study = result.state;
    await showSaved();
  } catch (error) {
    await afterRefusal(error);
  } finally {
    sending = false;
    $("save").disabled = false;
  }
}

async function showSaved() {
  try {
    await showCurrent();
    if (!study.current) return;
    $("image").focus();
    say("Saved.");
  } catch (error) {
    showProblem(error);
  }
}

async function sendUntilStored(body) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await (await request("/api/answer", body)).json();
    } catch (error) {
      if (error instanceof Problem) throw error;
      say("Not saved yet: the server does not answer. Trying again \u2026", true);
      await sleep(RETRY_S[Math.min(attempt, RETRY_S.length - 1)]);
    }
  }
}

async function afterRefusal(error) {
  if (!(error instanceof Problem) || error.status === 401 || error.status === 403) return showProblem(error);
  if (error.status !== 409) {
    say(`Not saved: ${error.message}.`, true);
    startClock();
    return;
  }
  try {
    await refresh(); // answered elsewhere meanwhile: go on where the server stands
    say(`${error.message}. This is the case that comes next.`, true);
  } catch (again) {
    showProblem(again);
  }
}

function showFeedback(synthetic, said) {
  const name = (value) => (value ? "synthetic" : "real");
  $("feedback-title").textContent = `This tumour is ${name(synthetic)}`;
  $("feedback-text").textContent = `You answered ${name(said)}: ${synthetic === said ? "right" : "wrong"}. Training answers do not count.`;
  return new Promise((resolve) => {
    $("feedback").addEventListener("close", resolve, { once: true });
    $("feedback").showModal();
  });
}

// ---- drawing

const buffer = document.createElement("canvas");

function slicePixels() {
  const { axis, rows, columns } = PLANES[view.plane];
  const shape = study.shape_zyx, step = [shape[1] * shape[2], shape[2], 1];
  const height = shape[rows], width = shape[columns];
  const image = new ImageData(width, height), grey = new Uint32Array(image.data.buffer);
  const low = view.low, scale = 255 / (view.high - view.low);
  const first = view.voxel[axis] * step[axis];
  for (let r = 0, out = 0; r < height; r++) {
    let at = first + (height - 1 - r) * step[rows] + (width - 1) * step[columns];
    for (let c = 0; c < width; c++, at -= step[columns]) {
      const value = clamp(Math.round((volume[at] - low) * scale), 0, 255);
      grey[out++] = 0xff000000 | (value << 16) | (value << 8) | value;
    }
  }
  return image;
}

// picture millimetres: from the picture's top left corner, x to the right, y down
function geometry() {
  const { rows, columns, axis } = PLANES[view.plane];
  const spacing = study.spacing_mm_zyx, shape = study.shape_zyx;
  const width_mm = shape[columns] * spacing[columns], height_mm = shape[rows] * spacing[rows];
  const box = $("stage").getBoundingClientRect();
  const scale = view.zoom * Math.min(box.width / width_mm, box.height / height_mm);
  const left = box.width / 2 - (width_mm / 2 + view.shift_mm[0]) * scale;
  const top = box.height / 2 - (height_mm / 2 + view.shift_mm[1]) * scale;
  return { rows, columns, axis, spacing, shape, width_mm, height_mm, box, scale, left, top };
}

function toScreen(voxel, g) {
  const x_mm = (g.shape[g.columns] - 0.5 - voxel[g.columns]) * g.spacing[g.columns];
  const y_mm = (g.shape[g.rows] - 0.5 - voxel[g.rows]) * g.spacing[g.rows];
  return [g.left + x_mm * g.scale, g.top + y_mm * g.scale];
}

function toVoxel(x, y, g) {
  const voxel = [...view.voxel];
  voxel[g.columns] = g.shape[g.columns] - 1 - Math.floor((x - g.left) / g.scale / g.spacing[g.columns]);
  voxel[g.rows] = g.shape[g.rows] - 1 - Math.floor((y - g.top) / g.scale / g.spacing[g.rows]);
  return voxel.every((v, i) => v >= 0 && v < g.shape[i]) ? voxel : null;
}

let drawPending = false;

function draw() {
  if (drawPending) return;
  drawPending = true;
  requestAnimationFrame(() => {
    drawPending = false;
    if (view && study) paint();
  });
}

function paint() {
  const g = geometry(), canvas = $("image"), ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(g.box.width * ratio)), height = Math.max(1, Math.round(g.box.height * ratio));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, g.box.width, g.box.height);
  if (volume) {
    const pixels = slicePixels();
    if (buffer.width !== pixels.width || buffer.height !== pixels.height) Object.assign(buffer, { width: pixels.width, height: pixels.height });
    buffer.getContext("2d").putImageData(pixels, 0, 0);
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(buffer, g.left, g.top, g.width_mm * g.scale, g.height_mm * g.scale);
    drawMark(pen, g);
    drawPoint(pen, g);
  }
  drawScaleBar(pen, g);
  describe(g);
}

function stroke(pen, path, color, width) {
  for (const [style, extra] of [["rgb(0 0 0 / 75%)", 2], [color, 0]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width + extra;
    pen.beginPath();
    path();
    pen.stroke();
  }
}

function drawMark(pen, g) {
  if (!view.mark || !$("mark").checked) return;
  const away_mm = Math.abs(view.voxel[g.axis] - view.mark.center_zyx[g.axis]) * g.spacing[g.axis];
  if (away_mm > view.mark.radius_mm) return;
  const [x, y] = toScreen(view.mark.center_zyx, g);
  const radius = (view.mark.radius_mm + 3) * g.scale; // open at the diagonals, so that no edge is hidden all round
  for (let quarter = 0; quarter < 4; quarter++) {
    const middle = (quarter * Math.PI) / 2;
    stroke(pen, () => pen.arc(x, y, radius, middle - 0.5, middle + 0.5), MARK, 2);
  }
}

function drawPoint(pen, g) {
  if (!view.point || view.point[g.axis] !== view.voxel[g.axis]) return;
  const [x, y] = toScreen(view.point, g);
  for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]])
    stroke(pen, () => (pen.moveTo(x + 4 * dx, y + 4 * dy), pen.lineTo(x + 14 * dx, y + 14 * dy)), POINT, 2);
}

function drawScaleBar(pen, g) {
  const limit = g.box.width / g.scale / 4, decade = 10 ** Math.floor(Math.log10(limit));
  const length_mm = decade * [5, 2, 1].find((step) => step * decade <= limit);
  const x = 12, y = g.box.height - 14, end = x + length_mm * g.scale;
  stroke(pen, () => (pen.moveTo(x, y - 5), pen.lineTo(x, y), pen.lineTo(end, y), pen.lineTo(end, y - 5)), "#fff", 2);
  pen.font = "600 14px system-ui, sans-serif";
  pen.lineWidth = 3;
  pen.strokeStyle = "#000";
  pen.fillStyle = "#fff";
  pen.strokeText(`${length_mm} mm`, x, y - 10);
  pen.fillText(`${length_mm} mm`, x, y - 10);
}

function describe(g) {
  for (const [side, letter] of Object.entries(PLANES[view.plane].edges)) $(`edge-${side}`).textContent = letter;
  const number = view.voxel[g.axis] + 1;
  $("image").setAttribute("aria-label", `CT slice, ${view.plane}, ${number} of ${g.shape[g.axis]}`);
  const away = view.mark ? view.mark.center_zyx[g.axis] - view.voxel[g.axis] : 0;
  const lines = [`W ${Math.round(view.high - view.low)}  L ${Math.round((view.high + view.low) / 2)}`];
  if (view.mark && $("mark").checked && Math.abs(away) * g.spacing[g.axis] > view.mark.radius_mm)
    lines.push(`mark ${Math.abs(away)} slices ${away > 0 ? "up (\u25b2)" : "down (\u25bc)"}`);
  $("note").textContent = lines.join("\n");
  $("zoom").textContent = `${Math.round(100 * view.zoom)} %`;
}

// ---- what a reader changes

let announce = 0;

function afterPlane() {
  const { axis } = PLANES[view.plane], slider = $("slice");
  slider.max = study.shape_zyx[axis];
  view.shift_mm = [0, 0];
  afterSlice();
}

function whereText(axis, number) {
  return `Slice ${number} of ${study.shape_zyx[axis]}, every ${Number(study.spacing_mm_zyx[axis].toFixed(2))} mm`;
}

function afterSlice() {
  const { axis } = PLANES[view.plane], number = view.voxel[axis] + 1, text = whereText(axis, number);
  $("slice").value = number;
  $("slice").setAttribute("aria-valuetext", `${number} of ${study.shape_zyx[axis]}`);
  $("where").textContent = text;
  clearTimeout(announce);
  announce = setTimeout(() => ($("spoken-where").textContent = text), 150); // following every wheel step would drown a screen reader
  draw();
}

function scrollBy(slices) {
  const { axis } = PLANES[view.plane];
  view.voxel[axis] = clamp(view.voxel[axis] + slices, 0, study.shape_zyx[axis] - 1);
  afterSlice();
}

function setWindow(low, high) {
  const width = clamp(high - low, 1, 4000), level = clamp((high + low) / 2, -2000, 4000);
  view.low = level - width / 2;
  view.high = level + width / 2;
  afterWindow();
}

function afterWindow() {
  $("width").value = Math.round(view.high - view.low);
  $("level").value = Math.round((view.high + view.low) / 2);
  for (const button of $("presets").children)
    button.setAttribute("aria-pressed", String(Number(button.dataset.low) === view.low && Number(button.dataset.high) === view.high));
  draw();
}

function makePresets() {
  $("presets").replaceChildren(
    ...study.presets.map(([name, low, high]) => {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", textContent: name, title: `width ${high - low}, level ${(high + low) / 2} HU` });
      Object.assign(button.dataset, { low, high });
      button.addEventListener("click", () => setWindow(low, high));
      return button;
    }),
  );
}

function nextPreset() {
  const at = study.presets.findIndex(([, low, high]) => low === view.low && high === view.high);
  const [, low, high] = study.presets[(at + 1) % study.presets.length];
  setWindow(low, high);
}

function zoomBy(factor) {
  view.zoom = clamp(view.zoom * factor, 1, 12);
  moveBy(0, 0);
}

function moveBy(right_mm, down_mm) {
  const g = geometry(); // the picture's middle never leaves what can be seen of it
  const room = [Math.max(0, g.width_mm / 2 - g.box.width / g.scale / 4), Math.max(0, g.height_mm / 2 - g.box.height / g.scale / 4)];
  view.shift_mm = [view.shift_mm[0] + right_mm, view.shift_mm[1] + down_mm].map((s, i) => clamp(s, -room[i], room[i]));
  draw();
}

function resetView() {
  Object.assign(view, { zoom: 1, shift_mm: [0, 0] });
  if (view.mark) view.voxel = [...view.mark.center_zyx];
  setWindow(...study.window_hu);
  afterSlice();
}

function setPoint(voxel, keep = true) {
  view.point = voxel;
  $("point-clear").disabled = voxel === null;
  $("point-note").textContent = voxel
    ? `Point set in axial slice ${voxel[0] + 1}.`
    : "No point. Choose the tool Point and tap the image.";
  if (keep) keepDraft();
  draw();
}

function pointAtMiddle() {
  const g = geometry();
  setPoint(toVoxel(g.box.width / 2, g.box.height / 2, g));
}

function setPlane(plane) {
  view.plane = plane;
  document.querySelector(`input[name="plane"][value="${plane}"]`).checked = true;
  afterPlane();
}

function choose(name, value) {
  document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
  keepDraft();
  say("");
}

// ---- pointers: mouse, pen and fingers

const pointers = new Map();
let drag = null; // { tool, x, y, rest, moved }
let pinch = null; // { distance, x, y }

function pointerDown(event) {
  if (!volume) return;
  $("image").setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  if (pointers.size === 2) {
    drag = null;
    pinch = pinchNow();
  } else if (pointers.size === 1) {
    const tool = event.button === 2 ? "window" : event.button === 1 ? "pan" : chosen("tool");
    drag = { tool, x: event.clientX, y: event.clientY, rest: 0, moved: 0 };
  }
}

function pinchNow() {
  const [a, b] = [...pointers.values()];
  return { distance: Math.hypot(a[0] - b[0], a[1] - b[1]), x: (a[0] + b[0]) / 2, y: (a[1] + b[1]) / 2 };
}

function pointerMove(event) {
  if (!pointers.has(event.pointerId)) return;
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  if (pinch && pointers.size === 2) {
    const now = pinchNow(), scale = geometry().scale;
    moveBy((pinch.x - now.x) / scale, (pinch.y - now.y) / scale);
    if (pinch.distance > 0) zoomBy(now.distance / pinch.distance);
    pinch = now;
    return;
  }
  if (!drag) return;
  const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
  drag.moved += Math.abs(dx) + Math.abs(dy);
  Object.assign(drag, { x: event.clientX, y: event.clientY });
  dragBy(dx, dy);
}

function dragBy(dx, dy) {
  if (drag.tool === "scroll") {
    const g = geometry(), per_slice = Math.max(4, g.box.height / g.shape[g.axis] / 1.5);
    drag.rest += dy / per_slice;
    const slices = Math.trunc(drag.rest);
    drag.rest -= slices;
    if (slices) scrollBy(-slices); // down is towards the feet
  } else if (drag.tool === "window") {
    const step = Math.max(0.5, (study.window_hu[1] - study.window_hu[0]) / 400);
    const width = Math.max(1, view.high - view.low + dx * step), level = (view.high + view.low) / 2 + dy * step;
    setWindow(level - width / 2, level + width / 2);
  } else if (drag.tool === "pan") {
    const scale = geometry().scale;
    moveBy(-dx / scale, -dy / scale);
  }
}

function pointerUp(event) {
  if (!pointers.delete(event.pointerId)) return;
  const tapped = drag && event.type === "pointerup" && drag.moved < 6;
  if (tapped) {
    const g = geometry(), x = event.clientX - g.box.left, y = event.clientY - g.box.top;
    const voxel = toVoxel(x, y, g);
    if (drag.tool === "point" && voxel) setPoint(voxel);
    if (drag.tool === "pan") moveBy((x - g.box.width / 2) / g.scale, (y - g.box.height / 2) / g.scale);
  }
  drag = null;
  if (pointers.size < 2) pinch = null;
}

let wheelRest = 0;

function wheel(event) {
  event.preventDefault();
  if (!volume) return;
  if (event.ctrlKey) {
    zoomBy(Math.exp(-event.deltaY / 300));
    return;
  }
  const lines = event.deltaMode === 0 ? event.deltaY / 60 : event.deltaY;
  wheelRest = Math.abs(event.deltaY) >= 50 ? Math.sign(lines) : wheelRest + lines; // a wheel's notch is a slice, a touchpad adds up
  const slices = Math.trunc(wheelRest);
  wheelRest -= slices;
  if (slices) scrollBy(-slices);
}

// ---- keys

function keyDown(event) {
  if (event.defaultPrevented || event.altKey || event.metaKey || document.querySelector("dialog[open]")) return;
  if ($("reading").hidden || !volume) return;
  const target = event.target;
  if (event.key === "Enter") {
    const own = target.matches("textarea") ? !event.ctrlKey : target.matches("button, a, input[type=number]");
    if (own) return;
    event.preventDefault();
    submit();
    return;
  }
  if (event.ctrlKey || target.matches("textarea, input[type=number]")) return;
  const action = event.shiftKey ? shiftedKey(event.key) : plainKey(event, target);
  if (!action) return;
  event.preventDefault();
  action();
}

function shiftedKey(key) {
  const step = 40 / geometry().scale;
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  if (moves[key]) return () => moveBy(...moves[key]);
  return key === "+" && $("keys").checked ? () => zoomBy(1.25) : null; // on many keyboards + is a shifted key
}

function plainKey(event, target) {
  const slices = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5 }[event.key];
  if (slices) return target.matches("input[type=radio], input[type=range]") ? null : () => scrollBy(slices);
  if (!$("keys").checked) return null;
  if (/^[1-5]$/.test(event.key)) return () => choose("confidence", event.key);
  return {
    r: () => choose("synthetic", "false"), s: () => choose("synthetic", "true"), w: nextPreset, m: () => $("mark").click(),
    a: () => setPlane("axial"), c: () => setPlane("coronal"), g: () => setPlane("sagittal"), x: pointAtMiddle, p: pause,
    "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8), 0: resetView, "?": () => $("help").showModal(),
  }[event.key.toLowerCase()] ?? null;
}

// ---- pausing and leaving

function pause() {
  if (!study?.current) return;
  document.body.classList.add("paused");
  $("pause").returnValue = "";
  $("pause").showModal();
  reportTime();
}

async function afterPause() {
  document.body.classList.remove("paused");
  if ($("pause").returnValue !== "leave") {
    startClock();
    return;
  }
  try {
    sessionStorage.removeItem("draft");
    await request("/api/leave", {});
    showProblem(new Problem(401, "Signed out here. To go on, open your link again"));
  } catch (error) {
    showProblem(error);
  }
}

// ---- wiring

function listen() {
  const image = $("image");
  image.addEventListener("pointerdown", pointerDown);
  image.addEventListener("pointermove", pointerMove);
  image.addEventListener("pointerup", pointerUp);
  image.addEventListener("pointercancel", pointerUp);
  image.addEventListener("contextmenu", (event) => event.preventDefault());
  image.addEventListener("wheel", wheel, { passive: false });
  $("slice").addEventListener("input", () => {
    view.voxel[PLANES[view.plane].axis] = Number($("slice").value) - 1;
    afterSlice();
  });
  $("slice-down").addEventListener("click", () => scrollBy(-1));
  $("slice-up").addEventListener("click", () => scrollBy(1));
  $("zoom-in").addEventListener("click", () => zoomBy(1.25));
  $("zoom-out").addEventListener("click", () => zoomBy(0.8));
  $("reset").addEventListener("click", resetView);
  $("mark").addEventListener("change", draw);
  for (const input of document.querySelectorAll('input[name="plane"]')) input.addEventListener("change", () => setPlane(input.value));
  for (const id of ["width", "level"])
    $(id).addEventListener("change", () => {
      const width = Number($("width").value) || 1, level = Number($("level").value) || 0;
      setWindow(level - width / 2, level + width / 2);
    });
  $("point-set").addEventListener("click", pointAtMiddle);
  $("point-clear").addEventListener("click", () => setPoint(null));
  $("answer").addEventListener("input", keepDraft);
  $("answer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("pause-open").addEventListener("click", pause);
  $("pause").addEventListener("close", afterPause);
  $("help-open").addEventListener("click", () => $("help").showModal());
  $("problem-retry").addEventListener("click", () => refresh().catch(showProblem));
  document.addEventListener("keydown", keyDown);
  document.addEventListener("visibilitychange", () => (document.hidden ? reportTime() : startClock()));
  addEventListener("pagehide", reportTime);
  addEventListener("hashchange", () => tokenOfLink() && start()); // another reader's link in the same tab
  $("skip").addEventListener("click", (event) => {
    event.preventDefault();
    $("answer").focus();
  });
  new ResizeObserver(draw).observe($("stage"));
}

listen();
start();
