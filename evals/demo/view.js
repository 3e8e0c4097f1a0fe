// Draws what became of each patch (fates.py) over the picture, for one decoder layer at a time.
const HUES = 8;
let layer = 0, token = -1, timer = null, picture = null, places = new Map();

const find = (name) => element.querySelector(name);
const data = () => (props.value && props.value.alive ? props.value : null);

// As in the picture that can be downloaded: steps of the golden ratio keep the hues of neighbouring groups apart.
function colour(index, alpha) {
  const [saturation, light] = [[85, 55], [55, 70], [90, 38]][Math.floor(index / HUES) % 3];
  return `hsla(${(index * 222.5) % 360}, ${saturation}%, ${light}%, ${alpha})`;
}

// The patch that is drawn in a cell, -1 for none.
function patch(column, row) {
  const { columns, rows } = data();
  return column < 0 || row < 0 || column >= columns || row >= rows ? -1 : (places.get(row * columns + column) ?? -1);
}

function draw() {
  const now = data(), canvas = find("canvas");
  if (!now || !canvas || !picture || !picture.complete) return;
  const scale = Math.max(1, Math.round(640 / Math.max(now.columns, now.rows)));
  canvas.width = now.columns * scale;
  canvas.height = now.rows * scale;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = picture.naturalWidth > canvas.width;
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const alive = now.alive[layer];
  for (let one = 0; one < alive.length; one++) {
    const [x, y] = now.cells[one].map((place) => place * scale), group = now.groups[one];
    if (group >= 0 && now.alive[layer][now.holders[group]] === "1") {
      pen.fillStyle = colour(group, 0.5);
      pen.fillRect(x, y, scale, scale);
    } else if (alive[one] === "0") {
      pen.fillStyle = "rgba(10, 12, 16, 0.82)";
      pen.fillRect(x, y, scale, scale);
    }
  }
  now.holders.forEach((holder, group) => {
    if (now.alive[layer][holder] !== "1") return;
    pen.strokeStyle = colour(group, 1);
    pen.lineWidth = Math.max(2, scale / 10);
    const [x, y] = now.cells[holder].map((place) => place * scale);
    pen.strokeRect(x + 1, y + 1, scale - 2, scale - 2);
  });
  if (token >= 0) {
    const [x, y] = now.cells[token].map((place) => place * scale);
    pen.strokeStyle = "#ffffff";
    pen.lineWidth = Math.max(2, scale / 12);
    pen.strokeRect(x + 1, y + 1, scale - 2, scale - 2);
    pen.strokeStyle = "#000000";
    pen.setLineDash([scale / 5, scale / 5]);
    pen.strokeRect(x + 1, y + 1, scale - 2, scale - 2);
    pen.setLineDash([]);
  }
  const depth = now.alive.length - 1;
  const where = layer === 0 ? "entering the decoder" : `in decoder layer ${layer - 1} of 0 to ${depth - 1}`;
  find(".vt-count").textContent = `${now.counts[layer]} of ${alive.length} patches ${where}`;
  const slider = find("input[type=range]");
  slider.max = depth;
  slider.value = layer;
  slider.setAttribute("aria-valuetext", find(".vt-count").textContent);
  const bars = find(".vt-bars");
  if (bars.childElementCount !== now.counts.length) {
    bars.replaceChildren(...now.counts.map(() => document.createElement("span")));
  }
  [...bars.children].forEach((bar, index) => {
    bar.style.height = `${(100 * now.counts[index]) / alive.length}%`;
    bar.className = index === layer ? "vt-now" : "";
  });
}

function tell(next) {
  const now = data();
  if (!now || next === token) return;
  token = next;
  find(".vt-fate").textContent = token < 0 ? "Point at a patch, or walk with the arrow keys." : now.words[token];
  draw();
}

function stop() {
  clearInterval(timer);
  timer = null;
  const button = find(".vt-play");
  if (button) button.textContent = "Play";
}

function start() {
  stop();
  token = -1;
  const now = data();
  element.classList.toggle("vt-filled", Boolean(now));
  if (!now) return;
  layer = now.alive.length - 1;
  places = new Map(now.cells.map(([column, row], one) => [row * now.columns + column, one]));
  picture = new Image();
  picture.onload = draw;
  picture.src = now.image;
  find(".vt-fate").textContent = "Point at a patch, or walk with the arrow keys.";
}

function under(event) {
  const canvas = find("canvas"), box = canvas.getBoundingClientRect(), { rows, columns } = data();
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  return patch(column, row);
}

element.addEventListener("pointermove", (event) => {
  if (event.target.tagName === "CANVAS" && data()) tell(under(event));
});
element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName === "CANVAS" && data()) tell(under(event));
});
element.addEventListener("keydown", (event) => {
  if (event.target.tagName !== "CANVAS" || !data()) return;
  const along = { ArrowLeft: -1, ArrowRight: 1 }, down = { ArrowUp: -1, ArrowDown: 1 };
  if (!(event.key in along) && !(event.key in down)) return;
  event.preventDefault();
  if (token < 0) return tell(0);
  if (event.key in along) {
    const next = token + along[event.key];
    if (next >= 0 && next < data().cells.length) tell(next);
    return;
  }
  // Over what lies between two frames.
  const [column, row] = data().cells[token];
  for (let next = row + down[event.key]; next >= 0 && next < data().rows; next += down[event.key]) {
    if (patch(column, next) >= 0) return tell(patch(column, next));
  }
});
element.addEventListener("input", (event) => {
  if (event.target.type !== "range") return;
  stop();
  layer = Number(event.target.value);
  draw();
});
element.addEventListener("click", (event) => {
  if (!event.target.classList.contains("vt-play") || !data()) return;
  if (timer) return stop();
  event.target.textContent = "Stop";
  layer = 0;
  draw();
  timer = setInterval(() => {
    if (layer + 1 >= data().alive.length) return stop();
    layer += 1;
    draw();
  }, 450);
});
watch("value", start);
start();
