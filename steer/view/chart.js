const BAND = 12, TALLEST = 46, LEAST = 20; // the band of segments, and how tall the lane of a track may be

// The tracks of a chain on one axis of tokens, a lane each, under the band of its segments.
class Chart {
  constructor(chain, box) {
    this.chain = chain;
    this.box = box;
    this.canvas = box.appendChild(made("canvas"));
    this.window = box.appendChild(made("div", "seen"));
    this.cursor = box.appendChild(made("div", "now"));
    this.all();
  }

  all() { [this.from, this.to] = [0, this.chain.length]; }

  x(i) { return ((i - this.from) / (this.to - this.from)) * this.box.clientWidth; }

  token(x) {
    return clamp(Math.floor(this.from + (x / this.box.clientWidth) * (this.to - this.from)), 0, this.chain.length - 1);
  }

  zoom(factor, middle) {
    const span = clamp((this.to - this.from) * factor, Math.min(20, this.chain.length), this.chain.length);
    const share = (middle - this.from) / (this.to - this.from);
    this.from = clamp(middle - share * span, 0, this.chain.length - span);
    this.to = this.from + span;
  }

  move(tokens) {
    const span = this.to - this.from;
    this.from = clamp(this.from + tokens, 0, this.chain.length - span);
    this.to = this.from + span;
  }

  draw() {
    const keys = [...state.ranges.keys()].filter((key) => state.on.has(key)); // the same lanes on both sides
    const tall = clamp(Math.floor((innerHeight * 0.4) / Math.max(keys.length, 1)), LEAST, TALLEST);
    const width = this.box.clientWidth, height = BAND + keys.length * tall, scale = devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    this.bands(pen, height);
    keys.forEach((key, n) => {
      const track = this.chain.tracks.find((one) => keyOf(one) === key);
      if (track) this.lane(pen, track, BAND + n * tall, tall, width);
    });
    this.place();
  }

  bands(pen, height) {
    const band = (start, stop, colour) => {
      const left = this.x(start), wide = Math.max(1, this.x(stop) - left);
      pen.fillStyle = colour;
      pen.fillRect(left, 0, wide, BAND);
      pen.globalAlpha = 0.12;
      pen.fillRect(left, BAND, wide, height - BAND);
      pen.globalAlpha = 1;
    };
    band(0, this.chain.prompt, ink("line"));
    for (const [start, stop, label] of this.chain.segments) {
      if (stop > this.from && start < this.to) band(start, stop, data.colours[label]);
    }
  }

  lane(pen, track, top, tall, width) {
    const [low, high] = state.ranges.get(keyOf(track)), room = tall - 6;
    const y = (value) => top + 3 + room * (1 - (clamp(value, low, high) - low) / (high - low || 1));
    pen.strokeStyle = ink("line");
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(0, top + 0.5);
    pen.lineTo(width, top + 0.5);
    if (low < 0 && high > 0) {
      pen.moveTo(0, Math.round(y(0)) + 0.5);
      pen.lineTo(width, Math.round(y(0)) + 0.5);
    }
    pen.stroke();
    const columns = Math.max(1, Math.floor(width)), [least, most] = decimated(track.values, this.from, this.to, columns);
    pen.fillStyle = state.colours.get(keyOf(track));
    for (let x = 0, before = NaN; x < columns; x++) {
      if (Number.isNaN(least[x])) { before = NaN; continue; }
      const above = y(Math.max(most[x], Number.isNaN(before) ? most[x] : before));
      const below = y(Math.min(least[x], Number.isNaN(before) ? least[x] : before));
      pen.fillRect(x, above - 0.75, 1.2, below - above + 1.5);
      before = (least[x] + most[x]) / 2;
    }
    pen.font = "11px system-ui, sans-serif";
    pen.lineWidth = 3;
    pen.strokeStyle = ink("paper");
    pen.fillStyle = ink("ink");
    const words = `${track.name}  ${number(low)} to ${number(high)} ${track.unit}`;
    pen.strokeText(words, 6, top + 13);
    pen.fillText(words, 6, top + 13);
  }

  // What is seen of the text, and the token that is looked at.
  place() {
    const side = sides.find((one) => one.chart === this), [start, stop] = side ? side.text.seen() : [0, 0];
    this.window.style.transform = `translateX(${this.x(start)}px)`;
    this.window.style.width = `${Math.max(2, this.x(stop) - this.x(start))}px`;
    const at = side && state.token && state.token.side === side ? state.token.i : twin(side);
    this.cursor.hidden = at === null;
    if (at !== null) this.cursor.style.transform = `translateX(${this.x(at + 0.5)}px)`;
  }
}
