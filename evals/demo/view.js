// Draws what became of each patch (fates.py) over the picture, for one decoder layer at a time.
const HUES = 8;
let layer = 0, token = -1, timer = null, picture = null;

const find = (name) => element.querySelector(name);
const data = () => (props.value && props.value.alive ? props.value : null);

// As in the picture that can be downloaded: steps of the golden ratio keep the hues of neighbouring groups apart.
function colour(index, alpha) {
  const [saturation, light] = [[85, 55], [55, 70], [90, 38]][Math.floor(index / HUES) % 3];
  return `hsla(${(index * 222.5) % 360}, ${saturation}%, ${light}%, ${alpha})`;
}

function cells() {
  const [frames, height, width] = data().grid;
  const canvas = find("canvas");
  return { rows: frames * height, columns: width, w: canvas.width / width, h: canvas.height / (frames * height) };
}

function draw() {
  const now = data(), canvas = find("canvas");
  if (!now || !canvas || !picture || !picture.complete) return;
  const [frames, height, width] = now.grid;
  const scale = Math.max(1, Math.round(640 / Math.max(width, height)));
  canvas.width = width * scale;
  canvas.height = frames * height * scale;
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = picture.naturalWidth > canvas.width;
  for (let frame = 0; frame < frames; frame++) {
    pen.drawImage(picture, 0, frame * height * scale, canvas.width, height * scale);
  }
  const alive = now.alive[layer];
  for (let one = 0; one < alive.length; one++) {
    const x = (one % width) * scale, y = Math.floor(one / width) * scale, group = now.groups[one];
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
    pen.strokeRect((holder % width) * scale + 1, Math.floor(holder / width) * scale + 1, scale - 2, scale - 2);
  });
  if (token >= 0) {
    pen.strokeStyle = "#ffffff";
    pen.lineWidth = Math.max(2, scale / 12);
    pen.strokeRect((token % width) * scale + 1, Math.floor(token / width) * scale + 1, scale - 2, scale - 2);
    pen.strokeStyle = "#000000";
    pen.setLineDash([scale / 5, scale / 5]);
    pen.strokeRect((token % width) * scale + 1, Math.floor(token / width) * scale + 1, scale - 2, scale - 2);
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
  picture = new Image();
  picture.onload = draw;
  picture.src = now.image;
  find(".vt-fate").textContent = "Point at a patch, or walk with the arrow keys.";
}

function under(event) {
  const canvas = find("canvas"), box = canvas.getBoundingClientRect(), { rows, columns } = cells();
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  return row < 0 || column < 0 || row >= rows || column >= columns ? -1 : row * columns + column;
}

element.addEventListener("pointermove", (event) => {
  if (event.target.tagName === "CANVAS" && data()) tell(under(event));
});
element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName === "CANVAS" && data()) tell(under(event));
});
element.addEventListener("keydown", (event) => {
  if (event.target.tagName !== "CANVAS" || !data()) return;
  const { rows, columns } = cells();
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const next = token < 0 ? 0 : token + moves[event.key];
  if (next >= 0 && next < rows * columns) tell(next);
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
